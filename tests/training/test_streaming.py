"""A run with streamed weights writes the same files as a run with all weights on the device."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune.errors import InputError
from spectune.model.streamed_layers import StreamedConv2d, StreamedLinear, stream_weights
from spectune.model.weight_stream import WeightStream
from spectune.training import setup
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe

needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


class Streams:
    """The streams that runs make, with rings that hold two of the largest weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[WeightStream] = []
        monkeypatch.setattr(setup, "stream_weights", self._make)

    def _make(self, *args: Any) -> WeightStream:
        stream = stream_weights(*args)
        stream._ring_bytes = 0
        self.made.append(stream)
        return stream


def adapters(make_recipe: MakeRecipe, output: Path, **sections: dict[str, Any]) -> dict[str, bytes]:
    run = {"output": output, "steps": 3, "validate_every_steps": 2, **sections.pop("run", {})}
    train(make_recipe(run=run, **sections))
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


# bf16, or the residual form: weights that are mapped from a file may be unaligned, and MKL rounds those
# differently.
BF16 = {"precision": "bf16"}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "delta": ({}, BF16),
    "delta, checkpointing": ({}, {**BF16, "gradient_checkpointing": True}),
    "residual, unet": ({"form": "residual", "parts": ["unet"]}, {"gradient_checkpointing": True}),
    "gradient frames": ({"frame": "gradient", "frame_batches": 1}, BF16),
    "data frames, dropout": ({"frame": "data", "frame_batches": 1, "dropout_probability": 0.5}, BF16),
}


SLOW = ("delta", "residual, unet", "gradient frames", "data frames, dropout")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SETTINGS]
)
def test_streaming_changes_no_byte(
    name: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = SETTINGS[name]
    plain = adapters(make_recipe, tmp_path / "plain", model=model, run=run)
    streams = Streams(monkeypatch)
    streamed = adapters(make_recipe, tmp_path / "streamed", model=model, run={**run, "stream": True})
    assert plain == streamed != {}
    (stream,) = streams.made
    assert stream.ring_bytes < stream.stored_bytes / 10


@needs_bnb
@pytest.mark.parametrize("packing", ["nf4", "int8"])
@pytest.mark.slow
def test_quantized_weights_are_streamed_as_codes(
    packing: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"form": "residual", "quantize": packing, "parts": ["unet"]}
    plain = adapters(make_recipe, tmp_path / "plain", model=model)
    streams = Streams(monkeypatch)
    assert plain == adapters(make_recipe, tmp_path / "streamed", model=model, run={"stream": True})
    kinds = {tensor.dtype for tensor in streams.made[0]._tensors}
    assert kinds == {torch.uint8 if packing == "nf4" else torch.int8, torch.float32}  # and convolutions


def test_most_weights_of_later_steps_are_copied_ahead(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    train(make_recipe(run={"steps": 2, "stream": True}, model={"parts": ["unet"]}))
    first = streams.made[0].late
    train(
        make_recipe(run={"steps": 5, "stream": True, "resume": False}, model={"parts": ["unet"]}), force=True
    )
    assert len(streams.made[1]._plan) > 1.7 * len(streams.made[1]._tensors)  # forward and backward pass
    assert streams.made[1].late - first <= 3  # three more steps


def test_only_small_tensors_move_to_the_device(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if any(isinstance(layer, StreamedLinear) for layer in layers):
            moved.append(sum(p.nbytes for p in module.parameters() if not p.requires_grad))
            assert any(isinstance(layer, StreamedConv2d) for layer in layers)
        return plain(module, *args, **kwargs)

    streams = Streams(monkeypatch)
    monkeypatch.setattr(nn.Module, "to", to)
    train(make_recipe(run={"steps": 1, "stream": True}, model={"parts": ["unet"]}))
    assert moved
    assert max(moved) < streams.made[0].stored_bytes / 4


def test_compiling_needs_fixed_weights(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="`compile` cannot be combined with `stream`"):
        make_recipe(run={"stream": True, "compile": True})
