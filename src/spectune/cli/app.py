"""Entry point of the `spectune` command."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import Annotated, cast

import typer
from typer.exceptions import TyperException

from spectune.cli.allocators import set_allocators
from spectune.cli.commands import make_app
from spectune.cli.console import print_error, print_json, say, user_error
from spectune.errors import SpectuneError, Stopped

_PRINTED_WITHIN = 5  # seconds, by another process of the same training

app = make_app()


def _print_version(requested: bool) -> None:
    if requested:
        from spectune.files.provenance import spectune_version

        print(spectune_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit. An error that a user can fix prints a message and exits with code 2."""
    _stop_cleanly()
    code = run(arguments)
    gc.freeze()  # with torch, the garbage collections at the exit take seconds
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(128 + number)


def _stop_cleanly() -> None:
    """Let a request to end the process and a closed terminal end it like an error: no partial file stays.

    A training replaces these handlers by ones that save.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        # Started by nohup, a command ignores the closed terminal.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; docs/reference/exit-codes.md lists them.

    An error is printed on stderr. With `--json`, an object `error` is printed on stdout too.
    """
    set_allocators()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return app(args=arguments, prog_name="spectune", obj=words, standalone_mode=False) or 0
    except Stopped as stopped:
        if not _is_reported(stopped):
            with suppress(OSError):  # the terminal is closed
                say(stopped.what)
        return cast("int", stopped.code)
    except SystemExit as finished:  # of typer, if the program that reads a pipe has ended
        return finished.code if isinstance(finished.code, int) else 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is already printed
            return SpectuneError.exit_code
        shown = _usage_error(error) if isinstance(error, TyperException) else user_error(error)
        if shown is None:
            raise
        if _is_reported(shown):
            return shown.exit_code
        print_error(shown)
        if "--json" in words:
            print_json({"error": {"what": shown.what, "hint": shown.hint}})
        return shown.exit_code


def _is_reported(error: SpectuneError | Stopped) -> bool:
    """Return whether another process of the same training prints a message.

    Before the processes are connected, the first one of each host prints. Its launcher ends it when another
    process has ended, so the others wait until it has printed. It ignores the launcher meanwhile.
    """
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if error.is_reported or not (is_first_here or _is_connected()):
        with suppress(Stopped):
            time.sleep(_PRINTED_WITHIN)
        return True
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return False


def _is_connected() -> bool:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _usage_error(error: TyperException) -> SpectuneError:
    """Return the error for a wrong option, argument or command."""
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    command = "spectune" if context is None else context.command_path
    return SpectuneError(text[:1].lower() + text[1:], hint=f"see {command} --help")
