"""The commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectune.cli.options import Force, Json, app, example

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
    metadata: Annotated[
        bool, typer.Option("--metadata", help="Also write metadata.jsonl: the folder can be trained on.")
    ] = False,
    force: Force = False,
) -> None:
    """Draw pictures with a checkpoint and any adapters on top of it."""
    from spectune.cli.arguments import ModelSpec, parse_weighted, read_captions
    from spectune.cli.commands import drawing

    spec = ModelSpec(model, tuple(parse_weighted(word) for word in adapters or []))
    settings = drawing.settings(
        size=size, steps=steps, cfg=cfg, sampler=sampler, negative=negative, batch=batch
    )
    overrule = drawing.overrule(prediction=prediction, flow_shift=flow_shift, vae=vae, vae_name=vae_name)
    rows = read_captions(caption or [], captions)
    drawing.sample(spec, rows, seed, settings, overrule, out, sheet=sheet, metadata=metadata, force=force)


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
    from spectune.cli.commands import drawing

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
