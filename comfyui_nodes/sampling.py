"""What a loaded model is taken to predict: eps, v or flow, told and set."""

from __future__ import annotations

from typing import Any

from comfy import model_sampling

from spectune.files.provenance import PredictionName

FLOW_MULTIPLIER = 1000  # the UNet is fed 1000 times the noise level, as in training


def sampled_as(model: Any) -> PredictionName | None:
    """What a MODEL is sampled as; None for a kind that spectune does not train."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, model_sampling.CONST):
        return "flow"
    # v derives from eps, and others from both: the order counts
    if isinstance(sampling, (model_sampling.EDM, model_sampling.X0)):
        return None
    if isinstance(sampling, model_sampling.V_PREDICTION):
        return "v"
    return "eps" if isinstance(sampling, model_sampling.EPS) else None


def is_set(model: Any) -> bool:
    """Whether a node, and not the checkpoint, says how a MODEL is sampled."""
    return "model_sampling" in model.object_patches


def with_flow(model: Any, shift: float) -> Any:
    """A copy that is sampled as a flow: sigma = shift t / (1 + (shift - 1) t)."""

    class Flow(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
        pass

    sampling = Flow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=FLOW_MULTIPLIER)
    return _with(model, sampling)


def with_discrete(model: Any, prediction: PredictionName, *, zero_snr: bool) -> Any:
    """A copy that is sampled as eps or v on SDXL's schedule, which with `zero_snr` ends in pure noise."""
    kind = model_sampling.V_PREDICTION if prediction == "v" else model_sampling.EPS

    class Discrete(model_sampling.ModelSamplingDiscrete, kind):
        pass

    return _with(model, Discrete(model.model.model_config, zsnr=zero_snr))


def _with(model: Any, sampling: Any) -> Any:
    copy = model.clone()
    copy.add_object_patch("model_sampling", sampling)
    return copy
