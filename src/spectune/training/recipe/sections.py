"""The sections of a recipe: typed, frozen, with units in the names; unknown keys are errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from spectune.errors import did_you_mean
from spectune.files.provenance import FrameKind
from spectune.model.vae_settings import KNOWN_VAES
from spectune.training.objective.losses import LOSSES, SCHEDULED_LOSSES
from spectune.training.objective.target import OBJECTIVES
from spectune.training.objective.weightings import GAMMA_WEIGHTINGS, WEIGHTINGS
from spectune.training.optim import OPTIMIZERS, SCHEDULES, Traits, check_options, traits_of

PartName = Literal["unet", "te1", "te2"]
ALL_PARTS: tuple[PartName, ...] = get_args(PartName)
Quantization = Literal["none", "nf4", "int8"]
MaskSource = Literal["none", "alpha", "file"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def known(word: str, names: Mapping[str, Any]) -> str:
    """`word`, if it is one of `names`; raises ValueError with a suggestion."""
    if word not in names:
        raise ValueError(f"`{word}` is none of {', '.join(names)}{did_you_mean(word, names)}")
    return word


class ModelSection(Section):
    """What is trained: a base checkpoint and the frame of its principal spectrum."""

    base: Path | None = None  # the original checkpoint, or a residual that `spectune split` wrote
    residual: Path | None = None  # instead of `base`: a residual by any tool, such as the guide's diff model
    principal: Path | None = None  # principal adapter, by `spectune split` or another tool
    rank: int | None = Field(default=None, ge=1)  # instead of `principal`: split the base on the fly
    conv_rank: int | None = Field(default=None, ge=1)  # of 3x3 convolutions; None: `rank`
    layers: tuple[str, ...] = ("default",)  # that `rank` is for, in the words of `spectune split --layers`
    frame: FrameKind = "principal"  # the directions beside which `rank` trains
    frame_norm: float | None = Field(default=None, gt=0)  # of each direction; None: as the frame has them
    frame_batches: int = Field(default=4, ge=1)  # that gradient and data frames look at
    form: Literal["delta", "residual"] = "delta"
    parts: tuple[PartName, ...] = ALL_PARTS
    quantize: Quantization = "none"  # of the frozen linear layers; the residual form only
    dropout_probability: float = Field(default=0.0, ge=0, lt=1)  # of the directions of a change

    @model_validator(mode="after")
    def _one_frame(self) -> Self:
        if (self.base is None) == (self.residual is None):
            raise ValueError("give either `base` (the original checkpoint) or `residual`")
        if (self.principal is None) == (self.rank is None):
            raise ValueError("give either `principal` (a file made by `spectune split`) or `rank`")
        if self.residual is not None and (self.principal is None or self.form != "residual"):
            raise ValueError('`residual` needs its `principal` and form = "residual"')
        if self.conv_rank is not None and self.rank is None:
            raise ValueError("`conv_rank` belongs to `rank`: a principal file has its ranks already")
        self._check_frame()
        if self.quantize != "none" and self.form != "residual":
            raise ValueError(
                '`quantize` needs form = "residual": the residual loses least when it is rounded'
            )
        if not self.parts:
            raise ValueError(f"`parts` is empty; name some of {', '.join(ALL_PARTS)}")
        return self

    def _check_frame(self) -> None:
        given = {"frame": "principal", "frame_norm": None, "layers": ("default",)}
        for key, usual in given.items():
            if self.rank is None and getattr(self, key) != usual:
                raise ValueError(
                    f"`{key}` needs `rank`: a principal file brings its own frame; give `rank` instead of it"
                )
        if self.aligned and self.form != "delta":
            raise ValueError(
                f'`frame` = "{self.frame}" needs form = "delta": it is found beside the original weights, '
                "which the residual form replaces before"
            )
        if not self.aligned and self.frame_batches != type(self).model_fields["frame_batches"].default:
            raise ValueError('`frame_batches` does nothing without frame = "gradient" or "data"')

    @property
    def aligned(self) -> bool:
        """Whether the frame is found on the first batches of the run."""
        return self.frame in ("gradient", "data")

    @property
    def checkpoint(self) -> Path:
        """The file that the model is built from."""
        path = self.base or self.residual
        assert path is not None
        return path


class VaeSection(Section):
    """Which autoencoder makes latents of pictures, and how they are scaled: latents = (z - shift) * scale."""

    path: Path | None = None  # a file or a diffusers folder; None: the checkpoint's own
    name: str | None = None  # a known one, which fixes scale, shift and padding
    scale: float | None = Field(default=None, gt=0)
    shift: float | None = None
    padding: Literal["zeros", "reflect"] | None = None  # of its convolutions

    @model_validator(mode="after")
    def _known_name(self) -> Self:
        if self.name is not None:
            known(self.name, KNOWN_VAES)
            if self.scale is not None or self.shift is not None or self.padding is not None:
                raise ValueError(
                    f'`name` = "{self.name}" fixes scale, shift and padding: give one or the other'
                )
        return self


class BucketSection(Section):
    """Aspect buckets: sizes of about `resolution_px`^2 pixels with sides from min to max in steps."""

    enabled: bool = False
    min_px: int = Field(default=256, ge=8)
    max_px: int = Field(default=1024, ge=8)
    step_px: int = Field(default=64, ge=8)


class CaptionSection(Section):
    """How the first line of a caption file, or an entry of a sidecar, becomes a caption."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    sidecar: str = "metadata.jsonl"  # lines {"file_name": ..., "text": ...} in a folder of images; "": none
    shuffle: bool = False  # order of the comma separated tags
    keep_tokens: int = Field(default=0, ge=0)  # leading tags that keep their place and are never dropped
    dropout_probability: float = Field(default=0.0, ge=0, le=1)  # caption -> ""
    tag_dropout_probability: float = Field(default=0.0, ge=0, le=1)  # of each tag by itself

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for extension in self.extensions:
            if not extension.startswith(".") or extension == ".":
                raise ValueError(f"`extensions` begin with a dot, such as `.txt`; got `{extension}`")
        if self.keep_tokens and not self.varies:
            raise ValueError(
                "`keep_tokens` does nothing without `shuffle`; turn that on or leave it out"
                " (it also guards against `tag_dropout_probability`)"
            )
        return self

    @property
    def varies(self) -> bool:
        """Whether one picture has other captions than its own and the empty one."""
        return self.shuffle or self.tag_dropout_probability > 0


class ImageSetSection(Section):
    """One folder of images with settings of its own."""

    path: Path  # holds the images themselves
    repeats: int = Field(default=1, ge=1)
    caption: str = ""  # of images without a caption
    loss_weight: float = Field(default=1.0, gt=0)
    regularisation: bool = False  # a class the model should keep: weighted by data.regularisation_weight too


class DataSection(Section):
    folders: tuple[Path, ...] = ()  # parents of `N_name` folders, N = repeats
    sets: tuple[ImageSetSection, ...] = ()  # folders of images, each with its own settings
    regularisation_folders: tuple[Path, ...] = ()  # as `folders`, of a class that the model should keep
    regularisation_weight: float = Field(default=1.0, gt=0)  # of the loss of regularisation images
    resolution_px: int = Field(default=1024, ge=16)
    bucket: BucketSection = BucketSection()
    caption: CaptionSection = CaptionSection()
    flip_probability: float = Field(default=0.0, ge=0, le=1)
    random_crop: bool = False
    color_probability: float = Field(default=0.0, ge=0, le=1)  # a small change of hue, saturation and gamma
    mask: MaskSource = "none"  # where the loss counts: the alpha channel, or a grey image beside the picture
    mask_suffix: str = ".mask.png"  # cat.webp has its mask in cat.mask.png
    cache_latents: bool | None = None  # None: where pictures are fixed
    cache_variants: int = Field(default=1, ge=1)  # crops and colours of each picture in the cache
    cache_folder: Path | None = None  # where cached latents stay between runs; None: memory only
    cache_text: bool | None = None  # None: where encoders are frozen and captions fixed
    validation_folder: Path | None = None  # held-out images, in `N_name` folders or directly
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.folders and not self.sets:
            raise ValueError("no images: give `folders` (parents of `N_name` folders) or [[data.sets]]")
        if self.varies and self.cache_latents and self.cache_variants == 1:
            raise ValueError(
                "`cache_latents` needs fixed crops and colours; cache several with `cache_variants`, "
                "turn `random_crop` and `color_probability` off or leave the cache to itself"
            )
        if not self.caches_latents and (self.cache_variants > 1 or self.cache_folder is not None):
            raise ValueError(
                "`cache_variants` and `cache_folder` do nothing where latents are not cached: turn "
                "`cache_latents` on, with several `cache_variants` where crops or colours vary"
            )
        if not self.mask_suffix:
            raise ValueError("`mask_suffix` is empty: every file would be a mask")
        if self.cache_variants > 1 and not self.varies:
            raise ValueError("`cache_variants` does nothing where crops and colours are fixed")
        if self.cache_text and self.caption.varies:
            raise ValueError("`cache_text` needs fixed captions; turn `caption.shuffle` and tag dropout off")
        sides = self.bucket
        if sides.enabled and not sides.min_px <= self.resolution_px <= sides.max_px:
            raise ValueError(
                f"`resolution_px` {self.resolution_px} lies outside the sides of the buckets, "
                f"{sides.min_px}..{sides.max_px}"
            )
        if sides.enabled and sides.step_px > self.resolution_px:
            raise ValueError(
                f"`bucket.step_px` {sides.step_px} is larger than `resolution_px` {self.resolution_px}: "
                "no bucket fits"
            )
        return self

    @property
    def varies(self) -> bool:
        """Whether the pixels of one picture differ from draw to draw, mirroring aside."""
        return self.random_crop or self.color_probability > 0

    @property
    def caches_latents(self) -> bool:
        """Whether pictures are encoded once, before the training."""
        if self.cache_latents is not None:
            return self.cache_latents
        return not self.varies or self.cache_variants > 1


FlowTimes = Literal["uniform", "logit_normal"]
CONVERSION_KEYS = ("start", "teacher", "bridge_steps")


class ObjectiveSection(Section):
    """What the network learns to answer, and at which noise levels; `flow_*` keys are for flow only."""

    kind: str | None = None  # None: what the base declares, else eps
    flow_shift: float | Literal["resolution"] | None = None  # None: what a flow base declares, else 1
    flow_times: FlowTimes = "uniform"
    flow_times_mean: float = 0.0  # of the normal distribution under the logistic function
    flow_times_std: float = Field(default=1.0, gt=0)
    start: Literal["raw", "warm"] = "raw"  # warm: refit the layers of an EPS base that know of noise levels
    warm_images: int = Field(default=256, ge=1)  # that the warm start is fitted on
    teacher: Literal["none", "eps"] = "none"  # eps: learn the velocity of the base instead of the pictures'
    bridge_steps: int = Field(default=0, ge=0)  # for which an EPS base is read as what it is, less and less
    zero_terminal_snr: bool | None = None  # None: what the base declares; eps and v only
    noise_offset: float = Field(default=0.0, ge=0)  # of the mean of each channel's noise
    input_perturbation: float = Field(
        default=0.0, ge=0
    )  # more noise in what the network sees, eps and v only

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind is not None:
            known(self.kind, OBJECTIVES)
        flow_keys = {"flow_shift", "flow_times", "flow_times_mean", "flow_times_std", *CONVERSION_KEYS}
        given = sorted(key for key in flow_keys & self.model_fields_set if self._says_something(key))
        if given and self.kind not in (None, "flow"):
            raise ValueError(f'`{given[0]}` belongs to kind = "flow", not to "{self.kind}"')
        if isinstance(self.flow_shift, float | int) and not 0 < self.flow_shift < math.inf:
            raise ValueError(f'`flow_shift` is {self.flow_shift}: expected a positive number or "resolution"')
        if self.start == "warm" and self.bridge_steps:
            raise ValueError(
                '`bridge_steps` begins with the base as it is, start = "warm" with a refit one: give one'
            )
        if self.start != "warm" and self._says_something("warm_images"):
            raise ValueError('`warm_images` does nothing without start = "warm"')
        if self.kind == "flow" and self.zero_terminal_snr:
            raise ValueError("`zero_terminal_snr` is for eps and v: flow reaches pure noise anyway")
        if self.kind == "flow" and self.input_perturbation:
            raise ValueError("`input_perturbation` is for eps and v")
        return self

    @property
    def converts(self) -> bool:
        """Whether the base is an EPS model that the run helps to become a flow model."""
        return any(self._says_something(key) for key in CONVERSION_KEYS)

    def _says_something(self, key: str) -> bool:
        return getattr(self, key) != type(self).model_fields[key].default


class Edm2Section(Section):
    """The learned weighting of noise levels (`weighting = "edm2"`), which has an optimiser of its own."""

    learning_rate: float = Field(default=2e-2, gt=0)
    fourier_features: int = Field(default=128, ge=2)
    importance_gamma: float = Field(default=1.0, gt=0)


class LossSection(Section):
    kind: str = "mse"
    huber_c: float | None = Field(default=None, gt=0)  # None: 0.1; where the loss turns from square to linear
    huber_schedule: Literal["constant", "snr"] = "constant"
    weighting: str = "none"
    min_snr_gamma: float | None = Field(default=None, gt=0)  # None: 5, as in the paper
    scale_v_like_noise: bool = False  # weigh a v loss as the eps loss of the same network
    edm2: Edm2Section = Edm2Section()

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        known(self.kind, LOSSES)
        known(self.weighting, WEIGHTINGS)
        if self.min_snr_gamma is not None and self.weighting not in GAMMA_WEIGHTINGS:
            raise ValueError('`min_snr_gamma` does nothing without weighting = "min_snr" or "soft_min_snr"')
        if self.kind not in SCHEDULED_LOSSES and (
            self.huber_c is not None or self.huber_schedule != "constant"
        ):
            raise ValueError(f"`huber_c` and `huber_schedule` are for {' and '.join(SCHEDULED_LOSSES)}")
        if self.weighting != "edm2" and self.edm2 != Edm2Section():
            raise ValueError('[loss.edm2] does nothing without weighting = "edm2"')
        return self


class OptimizerSection(Section):
    name: str = "adamw"
    learning_rate: float | None = Field(default=None, gt=0)  # None: the optimiser's own default
    part_learning_rates: dict[PartName, float] = Field(default_factory=dict)  # instead, for some parts
    schedule: str = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    cycles: int = Field(default=1, ge=1)  # of cosine_restarts
    power: float = Field(default=1.0, gt=0)  # of polynomial
    final_share: float = Field(
        default=0.0, ge=0, le=1
    )  # of the learning rate, that decaying schedules end at
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: gradients are not clipped
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        known(self.name, OPTIMIZERS)
        known(self.schedule, SCHEDULES)
        traits = traits_of(self.name, check_options(self.name, self.options))
        if traits.schedule_free and (self.schedule != "constant" or self.warmup_steps):
            raise ValueError(f"{self.name} is schedule-free: leave `schedule` and `warmup_steps` out")
        if self.cycles != 1 and self.schedule != "cosine_restarts":
            raise ValueError('`cycles` is for schedule = "cosine_restarts"')
        if self.power != 1 and self.schedule != "polynomial":
            raise ValueError('`power` is for schedule = "polynomial"')
        if self.final_share and self.schedule == "constant":
            raise ValueError("`final_share` is for schedules that decay")
        for part, rate in self.part_learning_rates.items():
            if not rate > 0:
                raise ValueError(
                    f"the learning rate of {part} is {rate}: leave the part out of model.parts to freeze it"
                )
        fixed = traits.fixed_learning_rate
        rates = [self.learning_rate, *self.part_learning_rates.values()]
        if fixed is not None and any(rate not in (None, fixed) for rate in rates):
            raise ValueError(
                f"{self.name} finds its step size itself: leave `learning_rate` out or set it to {fixed:g}"
            )
        return self

    @property
    def traits(self) -> Traits:
        """What the optimiser does with these options."""
        return traits_of(self.name, check_options(self.name, self.options))


class RunSection(Section):
    name: str = Field(pattern=r"^[\w.-]+$")  # stem of the files written
    output: Path  # folder
    steps: int | None = Field(default=None, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)  # images per process and forward pass
    accumulation: int = Field(default=1, ge=1)  # forward passes per optimiser step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen model
    trained_precision: Literal["fp32", "bf16"] = "fp32"  # of the trained tensors and their gradients
    gradient_checkpointing: bool = False
    compile: bool = False  # the UNet with torch.compile
    offload: tuple[Literal["text", "vae"], ...] = ()  # frozen networks that wait in main memory
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # save and sample an average of the deltas
    seed: int = Field(default=1, ge=0)
    save_every_steps: int | None = Field(default=None, ge=1)
    keep_last: int = Field(default=3, ge=1)  # saves that stay on disk
    validate_every_steps: int | None = Field(default=None, ge=1)  # None: before and after only
    validation_times: int = Field(default=4, ge=1)  # noise levels per held-out image
    preview_every_steps: int | None = Field(default=None, ge=1)
    log_every_steps: int = Field(default=1, ge=1)
    tensorboard: bool = True
    resume: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self

    @field_validator("name")
    @classmethod
    def _a_plain_name(cls, name: str) -> str:
        if name.startswith("."):
            raise ValueError("the name starts with a dot")
        return name
