"""Planned bytes equal those of real steps on the CPU, measured with autograd and torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank
from spectune.files.dtypes import parse_dtype
from spectune.files.source import TensorInfo
from spectune.model.inject import Injection, inject
from spectune.model.network import Sdxl, build_model, denoising_bytes
from spectune.model.packed_linear import pack
from spectune.model.quantize import quantize_layers
from spectune.model.streamed_layers import stream_weights
from spectune.model.vae.fitting import decoding_bytes
from spectune.sdxl.inference import infer_layout, layout_of
from spectune.sdxl.layers import Kind, build_catalogue
from spectune.sdxl.names import Part
from spectune.training.denoiser import Denoiser
from spectune.training.memory.account import Setup
from spectune.training.memory.meter import MemoryMeter, quantized_bytes
from spectune.training.memory.optimizer_state import optimizer_bytes
from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.state import trained_tensors

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "demo" / "base.safetensors"
TINY_STEP = Setup(max_tokens=75, rank=2, resolution_px=64, batch=2, precision="fp32")
DEMO_STEP = Setup(max_tokens=75, rank=8, resolution_px=64, batch=2, precision="fp32")


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path) -> dict[str, Path]:
    return {"tiny": tiny_checkpoint, "demo": DEMO}


def meter_of(path: Path) -> MemoryMeter:
    with open_checkpoint(path) as source:
        return MemoryMeter(infer_layout(source), build_catalogue(source))


@pytest.fixture(scope="module")
def meters(checkpoints: dict[str, Path]) -> dict[str, MemoryMeter]:
    return {name: meter_of(path) for name, path in checkpoints.items()}


def real_model(path: Path, setup: Setup) -> tuple[Sdxl, Injection]:
    """Return a model with random frames of real sizes."""
    with open_checkpoint(path) as source:
        model = build_model(source, dtype=parse_dtype(setup.precision))
        frames = {
            layer.name: LowRank(
                down=0.01 * torch.randn(rank, *layer.shape[1:]),
                up=0.01 * torch.randn(layer.shape[0], rank, *(1,) * (len(layer.shape) - 2)),
                alpha=float(rank),
            )
            for layer in build_catalogue(source)
            if layer.part.value in setup.parts
            for rank in [min(setup.rank, layer.full_rank)]
        }
    injection = inject(model, frames, form=setup.form, dtype=parse_dtype(setup.trained_precision))
    injection.joined_factors.prepare(model.unet.dtype)
    denoiser = Denoiser(model, trains_text=setup.trains_text)
    if setup.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    denoiser.train()
    return model, injection


def real_loss(model: Sdxl, setup: Setup) -> Tensor:
    edge = setup.resolution_px // model.pixels_per_latent
    with torch.set_grad_enabled(setup.trains_text):
        captions = ["dog " * setup.max_tokens] * setup.batch
        text = model.encode_captions(captions, max_tokens=setup.max_tokens)
    x = torch.randn(setup.batch, 4, edge, edge)
    times, ids = torch.full((setup.batch,), 500), torch.full((setup.batch, 6), 64.0)
    return F.mse_loss(model.denoise(x.to(model.unet.dtype), times, text, ids).float(), x)


def saved_bytes(model: Sdxl, joined: list[Tensor], forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd saves in a forward pass, without those of the model and `joined`."""
    existing = [
        *joined,
        *model.unet.parameters(),
        *model.te1.parameters(),
        *model.te2.parameters(),
        *model.unet.buffers(),
    ]
    existing += [*model.te1.buffers(), *model.te2.buffers()]
    places = {tensor.untyped_storage().data_ptr() for tensor in existing}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in places:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the peak bytes of the CPU allocator, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def total(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


CASES = [
    ("tiny", TINY_STEP),
    pytest.param(
        "tiny",
        replace(TINY_STEP, precision="bf16", parts=("te2",), optimizer="adafactor"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "demo",
        replace(DEMO_STEP, precision="bf16", optimizer="prodigy_plus_schedule_free"),
        marks=pytest.mark.slow,
    ),
    ("demo", replace(DEMO_STEP, form="residual", optimizer="prodigy", parts=("unet", "te1"))),
    pytest.param("demo", replace(DEMO_STEP, parts=("unet",), max_tokens=225), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "setup"), CASES)
def test_planned_bytes_are_those_of_a_real_step(
    name: str, setup: Setup, checkpoints: dict[str, Path], meters: dict[str, MemoryMeter]
) -> None:
    planned = meters[name].measure(setup)
    model, injection = real_model(checkpoints[name], setup)
    joined = injection.joined_factors.tensors()
    assert planned.kept == pytest.approx(
        saved_bytes(model, joined, lambda: real_loss(model, setup)), rel=0.05
    )
    trained = trained_tensors(injection.named_deltas())
    optimizer = build_optimizer(setup.optimizer, groups_by_part(trained))
    real_loss(model, setup).backward()
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    state = [value for one in states for value in one.values() if isinstance(value, Tensor)]
    assert planned.optimizer == pytest.approx(total(state), rel=1e-3)
    # exact: in both, the last layer of the first text encoder is not used and gets no gradient
    assert planned.gradients == total(tensor.grad for tensor in trained.values())
    assert planned.fixed.trained == total(trained.values())
    networks = (model.unet, model.te1, model.te2, model.vae)
    everything = total(
        tensor for network in networks if network for tensor in (*network.parameters(), *network.buffers())
    )
    assert planned.fixed.total == everything + total(joined)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_the_planned_peak_is_that_of_the_allocator(
    checkpointing: bool, checkpoints: dict[str, Path], meters: dict[str, MemoryMeter]
) -> None:
    # large enough that the workspaces of CPU kernels do not matter
    setup = replace(
        TINY_STEP, batch=4, resolution_px=96, gradient_checkpointing=checkpointing, max_tokens=150
    )
    planned = meters["tiny"].measure(setup)
    model, _ = real_model(checkpoints["tiny"], setup)
    real_loss(model, setup).backward()  # gradients exist from now on
    peak = allocated_peak(lambda: real_loss(model, setup).backward())
    assert planned.kept + planned.working == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "setup",
    [DEMO_STEP, replace(DEMO_STEP, parts=("unet",), form="residual", quantize="nf4", precision="bf16")],
    ids=["delta", "nf4"],
)
@pytest.mark.slow
def test_streamed_weights_are_counted_in_main_memory(
    setup: Setup, checkpoints: dict[str, Path], meters: dict[str, MemoryMeter]
) -> None:
    if setup.quantize != "none":
        pytest.importorskip("bitsandbytes")
    memory = meters["demo"].measure(replace(setup, stream=True))
    model, injection = real_model(checkpoints["demo"], setup)
    if setup.quantize != "none":
        quantize_layers(model, setup.quantize)
    stream = stream_weights(model, torch.device("cpu"))
    trained = {id(tensor) for tensor in injection.parameters()}
    frames = {id(b) for layer in injection.layers.values() for b in layer.buffers(recurse=False)}
    tensors = [*model.unet.parameters(), *model.unet.buffers()]
    on_device = total(tensor for tensor in tensors if id(tensor) not in trained | frames)
    assert memory.fixed.unet == on_device
    assert memory.fixed.stream == stream.ring.nbytes
    assert memory.streamed == stream.stored_bytes
    plain = meters["demo"].measure(setup)
    assert plain.streamed == plain.fixed.stream == 0
    unet, text = (plain.fixed.unet - memory.fixed.unet, plain.fixed.encoders - memory.fixed.encoders)
    assert unet + text == memory.streamed
    assert (text > 0) == setup.trains_text


@pytest.mark.slow
def test_encoding_bytes_are_those_of_the_allocator(
    checkpoints: dict[str, Path], meters: dict[str, MemoryMeter]
) -> None:
    model, _ = real_model(checkpoints["demo"], DEMO_STEP)
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        peak = allocated_peak(lambda: model.encode_images(pixels))
    memory = meters["demo"].measure(replace(DEMO_STEP, parts=("te2",), offload=("vae",)))
    assert model.vae is not None
    weights = total(model.vae.parameters())
    assert memory.encoding["float32"] - weights == pytest.approx(peak, rel=0.1)
    half = (memory.encoding["float32"] - weights) / 2
    assert memory.encoding["bfloat16"] - weights * 3 / 2 == pytest.approx(half, rel=0.06)
    assert memory.encoding["tiles"] == memory.encoding["float32"], "the image is not larger than a tile"
    assert memory.encoding_text == memory.fixed.encoders


def test_previews_are_counted_beside_the_tensors_of_a_step(meters: dict[str, MemoryMeter]) -> None:
    setup = replace(DEMO_STEP, parts=("te2",), resolution_px=1024)
    memory, offloaded = (
        meters["demo"]._without_step(one, frozenset()) for one in (setup, replace(setup, offload=("vae",)))
    )
    assert meters["demo"]._layout.vae is not None
    decoder = decoding_bytes(meters["demo"]._layout.vae, 1024 * 1024)
    resident = memory.fixed.total
    assert memory.decoding["float32"] == resident + decoder
    assert memory.decoding["bfloat16"] == resident + memory.fixed.vae // 2 + decoder // 2
    assert memory.decoding["bfloat16 and tiles"] == resident + memory.fixed.vae // 2 + decoder // 8
    assert offloaded.decoding == memory.decoding, "the autoencoder comes back for the previews"
    assert memory.sampling == resident + denoising_bytes(meters["demo"]._layout.unet, 2 * 256 * 256, 4)


@pytest.mark.slow
def test_twice_the_rank_doubles_the_frame_and_the_trained_tensors(meters: dict[str, MemoryMeter]) -> None:
    meter = meters["demo"]
    one, two = (meter.measure(replace(DEMO_STEP, rank=rank, parts=("te2",))) for rank in (4, 8))
    doubled = {name: 2 * getattr(one.fixed, name) for name in ("frame", "joined", "trained")}
    assert two.fixed == replace(one.fixed, **doubled)
    assert two.gradients == 2 * one.gradients == two.fixed.trained
    assert two.optimizer == pytest.approx(2 * one.optimizer, rel=1e-2)  # each tensor stores its step count
    assert one.kept < two.kept < 1.1 * one.kept


@pytest.mark.slow
def test_bfloat16_halves_the_bytes_and_twice_the_batch_doubles_activations(
    meters: dict[str, MemoryMeter],
) -> None:
    meter = meters["tiny"]
    requested = replace(TINY_STEP, parts=("unet",), batch=1)
    wide, narrow = meter.measure(requested), meter.measure(replace(requested, precision="bf16"))
    assert wide.fixed.unet == 2 * narrow.fixed.unet
    assert narrow.kept == pytest.approx(wide.kept / 2, rel=0.05)
    assert meter.measure(replace(requested, batch=2)).kept == pytest.approx(2 * wide.kept, rel=0.05)
    assert meter.measure(replace(requested, ema=True)).average == wide.fixed.trained
    assert meter.measure(replace(requested, trained_precision="bf16")).fixed.trained == wide.fixed.trained / 2


def test_full_sdxl_by_hand(full_infos: Mapping[str, TensorInfo]) -> None:
    """Check the parameter counts of the published model; rank 64 has 254.6 M parameters in 1052 layers."""
    meter = MemoryMeter(layout_of(full_infos), build_catalogue(full_infos))
    inventory = meter.inventory(Setup(rank=64))
    plain = inventory.weights["none"]
    assert plain.unet == 2 * 2_567_463_684
    positions = 8 * 77 * 2  # two tables of int64
    assert plain.encoders == 2 * (123_060_480 + 694_659_840) + positions
    assert plain.vae == 4 * 83_653_863
    count = sum(tensor.numel() for tensor in inventory.trained.values())
    assert count == pytest.approx(254.6e6, rel=1e-3)
    assert inventory.frame == 4 * count
    assert optimizer_bytes("adamw", inventory.trained.values(), from_zero=True) == 8 * count + 4 * 2 * 1052
    linear = sum(
        layer.in_features * layer.out_features
        for layer in build_catalogue(full_infos)
        if layer.kind is Kind.LINEAR and layer.part is Part.UNET
    )
    # 16 bits become 4 bits and a float32 scale for each 64 values
    assert plain.unet - inventory.weights["nf4"].unet == linear * (2 - 1 / 2 - 4 / 64)
    assert inventory.weights["nf4"].unpacked == 2 * 10240 * 1280


@pytest.mark.slow
def test_checkpointing_saves_activations_only(meters: dict[str, MemoryMeter]) -> None:
    plain = meters["tiny"].measure(TINY_STEP)
    slow = meters["tiny"].measure(replace(TINY_STEP, gradient_checkpointing=True))
    assert slow.kept < plain.kept / 2
    assert replace(slow, kept=plain.kept, working=plain.working) == plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bytes_are_those_of_real_weights(kind: Literal["nf4", "int8"]) -> None:
    pytest.importorskip("bitsandbytes")
    for shape in ((96, 64), (48, 40)):
        weight = torch.randn(shape)
        packed = pack(weight, kind)
        assert quantized_bytes(weight, kind) == packed.codes.nbytes + packed.scales.nbytes
    assert quantized_bytes(weight, "none") == 4 * 48 * 40


def test_a_step_in_the_backward_pass_has_no_gradients(meters: dict[str, MemoryMeter]) -> None:
    meter = meters["tiny"]
    setup = Setup(
        rank="full", max_tokens=75, resolution_px=64, parts=("unet",), precision="bf16",
        trained_precision="bf16", optimizer="lion", step_in_backward=True,
    )  # fmt: skip
    memory, after = meter.measure(setup), meter.measure(replace(setup, step_in_backward=False))
    numbers = memory.fixed.trained // 2
    assert memory.gradients == 0
    assert after.gradients == 2 * numbers
    assert memory.optimizer == after.optimizer == 4 * numbers  # of float32 copies
    assert memory.fixed.frame == memory.fixed.joined == 0
    assert memory.allocated < after.allocated
    assert memory.fixed.unet < 0.01 * memory.fixed.trained
