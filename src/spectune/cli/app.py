"""Entry point of the `spectune` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spectune.cli.allocators import set_allocators
from spectune.cli.commands import make_app
from spectune.cli.console import print_error, user_error

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
        app(args=arguments, prog_name="spectune", obj=sys.argv[1:] if arguments is None else arguments)
    except SystemExit as finished:  # typer exits this way, after its own messages about wrong arguments
        return finished.code if isinstance(finished.code, int) else 0
    except Exception as error:
        shown = user_error(error)
        if shown is None:
            raise
        print_error(shown)
        return shown.exit_code
    return 0
