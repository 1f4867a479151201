"""The commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectune.cli.options import DryRun, Force, Json, app, example


@app.command(epilog=example("spectune plan model.safetensors --vram 12GB"))
def plan(
    model: Annotated[Path, typer.Argument(help="The original checkpoint.")],
    vram: Annotated[str, typer.Option(help="Memory of the card: 12GB, or 11.5GiB beside a desktop.")],
    rank: Annotated[int, typer.Option(min=1, help="Singular directions trained per layer.")] = 64,
    parts: Annotated[str, typer.Option(help="What to train, separated by commas.")] = "unet,te1,te2",
    resolution: Annotated[int, typer.Option(min=16, help="Side of a square picture in pixels.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 1,
    optimizer: Annotated[str, typer.Option(help="Optimiser by its name in recipes.")] = "adamw",
    ema: Annotated[bool, typer.Option("--ema", help="Keep a moving average of what is trained.")] = False,
    activations: Annotated[
        bool, typer.Option("--activations", help="Also tabulate other sizes and batches (a minute or two).")
    ] = False,
    json: Json = False,
) -> None:
    """Which rank, form, precision and checkpointing fit a card: a memory table, and the recipe on stdout."""
    from spectune.cli.commands import planning

    planning.plan(
        model,
        vram,
        rank=rank,
        parts=parts,
        resolution=resolution,
        batch=batch,
        optimizer=optimizer,
        ema=ema,
        activations=activations,
        as_json=json,
    )


@app.command(epilog=example("spectune train recipes/emoji3d_eps.toml --set run.steps=200"))
def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe in TOML.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Overrule a key: section.key=value.")
    ] = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a recipe, or continue it where it stopped; Ctrl-C saves first."""
    from spectune.cli.commands import training

    if not training.train(recipe, overrides or [], force=force, dry_run=dry_run, as_json=json):
        raise typer.Exit(130)


recipe_app = typer.Typer(
    help="Recipes of trainings.", no_args_is_help=True, rich_markup_mode="markdown", add_completion=False
)
app.add_typer(recipe_app, name="recipe")


@recipe_app.command("import", epilog=example("spectune recipe import train.bat -o recipe.toml"))
def import_recipe(
    command: Annotated[
        str,
        typer.Argument(
            metavar="TEXT_OR_FILE",
            help="The command in quotes; a .bat, .sh, .ps1 or .txt file that holds it; a configuration in "
            ".toml, kohya_ss settings in .json; or - for the standard input.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The recipe to write.")] = Path("recipe.toml"),
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a command of kohya's sd-scripts into a recipe, and say what becomes of each flag; exit code 1 when
    one of them is unknown or has no counterpart."""
    from spectune.cli.commands import importing

    if not importing.import_recipe(command, out, force=force, as_json=json):
        raise typer.Exit(1)


@app.command(epilog=example("spectune demo"))
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for everything the demo makes.")] = Path(
        "spectune-demo"
    ),
    steps: Annotated[
        int | None, typer.Option(min=0, help="Training steps; the recipe's own number if not given.")
    ] = None,
) -> None:
    """The whole way on the embedded tiny SDXL: split, prove, tune, rebuild, export, compare."""
    from spectune.cli.demo import run_demo

    run_demo(out, steps=steps)
