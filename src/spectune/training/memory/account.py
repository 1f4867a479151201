"""Records: the settings that decide the memory of a run, and the bytes that it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spectune.model.inject import Form
from spectune.training.recipe.sections.model import ALL_PARTS, PartName, Quantization
from spectune.training.recipe.sections.run import Offloaded, Precision

# Assumed, not measured: a CUDA context with the kernels of torch, cuBLAS and cuDNN and their workspaces, and
# the share of the rest that the allocator loses to fragments.
CONTEXT_BYTES = 600_000_000
FRAGMENTED_SHARE = 0.05


@dataclass(frozen=True)
class Setup:
    """The settings of a run that decide its memory, named as in a recipe."""

    rank: int
    parts: tuple[PartName, ...] = ALL_PARTS
    resolution_px: int = 1024
    batch: int = 1
    form: Form = "delta"
    quantize: Quantization = "none"
    precision: Precision = "bf16"
    trained_precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    offload: tuple[Offloaded, ...] = ()
    optimizer: str = "adamw"
    ema: bool = False

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder is trained."""
        return any(part != "unet" for part in self.parts)


@dataclass(frozen=True)
class Fixed:
    """Bytes that are on the card all the time; networks without their trained tensors."""

    unet: int
    encoders: int
    vae: int
    frame: int  # A0 and B0
    joined: int  # the joined factors, in the dtype of the activations
    trained: int  # dA and dB, or A and B

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Memory:
    """The memory of a run in bytes."""

    fixed: Fixed
    gradients: int
    optimizer: int
    average: int  # the moving average of the trained tensors
    kept: int  # activations between the forward and the backward pass
    working: int  # in addition at the peak of a step
    unpacked: int  # the largest quantized weight, unpacked for its product
    waiting: int  # networks that are offloaded during the training
    encoding: int  # the autoencoder's activations for one picture, before the training

    @property
    def allocated(self) -> int:
        """The most bytes in tensors at once during the training."""
        step = self.gradients + self.optimizer + self.average + self.kept + self.working + self.unpacked
        return self.fixed.total + step

    @property
    def caching(self) -> int:
        """The bytes while latents are encoded: all networks, but no gradients and no optimizer state."""
        return self.fixed.total + self.waiting + self.encoding

    @property
    def reserve(self) -> int:
        """The assumed bytes of CUDA itself and of fragments."""
        return CONTEXT_BYTES + round(FRAGMENTED_SHARE * max(self.allocated, self.caching))

    @property
    def total(self) -> int:
        """The bytes that the card must have."""
        return max(self.allocated, self.caching) + self.reserve
