"""Output of `convert` and `null`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.checkpoints.ema import EMA_ROOT
from spectune.cli.console import print_hint, print_warning, say
from spectune.cli.report_parts import percent, written
from spectune.errors import counted, quoted, some_of
from spectune.ops.convert import ConvertReport
from spectune.ops.latent_space.records import MovedLatents
from spectune.ops.null import NullReport
from spectune.ops.options.adapter_files import ConvertOptions
from spectune.ops.options.model_files import NullOptions


def as_json(
    result: ConvertReport | NullReport, options: ConvertOptions | NullOptions, seconds: float
) -> dict[str, Any]:
    if isinstance(result, NullReport):
        return {**asdict(result), "seconds": seconds}
    return {**asdict(result), "error": result.error}


def show(result: ConvertReport | NullReport, options: ConvertOptions | NullOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    if isinstance(result, NullReport):
        assert isinstance(options, NullOptions)
        zeros = result.tensors - len(result.kept)
        say(f"{zeros} of {result.tensors} tensors are zero, at the same offsets as in {options.model.name}")
        if result.kept:
            say(f"copied unchanged: {', '.join(result.kept)}")
        return
    if result.latents is not None:
        assert isinstance(options, ConvertOptions)
        _show_move(result, result.latents, options)
        return
    if isinstance(options, ConvertOptions) and options.ema:
        say(f"the moving averages are the UNet; {len(result.dropped)} keys {EMA_ROOT}* are gone")
    elif result.dropped:
        say(f"{len(result.dropped)} keys were dropped: {some_of(result.dropped)}")
    if result.rounded:
        say(
            f"{len(result.rounded)} of {result.count} layers were rounded: relative error "
            f"{percent(result.error)} in total"
        )
    else:
        say(f"{result.count} layers or tensors, none was rounded")


_INITIAL = {
    "zeros": "the first channels kept their weights, further ones have zero weights",
    "copy": "the weights of the old channels repeat",
    "fit": "least squares on pictures",
}


def _show_move(result: ConvertReport, latents: MovedLatents, options: ConvertOptions) -> None:
    """Print what is new in a model in another latent space, and what to do next."""
    say(
        f"the UNet takes latents of {latents.channels} channels instead of {latents.channels_before}; "
        f"conv_in and conv_out are new: {_INITIAL[latents.init]}"
    )
    if latents.error is not None:
        say(
            f"fitted to {counted(latents.pictures, 'picture')}: error of conv_in {latents.first_error:.2f}, "
            f"of the prediction {latents.error:.2f} (copies: {latents.before_error:.2f}), relative squares"
        )
    vae = f"the autoencoder of {latents.vae}" if latents.has_vae else "no autoencoder"
    if latents.vae is None and latents.has_vae:
        vae = "its old autoencoder"
    gone = f"; left out: {counted(len(result.dropped), 'tensor')} of the old autoencoder or of averages"
    say(f"the file has {vae}{gone if result.dropped else ''}")
    print_warning("the model cannot draw before it is trained on the new latents")
    set_vae = "" if latents.has_vae else ", and vae.path to the autoencoder"
    print_hint(
        f'`spectune new {quoted(result.path)} PICTURES` writes a recipe; set model.layers = ["all"] in it, '
        f"which includes conv_in and conv_out{set_vae}"
    )
