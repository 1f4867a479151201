"""Flow Sampling From File: set the prediction type, the shift and the latents that a file declares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import PredictionName, Provenance
from spectune.files.source import declared_prediction, declared_zero_snr

from .library import library
from .places import listed_of_both, path_of_both, stamp
from .sampling import sampled_as, with_discrete, with_flow, with_latents

AUTO = "auto"


@dataclass(frozen=True)
class DeclaredSampling:
    """The prediction type, shift, SNR setting and latents that a file declares."""

    label: str
    prediction: PredictionName | None
    shift: float | None
    zero_snr: bool
    provenance: Provenance  # scale and shift of the latents


class SpectuneSampling:
    """Set flow or v prediction and the latents if a file declares them. Leave eps unchanged."""

    CATEGORY = "spectune"
    DESCRIPTION = (
        "Sets the prediction type that a file declares: eps, v, or flow with its shift. Also sets the "
        "channels, scale and shift of its latents if they are not SDXL's."
    )
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "sampling")
    FUNCTION = "set"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "file": (listed_of_both(), {"tooltip": "The file that declares the prediction type."}),
            },
            "optional": {
                "prediction": (
                    [AUTO, "eps", "v", "flow"],
                    {"tooltip": "auto: the type that the file declares."},
                ),
                "shift": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.01,
                        "round": False,
                        "tooltip": "Shift of flow. 0: the shift that the file declares.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **others: object) -> str:
        return stamp(lambda: path_of_both(file))

    def set(self, model: Any, file: str, prediction: str = AUTO, shift: float = 0.0) -> tuple[Any, str]:
        with library():
            declared = declared_sampling(path_of_both(file))
            chosen_type = declared.prediction if prediction == AUTO else cast(PredictionName, prediction)
            if chosen_type is None:
                raise InputError(
                    f"{declared.label} does not declare its prediction type",
                    hint="set prediction to the type of the training: eps, v or flow",
                )
            moved, latents = with_latents(model, declared.provenance)
            if chosen_type == "flow":
                sampled, text = _flow(moved, declared, shift)
            else:
                sampled, text = _discrete(moved, chosen_type, zero_snr=declared.zero_snr)
            return sampled, f"{text}; {latents}" if latents else text


def declared_sampling(path: Path) -> DeclaredSampling:
    """Read the declared sampling from the header of a file."""
    with open_checkpoint(path) as source:
        declared = source.provenance
        prediction, zero_snr = declared_prediction(source), declared_zero_snr(source)
        return DeclaredSampling(source.label, prediction, declared.flow_shift, zero_snr, declared)


def _flow(model: Any, declared: DeclaredSampling, shift: float) -> tuple[Any, str]:
    chosen = shift or declared.shift
    if chosen is None:
        raise InputError(
            f"{declared.label} does not declare its flow shift",
            hint="set shift; the guide trains with 2.5; a shift by resolution is sqrt(width * height) / 1024",
        )
    return with_flow(model, chosen), f"flow, shift {chosen:g}"


def _discrete(model: Any, prediction: PredictionName, *, zero_snr: bool) -> tuple[Any, str]:
    name = f"{prediction}, zero terminal SNR" if zero_snr else prediction
    if prediction == "eps" and sampled_as(model) == "eps" and not zero_snr:
        return model, f"{name} (unchanged)"
    return with_discrete(model, prediction, zero_snr=zero_snr), name
