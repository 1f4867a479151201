"""Entry point of the `spectune` command."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer
from typer.exceptions import TyperException

from spectune.cli.allocators import set_allocators
from spectune.cli.commands import make_app
from spectune.cli.console import print_error, print_json, user_error
from spectune.errors import SpectuneError

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
    sys.exit(run(arguments))


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _stop_cleanly() -> None:
    """Let a request to end the process and a closed terminal end it like an error: no partial file stays.

    A training replaces these handlers by ones that save.
    """
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
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
    except SystemExit as finished:  # of typer, if the program that reads a pipe has ended
        return finished.code if isinstance(finished.code, int) else 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is already printed
            return SpectuneError.exit_code
        shown = _usage_error(error) if isinstance(error, TyperException) else user_error(error)
        if shown is None:
            raise
        if shown.is_reported:
            return shown.exit_code
        print_error(shown)
        if "--json" in words:
            print_json({"error": {"what": shown.what, "hint": shown.hint}})
        return shown.exit_code


def _usage_error(error: TyperException) -> SpectuneError:
    """Return the error for a wrong option, argument or command."""
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    command = "spectune" if context is None else context.command_path
    return SpectuneError(text[:1].lower() + text[1:], hint=f"see {command} --help")
