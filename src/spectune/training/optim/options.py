"""The options of each optimizer: names, ranges and help. Defaults are those of the library it comes from.

Only weight decay is 0 everywhere: the deltas start at zero, and decay would pull them back to the base.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spectune.training.recipe.sections.base import LARGEST_FACTOR, MOST_STEPS, NotNegative, Positive

MOST_VALUES = 2**31  # of a tensor

Beta = Annotated[float, Field(ge=0, lt=1)]
DividingBeta = Annotated[float, Field(gt=0, lt=1)]

Betas = Annotated[
    tuple[Beta, Beta], Field(description="Decay rates of the averages of the gradient and of its square.")
]
Epsilon = Annotated[
    Positive, Field(description="Added to the root of the average square, the divisor of a step.")
]
WeightDecay = Annotated[
    NotNegative, Field(description="Pulls the trained tensors towards 0; in the delta form, 0 is the base.")
]
Beta3 = Annotated[
    Beta | None,
    Field(description="Decay rate of the averages that estimate d. None: the root of the second of `betas`."),
]
FirstDistance = Annotated[Positive, Field(description="First estimate of the distance d to the solution.")]
DistanceFactor = Annotated[
    Positive, Field(description="Factor of the estimate of d. Larger values make larger steps.")
]
GrowthRate = Annotated[
    float | None,
    Field(
        gt=1, le=LARGEST_FACTOR, description="Largest growth of d from one step to the next. None: no limit."
    ),
]
Decouple = Annotated[bool, Field(description="Decay weights directly, like AdamW, not through the gradient.")]
BiasCorrection = Annotated[
    bool, Field(description="Correct the averages of the first steps, which start at 0.")
]


class Options(BaseModel):
    """The options of an optimizer. They are frozen and refuse unknown names, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdamWOptions(Options):
    """Loshchilov and Hutter 2019, arXiv:1711.05101; as in torch."""

    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.0


class AdamW8bitOptions(AdamWOptions):
    """AdamW with 8-bit averages, Dettmers et al. 2022, arXiv:2110.02861; as in bitsandbytes."""

    min_8bit_size: int = Field(
        default=4096,
        ge=1,
        le=MOST_VALUES,
        description="Tensors with fewer values keep their averages in float32.",
    )


class AdafactorOptions(Options):
    """Shazeer and Stern 2018, arXiv:1804.04235; arguments as in transformers.

    Two options that transformers turns on are off by default. `scale_parameter` would multiply a step by the
    size of the trained tensors, which start at zero. `relative_step` would replace the
    learning rate.
    """

    eps: tuple[Positive, Positive] = Field(
        default=(1e-30, 1e-3), description="Added to the squared gradient; smallest size of a parameter."
    )
    clip_threshold: Positive = Field(default=1.0, description="Largest root mean square of an update.")
    decay_rate: float = Field(
        default=-0.8, ge=-100, lt=0, description="The average square decays with `1 - step ** decay_rate`."
    )
    beta1: Beta | None = Field(
        default=None, description="Decay rate of an average of the gradient. None: no such average."
    )
    weight_decay: WeightDecay = 0.0
    scale_parameter: bool = Field(
        default=False, description="Multiply steps by the root mean square of the parameter."
    )
    relative_step: bool = Field(default=False, description="Use steps of `min(0.01, 1 / sqrt(step))`.")
    warmup_init: bool = Field(
        default=False, description="Limit the steps of `relative_step` to `1e-6 * step`."
    )

    @model_validator(mode="after")
    def _warmup_needs_relative_step(self) -> Self:
        if self.warmup_init and not self.relative_step:
            raise ValueError("`warmup_init` does nothing without `relative_step`")
        return self


class LionOptions(Options):
    """Chen et al. 2023, arXiv:2302.06675; as in lion-pytorch."""

    betas: Betas = (0.9, 0.99)
    weight_decay: WeightDecay = 0.0
    decoupled_weight_decay: bool = Field(
        default=False, description="Make the decay of a step independent of the learning rate."
    )


class DAdaptAdamOptions(Options):
    """Defazio and Mishchenko 2023, arXiv:2301.07733; as in dadaptation."""

    betas: Betas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.0
    decouple: Decouple = False
    use_bias_correction: BiasCorrection = False
    d0: FirstDistance = 1e-6
    growth_rate: GrowthRate = None


class ProdigyOptions(DAdaptAdamOptions):
    """Mishchenko and Defazio 2024, arXiv:2306.06101; as in prodigyopt."""

    decouple: Decouple = True
    beta3: Beta3 = None
    d_coef: DistanceFactor = 1.0
    safeguard_warmup: bool = Field(
        default=False, description="Keep d from growing too large after a warm-up of the learning rate."
    )
    slice_p: int = Field(
        default=1, ge=1, le=MOST_VALUES, description="Estimate d from every p-th value of a tensor."
    )


class AdamWScheduleFreeOptions(Options):
    """Defazio et al. 2024, arXiv:2405.15682; as in schedulefree."""

    # Computing the average divides by the first of `betas`.
    betas: Annotated[
        tuple[DividingBeta, Beta],
        Field(description="Weight of the average in the steps; decay rate of the average square."),
    ] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.0
    warmup_steps: int = Field(
        default=0,
        ge=0,
        le=MOST_STEPS,
        description="Steps over which the learning rate rises to its full value.",
    )
    r: NotNegative = Field(default=0.0, description="The average weights each step by `step ** r`.")
    weight_lr_power: NotNegative = Field(
        default=2.0,
        description="This weight is multiplied by this power of the largest learning rate so far.",
    )


class ProdigyPlusOptions(Options):
    """The arguments of ProdigyPlusScheduleFree 2.0.1, with its defaults."""

    betas: Betas = (0.9, 0.99)
    beta3: Beta3 = None
    weight_decay: WeightDecay = 0.0
    weight_decay_by_lr: bool = Field(default=True, description="Multiply the decay by the learning rate.")
    d0: FirstDistance = 1e-6
    d_coef: DistanceFactor = 1.0
    d_limiter: bool = Field(default=True, description="Limit the growth of d in each step.")
    prodigy_steps: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="Freeze d after this step and free its memory. 0: never."
    )
    schedulefree_c: NotNegative = Field(
        default=0,
        description="Strength of the averaging (arXiv:2507.09846): larger values average over fewer steps. "
        "0: the original rule.",
    )
    eps: Positive | None = Field(
        default=1e-8,
        description="Added to the root of the average square. None: Adam-atan2, which needs no such value.",
    )
    split_groups: bool = Field(default=True, description="Estimate d for each part of the model separately.")
    split_groups_mean: bool = Field(
        default=False, description="Use the harmonic mean of d for all parts; needs `split_groups`."
    )
    factored: bool = Field(
        default=True, description="Store the average square as a product of rows and columns."
    )
    factored_fp32: bool = Field(default=True, description="Store these factors in float32.")
    use_bias_correction: bool = Field(
        default=False, description="Correct the averages of the first steps, like RAdam; d grows later."
    )
    use_stableadamw: bool = Field(default=True, description="Divide updates by their root mean square.")
    use_schedulefree: bool = Field(
        default=True, description="Average steps. Off: Prodigy with a learning rate schedule."
    )
    use_speed: bool = Field(
        default=False, description="Estimate d from the direction of progress; experimental."
    )
    stochastic_rounding: bool = Field(default=True, description="Round bf16 tensors stochastically.")
    use_cautious: bool = Field(default=False, description="Cautious updates, arXiv:2411.16085; experimental.")
    use_grams: bool = Field(default=False, description="Grams updates, arXiv:2412.17107; experimental.")
    use_adopt: bool = Field(default=False, description="ADOPT, arXiv:2411.02853, in part; experimental.")
    use_orthograd: bool = Field(
        default=False,
        description="Use the gradient orthogonal to the weights, arXiv:2501.04697; experimental.",
    )
    use_focus: bool = Field(
        default=False,
        description="FOCUS, arXiv:2501.12243; experimental, needs `factored = false` and an `eps`.",
    )

    @model_validator(mode="after")
    def _average_is_readable(self) -> Self:
        if self.use_schedulefree and self.betas[0] == 0:
            raise ValueError("the first of `betas` is 0, but schedule-free steps divide by it")
        return self
