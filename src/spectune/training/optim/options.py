"""The options of each optimiser: checked names and ranges, with the defaults of the library it comes from.

Weight decay is 0 everywhere: the deltas start at zero, and decay would pull them back to the base.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Beta = Annotated[float, Field(ge=0, lt=1)]
DividingBeta = Annotated[float, Field(gt=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdamWOptions(Options):
    """Loshchilov and Hutter 2019, arXiv:1711.05101; as in torch."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0


class AdamW8bitOptions(AdamWOptions):
    """Dettmers et al. 2022, arXiv:2110.02861: AdamW with 8-bit moments; as in bitsandbytes."""

    min_8bit_size: int = Field(default=4096, ge=1)  # smaller tensors keep moments in float32


class AdafactorOptions(Options):
    """Shazeer and Stern 2018, arXiv:1804.04235; arguments as in transformers.

    Other defaults than there: `scale_parameter` multiplies a step by the size of what is trained, which is
    zero at first, and `relative_step` leaves no learning rate to the recipe.
    """

    eps: tuple[Positive, Positive] = (1e-30, 1e-3)  # under the square gradient; least size of a parameter
    clip_threshold: Positive = 1.0  # largest root mean square of an update
    decay_rate: float = Field(default=-0.8, lt=0)  # the second moment forgets with 1 - step ** decay_rate
    beta1: Beta | None = None  # of a first moment; None: none is kept
    weight_decay: NotNegative = 0.0
    scale_parameter: bool = False
    relative_step: bool = False  # steps of min(0.01, 1 / sqrt(step))
    warmup_init: bool = False  # ... that begin at 1e-6 * step

    @model_validator(mode="after")
    def _warms_up_its_own_steps(self) -> Self:
        if self.warmup_init and not self.relative_step:
            raise ValueError("`warmup_init` does nothing without `relative_step`")
        return self


class LionOptions(Options):
    """Chen et al. 2023, arXiv:2302.06675; as in lion-pytorch."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: NotNegative = 0.0
    decoupled_weight_decay: bool = False  # the decay of a step does not grow with the learning rate


class DAdaptAdamOptions(Options):
    """Defazio and Mishchenko 2023, arXiv:2301.07733; as in dadaptation."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    decouple: bool = False  # decay as AdamW does
    use_bias_correction: bool = False
    d0: Positive = 1e-6
    growth_rate: float | None = Field(default=None, gt=1)  # of d from step to step, at most; None: any


class ProdigyOptions(Options):
    """Mishchenko and Defazio 2024, arXiv:2306.06101; as in prodigyopt."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    beta3: Beta | None = None  # of the estimate of d; None: the root of the second of `betas`
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    decouple: bool = True  # decay as AdamW does
    use_bias_correction: bool = False
    safeguard_warmup: bool = False  # keeps d from being too large after a warm-up
    d0: Positive = 1e-6
    d_coef: Positive = 1.0
    growth_rate: float | None = Field(default=None, gt=1)  # of d from step to step, at most; None: any
    slice_p: int = Field(default=1, ge=1)  # d is estimated from every p-th number


class AdamWScheduleFreeOptions(Options):
    """Defazio et al. 2024, arXiv:2405.15682; as in schedulefree."""

    betas: tuple[DividingBeta, Beta] = (0.9, 0.999)  # the average is read off by dividing by the first
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    warmup_steps: int = Field(default=0, ge=0)
    r: NotNegative = 0.0  # steps weigh step ** r in the average
    weight_lr_power: NotNegative = 2.0  # ... times the largest rate so far to this power


class ProdigyPlusOptions(Options):
    """Arguments of ProdigyPlusScheduleFree 2.0.1 with its defaults."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    beta3: Beta | None = None
    weight_decay: NotNegative = 0.0
    weight_decay_by_lr: bool = True
    d0: Positive = 1e-6
    d_coef: Positive = 1.0
    d_limiter: bool = True
    prodigy_steps: int = Field(default=0, ge=0)  # the step size is frozen from this step on; 0: never
    schedulefree_c: NotNegative = 0
    eps: Positive | None = 1e-8
    split_groups: bool = True
    split_groups_mean: bool = False
    factored: bool = True
    factored_fp32: bool = True
    use_bias_correction: bool = False
    use_stableadamw: bool = True
    use_schedulefree: bool = True
    use_speed: bool = False
    stochastic_rounding: bool = True
    use_cautious: bool = False
    use_grams: bool = False
    use_adopt: bool = False
    use_orthograd: bool = False
    use_focus: bool = False

    @model_validator(mode="after")
    def _average_can_be_read(self) -> Self:
        if self.use_schedulefree and self.betas[0] == 0:
            raise ValueError("the first of `betas` is 0: schedule-free steps divide by it")
        return self
