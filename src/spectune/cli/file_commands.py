"""The commands on files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectune.cli.options import DTYPES, DryRun, Force, Json, Layers, app, example

Base = Annotated[
    Path | None, typer.Option(help="The model the adapters are for; needed where it is not of SDXL's size.")
]
Keys = Annotated[
    str,
    typer.Option(
        help="How keys are spelled: kohya (loads everywhere), diffusers (PEFT), comfyui (diffusion_model.)."
    ),
]


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
        from spectune.cli.commands.spectrum import inspect_spectrum

        inspect_spectrum(
            model, layers=layers or ["default"], plot=plot, as_json=json, per_layer=per_layer, force=force
        )
        return
    from spectune.cli.commands import weights

    weights.inspect(model, as_json=json)


@app.command(epilog=example("spectune null model.safetensors -o model_null.safetensors"))
def null(
    model: Annotated[Path, typer.Argument(help="A single-file checkpoint.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    force: Force = False,
    json: Json = False,
) -> None:
    """The zero model of a checkpoint, for tools that extract from the difference of two models."""
    from spectune.cli.commands import weights

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
    dtype: Annotated[str, typer.Option(help=f"Type of the stored factors: {DTYPES}.")] = "float16",
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
    from spectune.cli.commands import weights

    weights.split(
        model,
        out,
        rank=rank,
        conv_rank=conv_rank,
        energy=energy,
        budget=budget,
        dtype=dtype,
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
    from spectune.cli.commands import weights

    if not weights.verify(model, residual, principal, as_json=json):
        raise typer.Exit(1)


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
    strength: Annotated[
        str, typer.Option(help="How strongly the adapter counts: 0.8, or by part, unet=0.8,te=0.5.")
    ] = "1",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of changed tensors: {DTYPES}, fp8, fp8_e5m2. Default: as they were."),
    ] = None,
    cast_all: Annotated[
        bool, typer.Option("--cast-all", help="With --dtype: all tensors of the UNet and the encoders.")
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the full checkpoint that an adapter makes of a base."""
    from spectune.cli.commands import weights

    weights.rebuild(
        adapter, base, out, strength=strength, dtype=dtype, cast_all=cast_all, force=force, as_json=json
    )


@app.command(
    epilog=example("spectune export style.safetensors --base model.safetensors -o style_lora.safetensors")
)
def export(
    source: Annotated[
        Path,
        typer.Argument(help="A tuned adapter, a LoRA, a principal that was trained, or a tuned checkpoint."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    base: Annotated[
        Path | None,
        typer.Option(help="The model it was trained from; a checkpoint's LoRA is its difference from this."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut to this rank. Default: all of an adapter (twice the trained rank), 64 of a checkpoint.",
        ),
    ] = None,
    conv_rank: Annotated[
        int | None, typer.Option(min=1, help="Another rank for convolutions larger than 1x1.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of a rank: the share of each layer's change to keep, 0.99.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Instead of a rank: the size of the file, 150MB.")] = None,
    form: Annotated[
        str,
        typer.Option(
            help="lora (for the original) or principal (takes the principal's place beside the residual)."
        ),
    ] = "lora",
    keys: Keys = "kohya",
    dtype: Annotated[str, typer.Option(help=f"Type of the stored factors: {DTYPES}.")] = "float16",
    principal: Annotated[
        Path | None,
        typer.Option(help="The untouched principal, where SOURCE is that one as another program trained it."),
    ] = None,
    layers: Layers = None,
    device: Annotated[
        str, typer.Option(help="Where to factor the difference of checkpoints: auto, cpu, cuda or cuda:1.")
    ] = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a plain LoRA that loads everywhere: of a tuned adapter, or of two checkpoints."""
    from spectune.cli.commands import weights

    weights.export(
        source,
        out,
        base=base,
        rank=rank,
        conv_rank=conv_rank,
        energy=energy,
        size=size,
        form=form,
        keys=keys,
        dtype=dtype,
        principal=principal,
        layers=layers,
        device=device,
        force=force,
        as_json=json,
    )


@app.command(
    epilog=example("spectune slice early.safetensors:te late.safetensors:unet:0.8 -o style.safetensors")
)
def slice(
    slices: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE[:TRAIT[:WEIGHT]]...",
            help="Adapters with what to take of each: te, te1, te2, unet, content, style, a block (down.1), "
            "a pattern ('unet.*attn2*') or a name from --traits. Checkpoints with a part each: unet, te, "
            "vae.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    traits: Annotated[
        Path | None,
        typer.Option(help="A JSON file of traits, as of the B-LoRA slicer: whitelist and blacklist by name."),
    ] = None,
    base: Base = None,
    keys: Keys = "kohya",
    dtype: Annotated[
        str | None, typer.Option(help=f"Type of the factors: {DTYPES}. Default: as in the files.")
    ] = None,
    no_overlap: Annotated[
        bool,
        typer.Option("--no-overlap", help="Refuse layers that several slices have, which are summed else."),
    ] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put parts of adapters, or of checkpoints, together: early-stopped encoders, swaps, traits."""
    from spectune.cli.commands import combining

    combining.slice_files(
        slices,
        out,
        traits=traits,
        base=base,
        keys=keys,
        dtype=dtype,
        overlap=not no_overlap,
        force=force,
        as_json=json,
    )


@app.command(epilog=example("spectune convert lora.safetensors --keys diffusers -o lora_peft.safetensors"))
def convert(
    source: Annotated[Path, typer.Argument(help="An adapter in any spelling, or a checkpoint.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="What to write; for a checkpoint x.safetensors, x.safetensors.index.json or a folder.",
        ),
    ],
    keys: Keys = "kohya",
    dtype: Annotated[
        str | None, typer.Option(help=f"Type of the factors: {DTYPES}. Default: their own.")
    ] = None,
    even_alphas: Annotated[
        bool, typer.Option("--even-alphas", help="Put every scale into the factors: alpha = rank.")
    ] = False,
    principal: Annotated[
        Path | None,
        typer.Option(
            help="The untouched principal, where another program trained it: the deltas between are written."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Keys to leave out, as a pattern: '*.diff_b'. May be given several times."),
    ] = None,
    base: Base = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a file in another spelling, type or form, with nothing left out that was not named."""
    from spectune.cli.commands import combining

    combining.convert_file(
        source,
        out,
        keys=keys,
        dtype=dtype,
        even_alphas=even_alphas,
        principal=principal,
        drop=drop or [],
        base=base,
        force=force,
        as_json=json,
    )
