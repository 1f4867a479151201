"""The command line: parse, call the library, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from spectune.apps.console import print_error
from spectune.errors import SpectuneError
from spectune.huge_pages import use_huge_pages

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

_DTYPES = "float16, bfloat16 or float32"


def example(command: str) -> str:
    """The last line of a command's help."""
    return f"**Example:** `{command}`"


@app.command(epilog=example("spectune inspect model.safetensors"))
def inspect(
    model: Annotated[Path, typer.Argument(help="A checkpoint, diffusers folder or adapter.")],
    spectrum: Annotated[
        bool,
        typer.Option("--spectrum", help="Also measure what ranks hold of each part and block (minutes)."),
    ] = False,
    layers: Layers = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="With --spectrum: every layer.")] = False,
    plot: Annotated[Path | None, typer.Option(help="With --spectrum: write a PNG plot.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """What a file is: parts, sizes, prediction type, factored layers and what a rank costs."""
    if spectrum or plot is not None or per_layer:
        from spectune.apps.commands.spectrum import inspect_spectrum

        inspect_spectrum(
            model, layers=layers or ["default"], plot=plot, as_json=json, per_layer=per_layer, force=force
        )
        return
    from spectune.apps.commands import weights

    weights.inspect(model, as_json=json)


@app.command(epilog=example("spectune null model.safetensors -o model_null.safetensors"))
def null(
    model: Annotated[Path, typer.Argument(help="A single-file checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """The zero model of a checkpoint, for tools that extract from the difference of two models."""
    from spectune.apps.commands import weights

    weights.null(model, out, force=force, as_json=json)


@app.command(epilog=example("spectune split model.safetensors --rank 64 -o split/"))
def split(
    model: Annotated[Path, typer.Argument(help="The original checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the two files.")] = Path(),
    rank: Annotated[
        int | None, typer.Option(min=1, help="Singular directions kept per layer. Default: 64.")
    ] = None,
    conv_rank: Annotated[
        int | None, typer.Option(min=1, help="Another rank for convolutions larger than 1x1.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of a rank: the share of each layer's energy to keep, 0.9.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead of a rank: the size of the principal's file, 600MB.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Type of the stored factors: {_DTYPES}.")] = "float16",
    residual_dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the residual; float32 makes the pair exact, float64 for an fp32 model. "
            "Default: the model's own."
        ),
    ] = None,
    no_residual: Annotated[bool, typer.Option("--no-residual", help="Write the principal only.")] = False,
    layers: Layers = None,
    svd: Annotated[str, typer.Option(help="auto or exact.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to factor: auto, cpu, cuda or cuda:1.")] = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Split a checkpoint into its principal adapter and the residual model."""
    from spectune.apps.arguments import parse_ranks
    from spectune.apps.commands import weights

    weights.split(
        model,
        out,
        ranks=parse_ranks(rank, conv_rank, energy, budget),
        store=dtype,
        residual_dtype=residual_dtype,
        with_residual=not no_residual,
        layers=layers or ["default"],
        svd=svd,
        device=device,
        force=force,
        dry_run=dry_run,
        as_json=json,
    )


@app.command(
    epilog=example("spectune verify model.safetensors m.residual.safetensors m.principal-r64.safetensors")
)
def verify(
    model: Annotated[Path, typer.Argument(help="The original checkpoint.")],
    residual: Annotated[Path, typer.Argument(help="The residual model.")],
    principal: Annotated[Path, typer.Argument(help="The principal adapter.")],
    json: Json = False,
) -> None:
    """Prove that residual and principal give the original back; exit code 1 when they do not."""
    from spectune.apps.commands import weights

    if not weights.verify(model, residual, principal, as_json=json):
        raise typer.Exit(1)


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
    from spectune.apps.commands import planning

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
    from spectune.apps.commands import training

    if not training.train(recipe, overrides or [], force=force, dry_run=dry_run, as_json=json):
        raise typer.Exit(130)


@app.command(
    epilog=example("spectune rebuild style.safetensors --base model.safetensors -o tuned.safetensors")
)
def rebuild(
    adapter: Annotated[
        Path, typer.Argument(help="A tuned adapter or a LoRA; a principal with its residual as base.")
    ],
    base: Annotated[Path, typer.Option(help="The original checkpoint, or the residual.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="What to write: x.safetensors, x.safetensors.index.json (shards), or a diffusers folder.",
        ),
    ],
    strength: Annotated[float, typer.Option(help="How strongly the adapter counts.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option(help=f"Type of changed tensors: {_DTYPES}. Default: as they were.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the full checkpoint that an adapter makes of a base."""
    from spectune.apps.commands import weights

    weights.rebuild(adapter, base, out, strength=strength, dtype=dtype, force=force, as_json=json)


@app.command(
    epilog=example("spectune export style.safetensors --base model.safetensors -o style_lora.safetensors")
)
def export(
    adapter: Annotated[Path, typer.Argument(help="A tuned adapter.")],
    base: Annotated[Path, typer.Option(help="The checkpoint it was trained from.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Truncate to this rank. Default: twice the trained rank, exact.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="lora (for the original) or principal (takes the principal's place beside the residual)."
        ),
    ] = "lora",
    dtype: Annotated[str, typer.Option(help=f"Type of the stored factors: {_DTYPES}.")] = "float16",
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a tuned adapter into a plain LoRA that loads everywhere."""
    from spectune.apps.commands import weights

    weights.export(adapter, base, out, rank=rank, form=form, store=dtype, force=force, as_json=json)


Captions = Annotated[
    list[str] | None, typer.Option("-c", "--caption", help="What to draw; may be given several times.")
]
CaptionFile = Annotated[Path | None, typer.Option("--captions", help="A text file with a caption a line.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; each further one takes the next.")]
SizePx = Annotated[str, typer.Option("--size", help="Pixels: 1024 or 1216x832.")]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")]
Cfg = Annotated[float, typer.Option(help="Guidance scale; 1 turns it off.")]
Sampler = Annotated[str, typer.Option(help="eps, v: euler, euler_a, ddim, dpmpp_2m; flow: euler, heun.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")]
Negative = Annotated[str, typer.Option(help="Negative prompt.")]
PredictionName = Annotated[
    str | None, typer.Option("--prediction", help="eps, v or flow, where the file does not say.")
]
FlowShift = Annotated[float | None, typer.Option(help="Shift of flow sampling, where the file does not say.")]
VaePath = Annotated[
    Path | None,
    typer.Option("--vae", help="Another autoencoder: a .safetensors file or a diffusers folder."),
]
VaeName = Annotated[
    str | None,
    typer.Option(
        help="How its latents are scaled, by name: sdxl, eq-kblueleaf, eq-anzhc. "
        "Default: as in the training, else as its own files say."
    ),
]


@app.command(
    epilog=example('spectune sample model.safetensors style.safetensors:0.8 -c "a red fox" -o pictures/')
)
def sample(
    model: Annotated[Path, typer.Argument(help="A checkpoint, or a residual with its principal as adapter.")],
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Adapters, each FILE or FILE:STRENGTH.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("pictures"),
    caption: Captions = None,
    captions: CaptionFile = None,
    seed: Seed = 0,
    size: SizePx = "1024",
    steps: Steps = 25,
    cfg: Cfg = 5.0,
    sampler: Sampler = "euler",
    negative: Negative = "",
    batch: Batch = 4,
    prediction: PredictionName = None,
    flow_shift: FlowShift = None,
    vae: VaePath = None,
    vae_name: VaeName = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write all pictures with their captions on one sheet.")
    ] = None,
    force: Force = False,
) -> None:
    """Draw pictures with a checkpoint and any adapters on top of it."""
    from spectune.apps.arguments import ModelSpec, parse_weighted, read_captions
    from spectune.apps.commands import drawing

    spec = ModelSpec(model, tuple(parse_weighted(word) for word in adapters or []))
    settings = drawing.settings(
        size=size, steps=steps, cfg=cfg, sampler=sampler, negative=negative, batch=batch
    )
    overrule = drawing.overrule(prediction=prediction, flow_shift=flow_shift, vae=vae, vae_name=vae_name)
    rows = read_captions(caption or [], captions)
    drawing.sample(spec, rows, seed, settings, overrule, out, sheet=sheet, force=force)


@app.command(
    epilog=example(
        'spectune compare base.safetensors base.safetensors+style.safetensors -c "a cat" -o sheet.png'
    )
)
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Models (FILE or FILE+ADAPTER:STRENGTH+...) or picture folders.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The contact sheet to write.")] = Path(
        "compare.png"
    ),
    caption: Captions = None,
    captions: CaptionFile = None,
    seed: Seed = 0,
    size: SizePx = "1024",
    steps: Steps = 25,
    cfg: Cfg = 5.0,
    sampler: Sampler = "euler",
    negative: Negative = "",
    batch: Batch = 4,
    prediction: PredictionName = None,
    flow_shift: FlowShift = None,
    vae: VaePath = None,
    vae_name: VaeName = None,
    cell: Annotated[int, typer.Option(min=32, help="Width of a picture on the sheet, in pixels.")] = 256,
    force: Force = False,
    json: Json = False,
) -> None:
    """Draw the same captions and seeds with several models: one contact sheet, PSNR against the first."""
    from spectune.apps.commands import drawing

    settings = drawing.settings(
        size=size, steps=steps, cfg=cfg, sampler=sampler, negative=negative, batch=batch
    )
    overrule = drawing.overrule(prediction=prediction, flow_shift=flow_shift, vae=vae, vae_name=vae_name)
    drawing.compare(
        models,
        caption or [],
        captions,
        seed,
        settings,
        overrule,
        out,
        cell_px=cell,
        force=force,
        as_json=json,
    )


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
    from spectune.apps.commands import importing

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
    from spectune.apps.demo import run_demo

    run_demo(out, steps=steps)


def _version(wanted: bool) -> None:
    if wanted:
        from spectune.weights.provenance import spectune_version

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
