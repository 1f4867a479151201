"""Options that several commands have, and the application they belong to."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="spectune",
    help="Fine-tune a whole SDXL checkpoint by training only its principal spectrum.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]

Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="default (LyCORIS preset=full), all, or names, parts, blocks and patterns, separated by commas: "
        "'unet,!conv', 'te1.*', 'down.1'. May be given several times.",
    ),
]

DTYPES = "float16, bfloat16 or float32"


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"**Example:** `{command}`"
