"""Flow Sampling From File: a model is sampled as a file says that it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import PredictionName
from spectune.files.source import declared_prediction, declared_zero_snr

from .library import library
from .places import listed_of_both, path_of_both, stamp
from .sampling import sampled_as, with_discrete, with_flow

AUTO = "auto"


@dataclass(frozen=True)
class Told:
    """What a file says about sampling."""

    label: str
    prediction: PredictionName | None
    shift: float | None
    zero_snr: bool


class SpectuneSampling:
    """Sets flow or v-prediction where the metadata of a file ask for it, and leaves eps alone."""

    CATEGORY = "spectune"
    DESCRIPTION = (
        "Samples a model as the metadata of a checkpoint or adapter say: eps, v or flow with its shift."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "sampling")
    FUNCTION = "set"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "file": (listed_of_both(), {"tooltip": "whose metadata say what the model predicts"}),
            },
            "optional": {
                "prediction": ([AUTO, "eps", "v", "flow"], {"tooltip": "auto: as the file says"}),
                "shift": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.01,
                        "round": False,
                        "tooltip": "of flow; 0: as the file says",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **others: object) -> str:
        return stamp(lambda: path_of_both(file))

    def set(self, model: Any, file: str, prediction: str = AUTO, shift: float = 0.0) -> tuple[Any, str]:
        with library():
            told = read_told(path_of_both(file))
            wanted = told.prediction if prediction == AUTO else cast(PredictionName, prediction)
            if wanted is None:
                raise InputError(
                    f"{told.label} does not say what its model predicts",
                    hint="set prediction to eps, v or flow, as the model was trained",
                )
            if wanted == "flow":
                return _flow(model, told, shift)
            return _discrete(model, wanted, zero_snr=told.zero_snr)


def read_told(path: Path) -> Told:
    """What the header of a file says about sampling; no weights are read."""
    with open_checkpoint(path) as source:
        shift = source.provenance.flow_shift
        return Told(source.label, declared_prediction(source), shift, declared_zero_snr(source))


def _flow(model: Any, told: Told, shift: float) -> tuple[Any, str]:
    chosen = shift or told.shift
    if chosen is None:
        raise InputError(
            f"{told.label} does not say with which shift its flow was trained",
            hint="set shift: the guide trains with 2.5; a shift by resolution is sqrt(width * height) / 1024",
        )
    return with_flow(model, chosen), f"flow, shift {chosen:g}"


def _discrete(model: Any, prediction: PredictionName, *, zero_snr: bool) -> tuple[Any, str]:
    what = f"{prediction}, zero terminal SNR" if zero_snr else prediction
    if prediction == "eps" and sampled_as(model) == "eps" and not zero_snr:
        return model, f"{what} (unchanged)"
    return with_discrete(model, prediction, zero_snr=zero_snr), what
