"""The command line: parse, call the library, print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spectune.cli.commands import make_app
from spectune.cli.console import print_error
from spectune.cli.huge_pages import use_huge_pages
from spectune.errors import SpectuneError

app = make_app()


def _version(wanted: bool) -> None:
    if wanted:
        from spectune.files.provenance import spectune_version

        print(spectune_version())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; every failure a user can mend is a message and exit code 2, without a traceback."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    use_huge_pages()
    try:
        app(args=arguments, prog_name="spectune")
    except SpectuneError as error:
        print_error(error)
        return error.exit_code
    except RuntimeError as error:
        # torch's class, by name: `--help` need not wait for torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        short = SpectuneError(
            f"the GPU ran out of memory: {str(error).splitlines()[0]}",
            hint="draw or train with a smaller --size, --batch, run.batch or data.resolution_px",
        )
        print_error(short)
        return short.exit_code
    except OSError as error:
        # A full disk, a folder without permission: the system's own words say what and where.
        print_error(SpectuneError(str(error)))
        return SpectuneError.exit_code
    except SystemExit as finished:  # how typer ends, with its own messages for wrong arguments
        return finished.code if isinstance(finished.code, int) else 0
    return 0
