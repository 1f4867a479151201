"""[model] and [vae]: the base, the trained directions, and the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from spectune.files.provenance import FrameKind
from spectune.model.vae.known import KNOWN_VAES
from spectune.model.vae.ways import EncodeWay
from spectune.training.recipe.sections.base import (
    MOST_STEPS,
    Count,
    Number,
    OneOf,
    Positive,
    Rank,
    RankOrFull,
    Section,
    Steps,
)

PartName = Literal["unet", "te1", "te2"]
ALL_PARTS: tuple[PartName, ...] = get_args(PartName)
Quantization = Literal["none", "nf4", "int8"]


class ModelSection(Section):
    """The base checkpoint, and the frame: the directions that are trained."""

    base: Path | None = Field(
        default=None,
        description="The original checkpoint, or a residual that `spectune split` wrote. "
        "Give either `base` or `residual`.",
    )
    residual: Path | None = Field(
        default=None,
        description="A residual that another tool wrote, such as the guide's diff model. "
        'It needs its `principal` and `form = "residual"`.',
    )
    principal: Path | None = Field(
        default=None,
        description="The principal adapter, written by `spectune split` or another tool. "
        "Give one of `principal`, `rank` and `start`.",
    )
    start: Path | None = Field(
        default=None,
        description="A tuned adapter to continue from, with new optimizer states: the result of an earlier "
        "run, or of `spectune export --form tuned`. It contains its frame.",
    )
    rank: RankOrFull | None = Field(
        default=None,
        description='Split the base at this rank when the run starts. `"full"` trains complete tensors '
        "instead: full fine-tuning.",
    )
    conv_rank: Rank | None = Field(
        default=None, description="Rank of 3x3 convolutions. None: the same as `rank`."
    )
    layers: tuple[str, ...] = Field(
        default=("default",),
        description="Layers that `rank` applies to, named as in `spectune split --layers`. With `rank = "
        '"full"`, `default` means every tensor of the parts, also biases and norms; other names mean weights '
        "and biases of these layers.",
    )
    frame: FrameKind = Field(
        default="principal", description="Directions that are trained, if `rank` is set."
    )
    frame_norm: Positive | None = Field(
        default=None,
        description="Euclidean length of each row of A0 and each column of B0. "
        "None: the lengths that the frame defines.",
    )
    scaling: Literal["standard", "rank_stabilized"] = Field(
        default="standard",
        description="Scale of the change, for frames with B0 = 0: 1 at every rank, or sqrt(16 / rank).",
    )
    frame_batches: Count = Field(
        default=4, description="Number of batches that `gradient` and `data` frames are computed from."
    )
    form: Literal["delta", "residual"] = Field(
        default="delta",
        description="`delta` keeps the original weights and trains dA and dB. "
        "`residual` keeps the residual and trains A and B.",
    )
    refresh_every_steps: Steps | None = Field(
        default=None,
        description="Steps after which the change is added to the weights and a new frame is computed, so "
        "that the rank does not limit the whole change. None: never.",
    )
    refresh_warmup_steps: int = Field(
        default=2,
        ge=0,
        le=MOST_STEPS,
        description="Steps after each refresh over which the learning rate rises to its full value.",
    )
    parts: tuple[PartName, ...] = Field(default=ALL_PARTS, description="Parts of the model to train.")
    quantize: Quantization = Field(
        default="none",
        description="Storage of the frozen linear layers. Other values than `none` need "
        '`form = "residual"` and bitsandbytes.',
    )
    dropout_probability: float = Field(
        default=0.0, ge=0, lt=1, description="Probability that a direction of a change is dropped in a step."
    )

    @model_validator(mode="after")
    def _one_frame(self) -> Self:
        if (self.base is None) == (self.residual is None):
            raise ValueError("set either `base` (the original checkpoint) or `residual`")
        if sum(value is not None for value in (self.principal, self.rank, self.start)) != 1:
            raise ValueError(
                "set either `principal` (a file made by `spectune split`), `rank`, or `start` (a tuned "
                "adapter)"
            )
        if self.residual is not None and (self.principal is None or self.form != "residual"):
            raise ValueError('`residual` needs its `principal` and `form = "residual"`')
        if self.conv_rank is not None and self.rank is None:
            raise ValueError("`conv_rank` needs `rank`: a principal file already has its ranks")
        self._check_frame()
        self._check_refresh()
        if self.is_full:
            self._check_full()
        if self.quantize != "none" and self.form != "residual":
            raise ValueError(
                '`quantize` needs `form = "residual"`: quantizing the residual causes the smallest error'
            )
        if not self.parts:
            raise ValueError(f"`parts` is empty: list at least one of {', '.join(ALL_PARTS)}")
        return self

    def _check_frame(self) -> None:
        for key in ("frame", "frame_norm", "scaling", "layers"):
            if self.rank is None and self.differs(key):
                raise ValueError(
                    f"`{key}` needs `rank`, because the file in `principal` or `start` already contains its "
                    "frame: set `rank` instead"
                )
        if self.aligned and self.form != "delta":
            raise ValueError(
                f'`frame = "{self.frame}"` needs `form = "delta"`: it is computed with the original weights, '
                "which the residual form does not keep"
            )
        if self.scaling != "standard" and self.frame not in ("plain", "svd-down"):
            raise ValueError(
                f'`scaling = "{self.scaling}"` needs `frame = "plain"` or "svd-down": with another B0 than '
                "zero, the scale would change the base"
            )
        if not self.aligned and self.differs("frame_batches"):
            raise ValueError('`frame_batches` does nothing without `frame = "gradient"` or "data"')

    def _check_refresh(self) -> None:
        if self.refresh_every_steps is None:
            if self.differs("refresh_warmup_steps"):
                raise ValueError("`refresh_warmup_steps` does nothing without `refresh_every_steps`")
            return
        if self.rank is None:
            raise ValueError(
                "`refresh_every_steps` needs `rank`: it computes new frames, which a file in `principal` or "
                "`start` cannot have"
            )
        if self.form != "delta":
            raise ValueError(
                '`refresh_every_steps` needs `form = "delta"`: the residual form does not keep the weights'
            )
        if self.aligned:
            raise ValueError(
                f'`refresh_every_steps` cannot be combined with `frame = "{self.frame}"`, which is computed '
                "from the first batches: use principal, minor, plain or svd-down"
            )

    def _check_full(self) -> None:
        for key in (
            "refresh_every_steps",
            "conv_rank",
            "frame",
            "frame_norm",
            "scaling",
            "form",
            "quantize",
            "dropout_probability",
        ):
            if self.differs(key):
                raise ValueError(
                    f'`{key}` belongs to factors, and `rank = "full"` trains complete tensors: remove `{key}`'
                )

    @property
    def is_full(self) -> bool:
        """Whether complete tensors are trained."""
        return self.rank == "full"

    @property
    def frame_rank(self) -> int | None:
        """The rank that the run splits the base at."""
        return None if self.rank == "full" else self.rank

    @property
    def aligned(self) -> bool:
        """Whether the frame is computed from the first batches of the run."""
        return self.frame in ("gradient", "data")

    @property
    def uses_weights(self) -> bool:
        """Whether the frame is computed from the weights of the base."""
        return self.frame in ("principal", "minor", "svd-down")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that the model is built from."""
        path = self.base or self.residual
        assert path is not None
        return path


class VaeSection(Section):
    """The autoencoder that encodes images to latents = (z - shift) * scale.

    A value that the recipe does not set comes from the file of the autoencoder, else from the checkpoint.
    Without either, it is that of SDXL.
    """

    path: Path | None = Field(
        default=None, description="A file or a diffusers folder. None: the checkpoint's own autoencoder."
    )
    name: Annotated[str, AfterValidator(OneOf(KNOWN_VAES))] | None = Field(
        default=None, description="A known autoencoder, for its `scale`, `shift`, `padding` and channels."
    )
    scale: Positive | None = Field(default=None, description="Factor of the latents.")
    shift: Number | None = Field(default=None, description="Subtracted from z, before the factor.")
    padding: Literal["zeros", "reflect"] | None = Field(
        default=None, description="Padding of the autoencoder's convolutions."
    )
    encode: Literal["auto", EncodeWay] = Field(
        default="auto",
        description="How images are encoded: `float32` is exact, `bfloat16` takes half of its memory, "
        "`tiles` encodes float32 tiles of 512 px. `auto` is the first of these that fits into the free "
        "memory of the GPU when the run starts; a resumed run keeps it.",
    )

    @model_validator(mode="after")
    def _name_or_values(self) -> Self:
        if self.name is not None and (self.scale, self.shift, self.padding) != (None, None, None):
            raise ValueError(
                f'`name = "{self.name}"` sets `scale`, `shift` and `padding`: set either the name or these'
            )
        return self
