"""Find a sampler by the name that another program gives it."""

from __future__ import annotations

from spectune.errors import InputError, did_you_mean
from spectune.model.prediction import Prediction
from spectune.sampling.generate import ALL_SAMPLERS, samplers_of

# The same sampler under another name.
_ALIASES = {"dpmsolver++": "dpmpp_2m", "dpm++_2m": "dpmpp_2m"}
# Samplers of sd-scripts that are not offered, and the offered one that is most like them.
_CLOSEST = {
    "pndm": "ddim",
    "lms": "euler",
    "heun": "euler",
    "dpm_2": "euler",
    "dpm_2_a": "euler_a",
    "dpmsolver": "dpmpp_2m",
    "dpmsingle": "dpmpp_2m",
}


def check_sampler_name(name: str) -> str:
    """Return `name`; raise InputError if neither spectune nor sd-scripts has a sampler of this name."""
    _plain(name)
    return name


def find_sampler(name: str, prediction: Prediction) -> tuple[str, str | None]:
    """Return the sampler for a model, and a note if it is another one than `name` says.

    Raises:
        InputError: The name is unknown.
    """
    plain, offered = _plain(name), samplers_of(prediction)
    if plain in offered:
        return plain, None
    closest = _CLOSEST.get(plain, "euler")
    sampler = closest if closest in offered else "euler"
    return sampler, f"{name} is not offered for this {prediction.name} model: {sampler} is used instead"


def _plain(name: str) -> str:
    plain = name.strip().lower().replace(" ", "_").removeprefix("k_")
    plain = _ALIASES.get(plain, plain)
    if plain not in ALL_SAMPLERS and plain not in _CLOSEST:
        raise InputError(
            f"unknown sampler {name!r}{did_you_mean(plain, (*ALL_SAMPLERS, *_CLOSEST))}",
            hint=f"the samplers are {', '.join(ALL_SAMPLERS)}",
        )
    return plain
