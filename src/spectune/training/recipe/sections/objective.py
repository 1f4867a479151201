"""[objective] and [loss]: the target of the network and the cost of its errors."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from spectune.files.provenance import PredictionName
from spectune.training.objective.losses import HUBER_C, HUBER_LOSSES, LOSSES
from spectune.training.objective.weightings import GAMMA_WEIGHTINGS, WEIGHTINGS
from spectune.training.recipe.sections.base import (
    MOST_STEPS,
    Count,
    NotNegative,
    Number,
    OneOf,
    Positive,
    Section,
)

CONVERSION_KEYS = ("start", "teacher", "bridge_steps")
FLOW_KEYS = ("flow_shift", "flow_times", "flow_times_mean", "flow_times_std", *CONVERSION_KEYS)


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
    flow_times: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="Distribution of noise levels before the shift; flow only."
    )
    flow_times_mean: Number = Field(
        default=0.0, description="Mean of the normal distribution of `logit_normal`, in logits."
    )
    flow_times_std: Positive = Field(
        default=1.0, description="Standard deviation of the normal distribution of `logit_normal`."
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
        if given and self.kind not in (None, "flow"):
            raise ValueError(f'`{given[0]}` needs `kind = "flow"`, not "{self.kind}"')
        if isinstance(self.flow_shift, float | int) and not 0 < self.flow_shift < math.inf:
            raise ValueError(f'`flow_shift` is {self.flow_shift}: expected a positive number or "resolution"')
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
        return self
