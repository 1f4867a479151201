"""Stages of benchmarks/gpu.py that step one UNet: time, memory and busy share; bit-identity of step 0."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import train
from benchmarks._gpu_rows import NEEDS_CUDA, Emit, Values, guarded
from benchmarks._gpu_settings import Settings
from spectune.model.inject import Form, Injection
from spectune.model.network import new_unet
from spectune.sdxl.layers import Layer
from spectune.training.optim.groups import build_optimizer

DTYPE = torch.bfloat16
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a UNet, and the injection of spectune's forms."""

    parameters: list[nn.Parameter]
    injection: Injection | None = None


Put = Callable[[UNet2DConditionModel, train.Size, list[Layer]], Trained]


def ours(form: Form) -> Put:
    def put(unet: UNet2DConditionModel, size: train.Size, layers: list[Layer]) -> Trained:
        injection = train.injected(unet, size, layers, form)
        injection.joined_factors.prepare(DTYPE)
        return Trained(injection.parameters(), injection)

    return put


def peer(name: str) -> Put:
    """Return a peer of benchmarks/train.py, with factors in the dtype of the UNet."""

    def put(unet: UNet2DConditionModel, size: train.Size, layers: list[Layer]) -> Trained:
        device = unet.device
        parameters = train.VARIANTS[name](unet, size, layers)
        nn.Module.to(unet, device, DTYPE)
        return Trained(parameters)

    return put


def everything(unet: UNet2DConditionModel, size: train.Size, layers: list[Layer]) -> Trained:
    return Trained(list(unet.requires_grad_(True).parameters()))


@dataclass(frozen=True)
class Variant:
    """What is trained, and with which optimizer."""

    put: Put
    optimizer: str = "adamw"


# The first one is the reference of the others.
VARIANTS = {
    "PEFT LoRA": Variant(peer("PEFT LoRA")),
    "delta form": Variant(ours("delta")),
    "residual form": Variant(ours("residual")),
    "delta form, ProdigyPlus": Variant(ours("delta"), "prodigy_plus_schedule_free"),
    "full fine-tuning": Variant(everything),
    "LyCORIS LoCon": Variant(peer("LyCORIS LoCon")),
}


@dataclass(frozen=True)
class Steps:
    """Numbers of steps and batch sizes."""

    warm_up: int
    measured: int
    batches: tuple[int, ...]


FULL_STEPS, TINY_STEPS = Steps(3, 5, (1, 4)), Steps(1, 1, (1, 2))


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def size_of(settings: Settings) -> train.Size:
    if settings.tiny:
        return replace(train.tiny(), latents=8, rank=settings.rank)
    layout = train.layout_of_size("full")
    return train.Size(layout, latents=settings.pixels // 8, batch=1, rank=settings.rank)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_unet(size: train.Size, dtype: torch.dtype = DTYPE) -> UNet2DConditionModel:
    """Return a UNet with random weights, made on the card."""
    torch.manual_seed(0)
    with torch.device(device_name()), default_dtype(dtype):
        return new_unet(size.layout.unet).requires_grad_(False)


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a UNet."""

    latents: Tensor  # (batch, 4, h, w)
    times: Tensor  # (batch,)
    context: Tensor  # (batch, 77, channels)
    added: dict[str, Tensor]

    @classmethod
    def random(cls, size: train.Size, batch: int, dtype: torch.dtype = DTYPE) -> Inputs:
        shape, device = size.layout.unet, device_name()

        def normal(*sizes: int) -> Tensor:
            return torch.randn(batch, *sizes, device=device, dtype=dtype)

        return cls(
            normal(4, size.latents, size.latents),
            torch.randint(0, 1000, (batch,), device=device),
            normal(77, shape.context),
            {
                "text_embeds": normal(shape.pooled),
                "time_ids": torch.full((batch, 6), 1024.0, device=device),
            },
        )

    def predict(self, unet: UNet2DConditionModel) -> Tensor:
        return unet(self.latents, self.times, self.context, added_cond_kwargs=self.added).sample


class Stepper:
    """A variant that is ready for its steps."""

    def __init__(
        self, variant: Variant, size: train.Size, layers: list[Layer], *, checkpointing: bool
    ) -> None:
        self.size, self.unet = size, random_unet(size).train()
        with torch.device(device_name()):
            self.trained = variant.put(self.unet, size, layers)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        groups = [{"params": self.trained.parameters, "part": "unet"}]
        rate = LEARNING_RATE if variant.optimizer == "adamw" else None
        self.optimizer = build_optimizer(variant.optimizer, groups, learning_rate=rate)
        injection = self.trained.injection
        if injection is not None:  # as in a training
            self.optimizer.register_step_post_hook(lambda *_: injection.joined_factors.refresh())

    def step(self, inputs: Inputs) -> None:
        loss = (inputs.predict(self.unet).float() - inputs.latents).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, batch: int, steps: Steps) -> Values:
        """Return the median time, the peak memory and the busy share of steps."""
        cuda, inputs = torch.cuda.is_available(), Inputs.random(self.size, batch)
        for _ in range(steps.warm_up):
            self.step(inputs)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        for _ in range(steps.measured):
            _synchronize()
            began = time.perf_counter()
            self.step(inputs)
            _synchronize()
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else NEEDS_CUDA
        parameters = self.trained.parameters
        values: Values = {
            "trained M": sum(tensor.numel() for tensor in parameters) / 1e6,
            "trained in": str(parameters[0].dtype).removeprefix("torch."),
            "s/step": median,
            "peak GB": peak,
        }
        if not cuda:
            return {**values, "busy": NEEDS_CUDA, "kernels": NEEDS_CUDA}
        kernels = kernel_intervals(lambda: self.step(inputs))
        busy = covered(kernels) / median if kernels else "no trace"
        return {**values, "busy": busy, "kernels": len(kernels)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernel_intervals(step: Callable[[], None]) -> list[tuple[float, float]]:
    """Return the begin and the end in seconds of each kernel, copy and fill on the card during `step`."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        step()
        _synchronize()
    return [
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in recorded.events() or ()
        # an annotation such as Optimizer.step spans the gaps between its kernels
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: kernels of two streams can overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def measure_steps(settings: Settings, emit: Emit, argument: str) -> None:
    """Measure the steps of all variants. `argument` is `checkpointing` or `plain`."""
    size, steps = size_of(settings), TINY_STEPS if settings.tiny else FULL_STEPS
    layers = train.unet_layers(size.layout)
    references: dict[int, float] = {}

    def measured(make: Callable[[], Stepper], batch: int) -> Values:
        values = make().measure(batch, steps)
        references.setdefault(batch, values["s/step"])
        first, seconds = next(iter(VARIANTS)), values["s/step"]
        return {**values, f"of {first}": seconds / references[batch]}

    for name, variant in VARIANTS.items():

        @cache
        def make(variant: Variant = variant) -> Stepper:
            return Stepper(variant, size, layers, checkpointing=argument == "checkpointing")

        for batch in steps.batches:
            measure = partial(measured, make, batch)
            guarded(emit, name, measure, {"batch": batch, "checkpointing": argument == "checkpointing"})
        make.cache_clear()
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_step_0(settings: Settings, emit: Emit, argument: str) -> None:
    """Compare the prediction of the UNet with the delta form at step 0 with that of the UNet alone."""
    size = size_of(settings)
    layers = train.unet_layers(size.layout)

    def compared(dtype: torch.dtype) -> Values:
        unet, inputs = random_unet(size, dtype).train(), Inputs.random(size, 1, dtype)
        with torch.no_grad():
            alone = inputs.predict(unet)
        with torch.device(device_name()):
            train.injected(unet, size, layers, "delta")
        training = inputs.predict(unet).detach()
        with torch.no_grad():
            sampling = inputs.predict(unet.eval())
        return {
            "bit-identical in training": torch.equal(alone, training),
            "in sampling": torch.equal(alone, sampling),
            "largest difference": float((alone - training).abs().max()),
            "largest value": float(alone.abs().max()),
        }

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        guarded(emit, str(dtype).removeprefix("torch."), lambda dtype=dtype: compared(dtype))
        _free()
