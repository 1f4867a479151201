"""Records of the settings that determine the memory of a run, and of the bytes that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from spectune.model.inject import Form
from spectune.sdxl.vocabulary import MAX_TOKENS
from spectune.training.recipe.sections.model import ALL_PARTS, PartName, Quantization
from spectune.training.recipe.sections.run import Offloaded, Precision, TrainedPrecision

# Assumed, not measured: the CUDA context with kernels and workspaces of torch, cuBLAS and cuDNN, and the
# share of all other bytes that the allocator loses to fragmentation.
CONTEXT_BYTES = 600_000_000
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Setup:
    """The settings of a run that determine its memory, named as in a recipe."""

    rank: int | Literal["full"]
    parts: tuple[PartName, ...] = ALL_PARTS
    resolution_px: int = 1024
    batch: int = 1
    form: Form = "delta"
    quantize: Quantization = "none"
    precision: Precision = "bf16"
    trained_precision: TrainedPrecision = "fp32"
    gradient_checkpointing: bool = False
    offload: tuple[Offloaded, ...] = ()
    stream: bool = False
    optimizer: str = "adamw"
    ema: bool = False
    max_tokens: int = MAX_TOKENS  # of the longest captions
    step_in_backward: bool = False  # gradients of complete tensors do not exist all at once

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is trained."""
        return any(part != "unet" for part in self.parts)


@dataclass(frozen=True)
class Fixed:
    """The bytes that are on the GPU all the time. Networks are counted without their trained tensors."""

    unet: int
    encoders: int
    vae: int
    frame: int  # A0 and B0
    joined: int  # the joined factors, in the dtype of the activations
    trained: int  # dA and dB, or A and B, or complete tensors
    stream: int = 0  # the ring that streamed weights pass through

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Memory:
    """The memory of a run in bytes."""

    fixed: Fixed
    gradients: int
    optimizer: int
    average: int  # the moving average of the trained tensors
    kept: int  # activations between the forward and the backward pass
    working: int  # further activations at the peak of a step
    unpacked: int  # the largest quantized weight, when it is unpacked for a product
    # The following are peaks of other stages, with all tensors that are on the GPU then. Of several ways, the
    # most exact one is first.
    encoding: Mapping[str, int]  # of one image, before the training: the autoencoder with its activations
    encoding_text: int  # before the training: the encoders, and the autoencoder if it stays on the GPU
    sampling: int  # of a preview, between two steps
    decoding: Mapping[str, int]  # of a preview, one picture at a time
    streamed: int = 0  # the weights that are streamed from main memory; they are not on the GPU

    @property
    def allocated(self) -> int:
        """The peak bytes of tensors during the training."""
        step = self.gradients + self.optimizer + self.average + self.kept + self.working + self.unpacked
        return self.fixed.total + step

    @property
    def stages(self) -> dict[str, Mapping[str, int]]:
        """The peak bytes of tensors in each stage of a run, by the ways to do it."""
        return {
            "training": {"": self.allocated},
            "encoding images": self.encoding,
            "encoding captions": {"": self.encoding_text},
            "sampling previews": {"": self.sampling},
            "decoding previews": self.decoding,
        }

    @property
    def limit(self) -> str:
        """The stage that needs most, if each is done in the way that needs least."""
        return max(self.stages, key=lambda stage: min(self.stages[stage].values()))

    @property
    def peak(self) -> int:
        """The peak bytes of tensors during a run, with each stage in the way that needs least."""
        return min(self.stages[self.limit].values())

    @property
    def reserve(self) -> int:
        """The assumed bytes of the CUDA context and of fragmentation."""
        return reserve_of(self.peak)

    @property
    def total(self) -> int:
        """The bytes that the GPU must have."""
        return self.peak + self.reserve

    def way_within(self, stage: str, vram: int) -> str:
        """Return the first way of a stage that fits a GPU with `vram` bytes, otherwise the last one."""
        ways = self.stages[stage]
        fitting = [way for way, nbytes in ways.items() if nbytes + reserve_of(nbytes) <= vram]
        return (fitting or list(ways)[-1:])[0]


def reserve_of(nbytes: int) -> int:
    """Return the assumed bytes of the CUDA context and of fragmentation beside tensors of so many bytes."""
    return CONTEXT_BYTES + round(FRAGMENTED_SHARE * nbytes)
