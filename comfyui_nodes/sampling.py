"""Read and set how ComfyUI samples a model: its prediction type (eps, v or flow) and its latents."""

from __future__ import annotations

from typing import Any

from comfy import latent_formats, model_sampling

from spectune.files.provenance import PredictionName, Provenance
from spectune.sdxl.layout import SDXL, SDXL_VAE_SCALE, SDXL_VAE_SHIFT

FLOW_MULTIPLIER = 1000  # the timestep input is 1000 times the noise level, as in training

_FIRST_WEIGHT = "diffusion_model.input_blocks.0.0.weight"
_INPAINTING_CHANNELS = 9


def sampled_as(model: Any) -> PredictionName | None:
    """Return the prediction type of a MODEL, or None for a type that spectune does not train."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, model_sampling.CONST):
        return "flow"
    # this order, because V_PREDICTION derives from EPS, and other classes derive from both
    if isinstance(sampling, (model_sampling.EDM, model_sampling.X0)):
        return None
    if isinstance(sampling, model_sampling.V_PREDICTION):
        return "v"
    return "eps" if isinstance(sampling, model_sampling.EPS) else None


def is_set(model: Any) -> bool:
    """Return whether a node, not the checkpoint, set the sampling of a MODEL."""
    return "model_sampling" in model.object_patches


def with_flow(model: Any, shift: float) -> Any:
    """Return a copy that is sampled as a flow: sigma = shift t / (1 + (shift - 1) t)."""

    class Flow(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
        pass

    sampling = Flow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=FLOW_MULTIPLIER)
    return _with(model, sampling)


def with_discrete(model: Any, prediction: PredictionName, *, zero_snr: bool) -> Any:
    """Return a copy that is sampled as eps or v, on SDXL's schedule or with zero terminal SNR."""
    kind = model_sampling.V_PREDICTION if prediction == "v" else model_sampling.EPS

    class Discrete(model_sampling.ModelSamplingDiscrete, kind):
        pass

    return _with(model, Discrete(model.model.model_config, zsnr=zero_snr))


def with_latents(model: Any, declared: Provenance) -> tuple[Any, str]:
    """Return a copy of `model` whose latents have the channels, scale and shift of a file, and a description.

    If these are the values of SDXL, the result is `model` itself and an empty text. ComfyUI treats an SDXL
    with more than 4 channels as an inpainting model and adds a mask to its inputs. The copy adds none.
    """
    weight = model.model.state_dict().get(_FIRST_WEIGHT)
    channels = SDXL.unet.in_channels if weight is None else weight.shape[1]
    scale = SDXL_VAE_SCALE if declared.vae_scale is None else declared.vae_scale
    shift = SDXL_VAE_SHIFT if declared.vae_shift is None else declared.vae_shift
    has_usual_channels = channels in (SDXL.unet.in_channels, _INPAINTING_CHANNELS)
    if has_usual_channels and (scale, shift) == (SDXL_VAE_SCALE, SDXL_VAE_SHIFT):
        return model, ""
    # the usual class also has the colors of previews
    base: Any = latent_formats.SDXL if has_usual_channels else latent_formats.LatentFormat

    class Latents(base):
        def process_in(self, latent: Any) -> Any:
            return (latent - shift) * scale

        def process_out(self, latent: Any) -> Any:
            return latent / scale + shift

    latents, copy = Latents(), model.clone()
    if not has_usual_channels:
        latents.latent_channels = channels
        copy.add_object_patch("concat_keys", ())
    copy.add_object_patch("latent_format", latents)
    return copy, f"{latents.latent_channels} latent channels, scale {scale:g}, shift {shift:g}"


def _with(model: Any, sampling: Any) -> Any:
    copy = model.clone()
    copy.add_object_patch("model_sampling", sampling)
    return copy
