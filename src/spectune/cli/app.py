"""Entry point of the `spectune` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spectune.cli.allocators import set_allocators
from spectune.cli.commands import make_app
from spectune.cli.console import print_error
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
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    set_allocators()
    try:
        app(args=arguments, prog_name="spectune")
    except SpectuneError as error:
        print_error(error)
        return error.exit_code
    except RuntimeError as error:
        # Compare by name: importing torch for the class would slow down `--help`.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        from spectune.model.memory_errors import CARD_REMEDIES, out_of_memory

        memory_error = out_of_memory(error, CARD_REMEDIES[:1])
        print_error(memory_error)
        return memory_error.exit_code
    except OSError as error:
        # A full disk or missing permissions: the message of the system names the file and the cause.
        print_error(SpectuneError(str(error)))
        return SpectuneError.exit_code
    except SystemExit as finished:  # typer exits this way, after its own messages about wrong arguments
        return finished.code if isinstance(finished.code, int) else 0
    return 0
