"""Read and set the prediction type that ComfyUI samples a model with: eps, v or flow."""

from __future__ import annotations

from typing import Any

from comfy import model_sampling

from spectune.files.provenance import PredictionName

FLOW_MULTIPLIER = 1000  # the timestep input is 1000 times the noise level, as in training


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


def _with(model: Any, sampling: Any) -> Any:
    copy = model.clone()
    copy.add_object_patch("model_sampling", sampling)
    return copy
