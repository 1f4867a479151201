"""[objective] and [loss]: the target of the network and the cost of its errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from spectune.errors import InputError
from spectune.files.provenance import PredictionName
from spectune.model.noise_levels import DISTRIBUTIONS, make_levels
from spectune.model.prediction import Ddpm, Flow, Timesteps
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.objective.losses import HUBER_C, HUBER_LOSSES, LOSSES
from spectune.training.objective.noising import Pairing
from spectune.training.objective.weightings import GAMMA_WEIGHTINGS, WEIGHTINGS
from spectune.training.recipe.sections.base import (
    MOST_STEPS,
    Count,
    NotNegative,
    Number,
    OneOf,
    Positive,
    Section,
    Share,
)

CONVERSION_KEYS = ("start", "teacher", "bridge_steps")
TIMES_KEYS = {  # the keys of the parameters of each distribution of noise levels
    name: {parameter: f"flow_times_{parameter}" for parameter in distribution.parameters}
    for name, distribution in DISTRIBUTIONS.items()
}
FLOW_KEYS = (
    *("flow_shift", "flow_times", *(key for keys in TIMES_KEYS.values() for key in keys.values())),
    *("flow_times_uniform_share", "flow_times_min", "flow_times_max", "flow_timestep", "flow_pairing"),
    *CONVERSION_KEYS,
)


class ObjectiveSection(Section):
    """The prediction type and the noise levels of the training."""

    kind: Annotated[str, AfterValidator(OneOf(get_args(PredictionName)))] | None = Field(
        default=None, description="Prediction type. None: the type that the base declares, else `eps`."
    )
    flow_shift: Number | Literal["resolution"] | None = Field(
        default=None,
        description="Shift of noise levels, above 0; flow only. `resolution`: computed from the image area. "
        "None: the shift that a flow base declares, else 1.",
    )
    flow_times: Annotated[str, AfterValidator(OneOf(DISTRIBUTIONS))] = Field(
        default="uniform", description="Distribution of noise levels before the shift; flow only."
    )
    flow_times_mean: Number = Field(
        default=0.0, description="Mean of the normal distribution of `logit_normal`, in logits."
    )
    flow_times_std: Positive = Field(
        default=1.0, description="Standard deviation of the normal distribution of `logit_normal`."
    )
    flow_times_alpha: Positive = Field(
        default=1.0, description="Exponent of the noise level in the density of `beta`, plus 1."
    )
    flow_times_beta: Positive = Field(
        default=1.0, description="Exponent of 1 minus the noise level in the density of `beta`, plus 1."
    )
    flow_times_uniform_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of noise levels that are uniform before the shift. The others follow "
        "`flow_times`.",
    )
    flow_times_min: Share = Field(default=0.0, description="Lowest noise level, after the shift; flow only.")
    flow_times_max: Share = Field(default=1.0, description="Highest noise level, after the shift; flow only.")
    flow_timestep: Timesteps = Field(
        default="continuous",
        description="Timestep input of the UNet in training: 1000 times the noise level, or the `integer` "
        "below it; flow only.",
    )
    flow_pairing: Pairing = Field(
        default="random",
        description="`optimal_transport`: assign the noises of a batch to its images by the smallest sum of "
        "squared distances; flow only.",
    )
    read_through: Literal["direct", "bridge"] = Field(
        default="direct",
        description="`bridge`: train an eps or v model with the loss of flow and the `flow_` keys, by exact "
        "algebra. The file stays an eps or v model.",
    )
    start: Literal["raw", "warm"] = Field(
        default="raw",
        description="`warm`: before the training, refit the layers of an EPS base that depend on the noise "
        "level; flow only.",
    )
    warm_images: Count = Field(default=256, description="Number of images that the warm start is fitted on.")
    teacher: Literal["none", "eps"] = Field(
        default="none",
        description="`eps`: train on the velocity of the EPS base, not on that of the images; flow only.",
    )
    bridge_steps: int = Field(
        default=0,
        ge=0,
        le=MOST_STEPS,
        description="Steps over which the prediction of an EPS base moves from EPS to velocity; flow only.",
    )
    zero_terminal_snr: bool | None = Field(
        default=None,
        description="Rescale the noise schedule so that it ends in pure noise; eps and v only. "
        "None: as the base declares.",
    )
    noise_offset: NotNegative = Field(
        default=0.0, description="Standard deviation of an offset of each channel's noise."
    )
    input_perturbation: NotNegative = Field(
        default=0.0,
        description="Standard deviation of noise that is added to the input only; eps and v only.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = sorted(key for key in self.model_fields_set.intersection(FLOW_KEYS) if self.differs(key))
        if self.read_through == "bridge":
            self._check_bridge(given)
        elif given and self.kind not in (None, "flow"):
            raise ValueError(f'`{given[0]}` needs `kind = "flow"`, not "{self.kind}"')
        if isinstance(self.flow_shift, float | int) and not 0 < self.flow_shift < math.inf:
            raise ValueError(f'`flow_shift` is {self.flow_shift}: expected a positive number or "resolution"')
        self._check_times()
        if self.start == "warm" and self.bridge_steps:
            raise ValueError(
                '`bridge_steps` needs the unchanged base, but `start = "warm"` refits it: set only one'
            )
        if self.start != "warm" and self.differs("warm_images"):
            raise ValueError('`warm_images` does nothing without `start = "warm"`')
        if self.kind == "flow" and self.zero_terminal_snr:
            raise ValueError("`zero_terminal_snr` is for eps and v only: flow always ends in pure noise")
        if self.kind == "flow" and self.input_perturbation:
            raise ValueError("`input_perturbation` is for eps and v only")
        return self

    def _check_bridge(self, flow_keys: Iterable[str]) -> None:
        """Raise ValueError for keys that do not fit `read_through = "bridge"`."""
        if self.kind == "flow":
            raise ValueError('`read_through = "bridge"` is for eps and v: a flow model needs no bridge')
        for key in flow_keys:
            if key in CONVERSION_KEYS:
                raise ValueError(
                    f'`{key}` converts the model to flow, but `read_through = "bridge"` keeps its type'
                )
        if self.differs("flow_timestep"):
            raise ValueError('`flow_timestep` does nothing with `read_through = "bridge"`')
        if self.input_perturbation:
            raise ValueError('`input_perturbation` is not for flow, and not for `read_through = "bridge"`')
        if self.kind == "eps" and self.zero_terminal_snr:
            raise ValueError(
                '`read_through = "bridge"` with eps needs a schedule without zero terminal SNR: at its '
                "end, eps does not determine the velocity"
            )
        if self.zero_terminal_snr is None:
            return  # the base decides; the complete recipe is checked again
        lowest, highest = self._covered
        for key, value in (("flow_times_min", self.flow_times_min), ("flow_times_max", self.flow_times_max)):
            if self.differs(key) and not lowest <= value <= highest:
                raise ValueError(
                    f"`{key}` is {value:g}: the noise schedule of the model covers {lowest:.4f} to "
                    f"{highest:.4f}"
                )

    @property
    def _covered(self) -> tuple[float, float]:
        """The noise levels that the loss may use: with the bridge, those of the model's schedule."""
        if self.read_through == "direct":
            return 0.0, 1.0
        bridge = Bridge(Ddpm("v", bool(self.zero_terminal_snr)))  # eps and v have the same levels
        return bridge.lowest, bridge.highest

    def _check_times(self) -> None:
        for name, keys in TIMES_KEYS.items():
            given = [key for key in keys.values() if self.differs(key)]
            if given and self.flow_times != name:
                raise ValueError(f'`{given[0]}` does nothing without `flow_times = "{name}"`')
        if self.flow_times == "beta" and not (
            self.differs("flow_times_alpha") or self.differs("flow_times_beta")
        ):
            raise ValueError(
                '`flow_times = "beta"` needs `flow_times_alpha` or `flow_times_beta`: with 1 and 1 it is '
                '"uniform"'
            )
        if self.flow_times == "uniform" and self.flow_times_uniform_share:
            raise ValueError('`flow_times_uniform_share` does nothing with `flow_times = "uniform"`')
        if not self.flow_times_min < self.flow_times_max:
            raise ValueError(
                f"`flow_times_min` is {self.flow_times_min:g} and `flow_times_max` {self.flow_times_max:g}: "
                "expected a smaller minimum"
            )
        is_complete = self.read_through == "direct" or self.zero_terminal_snr is not None
        if self.flow_shift != "resolution" and is_complete:
            try:
                self.flow.shares_of_limits()
            except InputError as error:
                raise ValueError(f"{error}: {error.hint}") from error

    @property
    def flow(self) -> Flow:
        """The noise levels of flow, with continuous timesteps."""
        parameters = {name: getattr(self, key) for name, key in TIMES_KEYS[self.flow_times].items()}
        levels = make_levels(self.flow_times, parameters, uniform_share=self.flow_times_uniform_share)
        shift = 1.0 if self.flow_shift is None else self.flow_shift
        lowest, highest = self._covered
        return Flow(
            shift,
            levels,
            lowest=max(self.flow_times_min, lowest),
            highest=min(self.flow_times_max, highest),
        )

    @property
    def has_flow_loss(self) -> bool:
        """Whether the loss is that of flow, for a flow model or through the bridge."""
        return self.kind == "flow" or self.read_through == "bridge"

    @property
    def converts(self) -> bool:
        """Whether the run uses one of CONVERSION_KEYS to convert an EPS base to a flow model."""
        return any(self.differs(key) for key in CONVERSION_KEYS)


class Edm2Section(Section):
    """The learned weighting of noise levels (`weighting = "edm2"`). It has its own optimizer."""

    learning_rate: Positive = Field(default=2e-2, description="Learning rate of the weighting.")
    fourier_features: int = Field(
        default=128,
        ge=2,
        le=65_536,
        description="Number of Fourier features of the noise level that the weighting uses.",
    )
    importance_gamma: Positive = Field(
        default=1.0, description="Signal-to-noise ratio of the noise level with the largest weight."
    )


class LossSection(Section):
    """The loss function and the weight of each noise level."""

    kind: Annotated[str, AfterValidator(OneOf(LOSSES))] = Field(default="mse", description="Loss function.")
    huber_c: Positive | None = Field(
        default=None,
        description="Error at which `huber` and `smooth_l1` change from quadratic to linear. "
        f"None: {HUBER_C}.",
    )
    huber_schedule: Literal["constant", "snr"] = Field(
        default="constant", description="`snr`: `huber_c` depends on the noise level."
    )
    weighting: Annotated[str, AfterValidator(OneOf(WEIGHTINGS))] = Field(
        default="none",
        description="Weighting of noise levels. Flow supports `none` and `edm2` only.",
    )
    min_snr_gamma: Positive | None = Field(
        default=None,
        description="Signal-to-noise ratio gamma of `min_snr` and `soft_min_snr`. None: 5, as in the paper.",
    )
    contrastive_weight: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Weight of the loss against the target of another image of the batch, which is "
        "subtracted; flow only. 0.05 in the paper.",
    )
    scale_v_like_noise: bool = Field(
        default=False, description="Weight the loss of a v model like the eps loss of the same network."
    )
    edm2: Edm2Section = Edm2Section()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_snr_gamma is not None and self.weighting not in GAMMA_WEIGHTINGS:
            raise ValueError('`min_snr_gamma` does nothing without `weighting = "min_snr"` or "soft_min_snr"')
        if self.kind not in HUBER_LOSSES and (self.huber_c is not None or self.differs("huber_schedule")):
            raise ValueError(f"`huber_c` and `huber_schedule` need `kind` {' or '.join(HUBER_LOSSES)}")
        if self.weighting != "edm2" and self.differs("edm2"):
            raise ValueError('[loss.edm2] does nothing without `weighting = "edm2"`')
        if self.weighting == "edm2" and self.contrastive_weight:
            raise ValueError(
                '`contrastive_weight` makes costs negative, but `weighting = "edm2"` learns their logarithm: '
                "set only one"
            )
        return self
