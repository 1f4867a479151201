"""Recognize models that spectune cannot train or draw, and say when a prediction type is only assumed."""

from __future__ import annotations

import re

from spectune.errors import InputError
from spectune.files.provenance import PredictionName
from spectune.files.source import WeightSource, declared_prediction

# Tensors that ComfyUI, Forge and stable-diffusion.cpp recognize EDM models by: Playground v2.5, and CosXL.
_EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# A file's name is no proof. It is used in a warning only.
_NAME_HINTS: tuple[tuple[PredictionName, re.Pattern[str]], ...] = (
    ("v", re.compile(r"v[ _-]?pred", re.IGNORECASE)),
    ("flow", re.compile(r"flow|rectified|(?<![a-z])rf(?![a-z])", re.IGNORECASE)),
)


def edm_markers(source: WeightSource) -> list[str]:
    """Return the names of the tensors that mark an EDM model; empty for any other model."""
    return [name for name in _EDM_MARKERS if name in source.tensors]


def check_prediction(source: WeightSource) -> None:
    """Raise InputError for an EDM model, whose noise levels and input scaling spectune does not have."""
    if markers := edm_markers(source):
        raise InputError(
            f"{source.label} is an EDM model (it has the tensor {markers[0]}): "
            "spectune trains and draws models that predict eps, v or flow",
            hint="commands on files, such as split, rebuild and export, work with it",
        )


def hinted_prediction(name: str) -> PredictionName | None:
    """Return the prediction type that the name of a file suggests, as in `noobai-vpred-1.0`, or None."""
    return next((kind for kind, pattern in _NAME_HINTS if pattern.search(name)), None)


def assumed_prediction(source: WeightSource) -> str | None:
    """Return a warning if the model does not declare its prediction type, else None."""
    if declared_prediction(source) is not None:
        return None
    hinted = hinted_prediction(source.label)
    doubt = f", but its name suggests {hinted}" if hinted else ""
    return f"{source.label} does not declare its prediction type: eps is assumed{doubt}"
