"""[optimizer] and [run]: learning rates, length, precision, memory, saving and logging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from spectune.training.optim.kinds import OPTIMIZERS, OptimizerKind, check_options, traits_of
from spectune.training.optim.schedules import SCHEDULES, rate_factor
from spectune.training.recipe.sections.base import (
    LARGEST_SEED,
    LONGEST_NAME,
    MOST_STEPS,
    Count,
    Epochs,
    NotNegative,
    Number,
    OneOf,
    Positive,
    Section,
    Share,
    Steps,
)
from spectune.training.recipe.sections.model import PartName

Precision = Literal["fp32", "bf16", "fp16"]
TrainedPrecision = Literal["fp32", "bf16"]
Offloaded = Literal["text", "vae"]
# The trackers of accelerate.
Tracker = Literal[
    "tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"
]

_PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul"} | _PORTS


class OptimizerSection(Section):
    """The optimizer, its learning rates and their schedule."""

    name: Annotated[str, AfterValidator(OneOf(OPTIMIZERS))] = Field(default="adamw", description="Optimizer.")
    learning_rate: Positive | None = Field(
        default=None, description="Learning rate. None: the default of the optimizer."
    )
    part_learning_rates: dict[PartName, Number] = Field(
        default_factory=dict,
        description="Learning rates of single parts, above 0. They replace `learning_rate` there.",
    )
    schedule: Annotated[str, AfterValidator(OneOf(SCHEDULES))] = Field(
        default="constant", description="Learning rate schedule after the warm-up."
    )
    warmup_steps: int = Field(
        default=0,
        ge=0,
        le=MOST_STEPS,
        description="Steps over which the learning rate rises linearly to its full value.",
    )
    warmup_share: float = Field(
        default=0.0, ge=0, lt=1, description="Like `warmup_steps`, as a share of all steps of the run."
    )
    cycles: Steps = Field(default=1, description="Number of cycles of `cosine_restarts`.")
    power: Positive = Field(default=1.0, description="Exponent of `polynomial`.")
    final_share: Share = Field(
        default=0.0, description="Share of the learning rate at the end of a decaying schedule."
    )
    max_grad_norm: NotNegative = Field(
        default=1.0, description="Gradients are clipped to this total norm; 0 turns clipping off."
    )
    step_in_backward: bool | None = Field(
        default=None,
        description='Step on each tensor in the backward pass and free its gradient, with `rank = "full"`. '
        "None: if the optimizer, `max_grad_norm = 0` and `accumulation = 1` allow it.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the optimizer, listed below for each optimizer."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        traits = self.traits
        if self.warmup_steps and self.warmup_share:
            raise ValueError("set either `warmup_steps` or `warmup_share`")
        if traits.schedule_free and (self.schedule != "constant" or self.warmup_steps or self.warmup_share):
            raise ValueError(f"{self.name} is schedule-free: remove `schedule` and the warm-up")
        if self.cycles != 1 and self.schedule != "cosine_restarts":
            raise ValueError('`cycles` needs `schedule = "cosine_restarts"`')
        if self.power != 1 and self.schedule != "polynomial":
            raise ValueError('`power` needs `schedule = "polynomial"`')
        if self.final_share and self.schedule == "constant":
            raise ValueError("`final_share` needs a schedule that decays")
        for part, rate in self.part_learning_rates.items():
            if not rate > 0:
                raise ValueError(
                    f"the learning rate of {part} is {rate}: expected a positive number; "
                    "to freeze the part, remove it from model.parts"
                )
        fixed = traits.fixed_learning_rate
        rates = [self.learning_rate, *self.part_learning_rates.values()]
        if fixed is not None and any(rate not in (None, fixed) for rate in rates):
            raise ValueError(
                f"{self.name} computes its own step size: remove `learning_rate` or set it to {fixed:g}"
            )
        return self

    @property
    def traits(self) -> OptimizerKind:
        """The traits of the optimizer with these options."""
        return traits_of(self.name, check_options(self.name, self.options))

    def rate_factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate after `step` finished steps of `steps`."""
        return rate_factor(
            self.schedule,
            step,
            steps=steps,
            warmup_steps=self.warmup_steps or int(self.warmup_share * steps),
            cycles=self.cycles,
            power=self.power,
            final_share=self.final_share,
        )


class RunSection(Section):
    """Length, memory, output and logging of a run."""

    name: str = Field(
        pattern=r"^[\w.-]+$",
        max_length=LONGEST_NAME,
        description="Start of the names of all files of the run: letters, digits, `_`, `-` and `.`.",
    )
    output: Path = Field(description="Folder for adapters, previews, logs and states.")
    steps: int | None = Field(
        default=None,
        ge=0,
        le=MOST_STEPS,
        description="Number of optimizer steps. Set either `steps` or `epochs`.",
    )
    epochs: Epochs | None = Field(default=None, description="Number of passes over all images.")
    batch: Count = Field(default=1, description="Images per process and forward pass.")
    accumulation: Count = Field(default=1, description="Forward passes per optimizer step.")
    timeout_minutes: float = Field(
        default=10.0,
        gt=0,
        le=1440,
        description="Time that the processes of a run on several GPUs wait for each other before they end.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Device: auto, cpu, cuda, cuda:1 or mps. `auto` is the GPU if there is one.",
    )
    precision: Precision | None = Field(
        default=None,
        description="Dtype of the frozen model and its activations. `fp16` scales the loss, because small "
        "gradients vanish in it. None: `bf16` for a base of SDXL's size, or `fp16` on a GPU without bf16; "
        "`fp32` for a smaller base. In `fp32`, NVIDIA cards since RTX 30 round the factors of products to "
        "TF32 (10 bits of mantissa) in training steps.",
    )
    trained_precision: TrainedPrecision = Field(
        default="fp32",
        description="Dtype of the trained tensors and their gradients. "
        "`bf16` needs an optimizer that rounds stochastically.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations in the backward pass: less memory, slower steps. "
        "None: on for a base of SDXL's size.",
    )
    compile: bool = Field(default=False, description="Compile the UNet with torch.compile.")
    offload: tuple[Offloaded, ...] = Field(
        default=(),
        description="Frozen networks that stay in main memory during the training. "
        "`text` needs cached captions, `vae` needs cached latents.",
    )
    stream: bool = Field(
        default=False,
        description="Keep the frozen weights of the trained networks in main memory and copy each to the GPU "
        "shortly before its use.",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay per step of a moving average of the deltas, which is saved and sampled instead of "
        "them. None: no average.",
    )
    seed: int = Field(default=1, ge=0, le=LARGEST_SEED, description="Seed of all random choices of the run.")
    save_every_steps: Steps | None = Field(
        default=None,
        description="Optimizer steps between saves of the adapter and the state. The end is always saved.",
    )
    save_every_epochs: Epochs | None = Field(
        default=None, description="Epochs between saves, also in addition to `save_every_steps`."
    )
    save_every_minutes: NotNegative | None = Field(
        default=None,
        description="Save the state if the last save is this many minutes ago; 0 turns this off. "
        "None: 30 for a base of SDXL's size, otherwise 0.",
    )
    keep_last: Steps = Field(
        default=3, description="Number of states to keep. A run resumes from the newest one."
    )
    keep_last_adapters: Steps | None = Field(
        default=None, description="Number of adapters to keep besides the final one. None: all of them."
    )
    validate_every_steps: Steps | None = Field(
        default=None,
        description="Optimizer steps between validations. Validation images are always evaluated before and "
        "after the training.",
    )
    validate_every_epochs: Epochs | None = Field(
        default=None, description="Epochs between validations, also in addition to `validate_every_steps`."
    )
    validation_times: int = Field(
        default=4, ge=1, le=1000, description="Number of noise levels for each validation image."
    )
    preview: Path | None = Field(
        default=None,
        description="Prompts to draw as previews: a .txt file in the format of sd-scripts, .toml or .json. "
        "It is read again before each preview. None: up to six captions of the validation images, or of the "
        "training images.",
    )
    preview_sampler: str = Field(
        default="euler",
        description="Sampler of the previews, unless a prompt names one with `--ss`: `euler`, `euler_a`, "
        "`ddim`, `dpmpp_2m`; for flow `euler`, `heun`.",
    )
    preview_every_steps: Steps | None = Field(
        default=None,
        description="Optimizer steps between previews. If `preview` is set without an interval, one preview "
        "is drawn at the end.",
    )
    preview_every_epochs: Epochs | None = Field(
        default=None, description="Epochs between previews, also in addition to `preview_every_steps`."
    )
    preview_at_start: bool = Field(
        default=False, description="Draw a preview before the first step, in which nothing is trained yet."
    )
    log_every_steps: Steps = Field(
        default=1,
        description="Optimizer steps between log entries. The residual form logs the norms of the change "
        "every 50 steps.",
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard logs.")
    trackers: tuple[Tracker, ...] = Field(
        default=(),
        description="Programs that receive the log in addition to TensorBoard. Each needs its package; some "
        "of them upload the log, the previews and the recipe.",
    )
    resume: bool = Field(
        default=True, description="Resume from the newest state in `output`, if there is one."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either `steps` or `epochs`")
        if self.compile and self.stream:
            raise ValueError("`compile` cannot be combined with `stream`: compiled code needs fixed weights")
        return self

    @property
    def all_trackers(self) -> tuple[Tracker, ...]:
        """TensorBoard, unless it is turned off, and the other trackers."""
        first: tuple[Tracker, ...] = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*first, *self.trackers)))

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if name.startswith("."):
            raise ValueError("`name` must not start with a dot")
        if name.endswith(".") or name.split(".")[0].lower() in _WINDOWS_DEVICES:
            raise ValueError("Windows reserves this name; choose another `name`")
        return name
