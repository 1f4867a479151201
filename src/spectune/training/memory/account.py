"""Records of the settings that determine the memory of a run, and of the bytes that it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

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

    rank: int
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
    trained: int  # dA and dB, or A and B
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
    encoding: int  # before the training: the autoencoder with its activations for one image
    encoding_text: int  # before the training: the encoders, and the autoencoder if it stays on the GPU
    streamed: int = 0  # the weights that are streamed from main memory; they are not on the GPU

    @property
    def allocated(self) -> int:
        """The peak bytes of tensors during the training."""
        step = self.gradients + self.optimizer + self.average + self.kept + self.working + self.unpacked
        return self.fixed.total + step

    @property
    def caching(self) -> int:
        """The peak bytes of tensors while images and captions are encoded, one network at a time."""
        return max(self.encoding, self.encoding_text)

    @property
    def reserve(self) -> int:
        """The assumed bytes of the CUDA context and of fragmentation."""
        return CONTEXT_BYTES + round(FRAGMENTED_SHARE * max(self.allocated, self.caching))

    @property
    def total(self) -> int:
        """The bytes that the GPU must have."""
        return max(self.allocated, self.caching) + self.reserve
