from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError, PairingError
from spectune.files.provenance import LAYOUT_KEY, HasProvenance, PredictionName, Provenance, Role
from spectune.files.reader import Checkpoint
from spectune.files.source import MemorySource, TensorInfo
from spectune.model.network import source_prediction
from spectune.model.prediction import Ddpm
from spectune.pairs.merged import add, merged, restored
from spectune.sdxl.layers import Layer, build_catalogue
from tests.sample_pairs import open_principal, tuned_from
from tests.split_fixtures import TinySplit


@pytest.fixture
def base(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


def low_rank(layer: Layer, *, seed: int, rank: int = 2, alpha: float = 2.0, size: float = 0.1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(layer.shape) - 2)
    up = size * torch.randn(layer.shape[0], rank, *ones, generator=generator)
    down = size * torch.randn(rank, *layer.shape[1:], generator=generator)
    return LowRank(down=down, up=up, alpha=alpha)


OURS = Provenance(role=Role.LORA, base_hash="0" * 64).to_metadata()


def lora(
    base: Checkpoint, names: list[str], *, seed: int = 0, alpha: float = 2.0, size: float = 0.1
) -> Adapter:
    layers = build_catalogue(base, all_layers=True).by_name
    factors = {
        name: low_rank(layers[name], seed=seed + index, alpha=alpha, size=size)
        for index, name in enumerate(names)
    }
    return Adapter(factors, OURS, f"lora{seed}.safetensors")


def k_proj(base: Checkpoint) -> Layer:
    return next(layer for layer in build_catalogue(base) if layer.rows and layer.rows[0] == layer.shape[0])


def test_changes_are_scaled_by_strength_and_alpha_and_added(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    one, two = lora(base, [name], alpha=1.0), lora(base, [name], seed=9)
    layer = build_catalogue(base).by_name[name]
    source = merged(base, [(one, 0.5), (two, -2.0)], dtype=torch.float32)
    expected = base.load(layer.tensor).double()
    for adapter, factor in ((one, 0.5 * 0.5), (two, -2.0)):
        factors = adapter.layers[name]
        flat = factors.up.flatten(1).double() @ factors.down.flatten(1).double()
        expected = expected + factor * flat.reshape(layer.shape)
    torch.testing.assert_close(source.load(layer.tensor).double(), expected, rtol=1e-6, atol=1e-7)
    assert source.label == f"{base.label} + lora0.safetensors + lora9.safetensors"


def test_changing_one_layer_of_a_fused_tensor_keeps_the_other_rows(base: Checkpoint) -> None:
    layer = k_proj(base)
    assert layer.rows is not None
    adapter = lora(base, [layer.name])
    before, after = base.load(layer.tensor), merged(base, [(adapter, 1.0)]).load(layer.tensor)
    first, last = layer.rows
    assert torch.equal(after[:first], before[:first])
    assert torch.equal(after[last:], before[last:])
    expected = (before[first:last].float() + product(adapter.layers[layer.name])).half()
    assert torch.equal(after[first:last], expected)


def test_unchanged_tensors_equal_those_of_the_base(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    tensor = build_catalogue(base).by_name[name].tensor
    for adapters in ([], [(lora(base, [name]), 0.0)], [(lora(base, [name], size=0.0), 1.0)]):
        source = merged(base, adapters)
        assert source.tensors == base.tensors
        assert torch.equal(source.load(tensor).view(torch.int16), base.load(tensor).view(torch.int16))


numbers = st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.5, 2.0**-24, -(2.0**-24)]), min_size=1, max_size=12)


@given(numbers)
@settings(deadline=None, max_examples=30)
def test_adding_zero_keeps_every_bit(values: list[float]) -> None:
    weight = torch.tensor(values)
    for zero in (torch.zeros_like(weight), -torch.zeros_like(weight)):
        assert torch.equal(add(weight, zero).view(torch.int32), weight.view(torch.int32))


def test_values_beyond_fp16_are_refused(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    tensor = build_catalogue(base).by_name[name].tensor
    huge = lora(base, [name], size=1e3)
    with pytest.raises(InputError, match=r"values, up to .*, exceed the range of float16") as caught:
        merged(base, [(huge, 1.0)]).load(tensor)
    assert caught.value.hint == "rebuild in bfloat16 or float32, or lower the strength"
    assert merged(base, [(huge, 1.0)], dtype=torch.bfloat16).load(tensor).dtype == torch.bfloat16


def test_a_damaged_base_is_refused_where_an_adapter_changes_it(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    tensor = build_catalogue(base).by_name[name].tensor
    values = {key: base.load(key).clone() for key in base.tensors}
    values[tensor].view(-1)[3] = float("inf")
    damaged = MemorySource(values, base.metadata, "damaged.safetensors")
    with pytest.raises(InputError, match=r"of damaged.safetensors: 1 of \d+ values are NaN or infinite"):
        merged(damaged, [(lora(base, [name]), 1.0)]).load(tensor)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_infinite_and_nan_changes_are_refused(base: Checkpoint, number: float) -> None:
    name = "unet.middle_block.0.in_layers.2"
    tensor = build_catalogue(base).by_name[name].tensor
    adapter = lora(base, [name])
    adapter.layers[name].up[0, 0] = number
    with pytest.raises(InputError, match=f"the change of {name}: .* values are NaN or infinite") as caught:
        merged(base, [(adapter, 1.0)]).load(tensor)
    assert caught.value.hint == "the training may have diverged: rebuild an earlier step"
    with pytest.raises(InputError, match=r"the strength of unet is (nan|inf)"):
        merged(base, [(lora(base, [name]), number)])


def test_only_floating_point_tensors_are_changed(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    tensor = build_catalogue(base).by_name[name].tensor
    values = {key: base.load(key) for key in base.tensors}
    values[tensor] = (values[tensor] > 0).to(torch.int8)
    source = MemorySource(values, base.metadata, "tiny.safetensors")
    with pytest.raises(InputError, match=f"layer {name} of tiny.safetensors is stored in int8"):
        merged(source, [(lora(base, [name]), 1.0)])


@pytest.mark.parametrize(("tuned_for", "declared"), [("flow", None), ("v", "v"), ("eps", "epsilon")])
def test_modelspec_declares_the_new_prediction(
    base: Checkpoint, tuned_for: PredictionName, declared: str | None
) -> None:
    source = MemorySource({n: base.load(n) for n in base.tensors}, {"modelspec.prediction_type": "v"})
    adapter = replace(lora(base, ["unet.middle_block.0.in_layers.2"]), metadata={})
    assert merged(source, [(adapter, 1.0)]).metadata["modelspec.prediction_type"] == "v"
    adapter = replace(adapter, metadata=Provenance(prediction=tuned_for).to_metadata())
    assert merged(source, [(adapter, 1.0)]).metadata.get("modelspec.prediction_type") == declared


def test_unknown_layers_and_other_shapes_are_named(base: Checkpoint) -> None:
    name = "unet.middle_block.0.in_layers.2"
    strange = Adapter({"unet.nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, {}, "x")
    with pytest.raises(InputError, match=r"1 of 1 layers are not in tiny\.safetensors: unet\.nowhere"):
        merged(base, [(strange, 1.0)])
    small = Adapter({name: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, {}, "x")
    layer = build_catalogue(base).by_name[name]
    with pytest.raises(InputError, match=r"has shape \(32, 32, 3, 3\), the adapter is made for \(2, 2\)"):
        merged(base, [(small, 1.0)]).load(layer.tensor)


def test_restored_requires_a_residual(base: Checkpoint, tiny_checkpoint: Path, tiny_split: TinySplit) -> None:
    report = tiny_split(torch.float16)
    principal = open_principal(tiny_checkpoint, report.principal)
    with pytest.raises(PairingError, match=r"tiny\.safetensors is not a residual of spectune"):
        restored(base, principal)
    assert report.residual is not None
    with open_checkpoint(report.residual) as residual:
        source = restored(residual, principal)
        assert "spectune.principal_hash" not in source.metadata
        assert source.metadata["spectune.role"] == "model"


def test_tuned_changes_are_scaled_by_the_strength(
    base: Checkpoint, tiny_checkpoint: Path, tiny_split: TinySplit
) -> None:
    report = tiny_split(torch.float16)
    tuned = tuned_from(tiny_checkpoint, report, size=0.1, only="te1")
    name = next(iter(tuned.layers))
    tensor = build_catalogue(base).by_name[name].tensor
    half = merged(base, [(tuned, 0.5)], dtype=torch.float32).load(tensor)
    expected = base.load(tensor).float() + 0.5 * change(tuned.layers[name])
    torch.testing.assert_close(half, expected, rtol=1e-6, atol=1e-8)


@dataclass
class Counting:
    """A source that counts how many of its loaded tensors are alive."""

    source: Checkpoint
    alive: list[int] = field(default_factory=lambda: [0, 0])  # now, largest so far

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.source.metadata

    @property
    def provenance(self) -> Provenance:
        return self.source.provenance

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def label(self) -> str:
        return self.source.label

    def load(self, name: str) -> Tensor:
        tensor = self.source.load(name)
        self.alive[0] += 1
        self.alive[1] = max(self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.alive[0] -= 1


def test_only_one_tensor_of_the_base_is_in_memory_at_a_time(base: Checkpoint) -> None:
    counting = Counting(base)
    adapter = lora(base, [layer.name for layer in build_catalogue(base)][:40])
    source = merged(counting, [(adapter, 1.0)])
    assert counting.alive == [0, 0]
    for name in source.tensors:
        source.load(name)
    assert counting.alive == [0, 1]


@dataclass(frozen=True)
class Sketch(HasProvenance):
    """A source of the full layout that creates a tensor when it is loaded."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    label: str = "sketch"

    def load(self, name: str) -> Tensor:
        info = self.tensors[name]
        seed = list(self.tensors).index(name)
        return torch.randn(info.shape, generator=torch.Generator().manual_seed(seed)).to(info.dtype)


def test_the_full_layout_is_planned_without_reading_it(full_infos: Mapping[str, TensorInfo]) -> None:
    source = Sketch(full_infos)
    layers = build_catalogue(source).by_name
    assert len(layers) == 1052

    class Factors(dict[str, LowRank]):
        def __missing__(self, name: str) -> LowRank:
            return low_rank(layers[name], seed=len(name))

    factors = Factors(dict.fromkeys(layers))  # type: ignore[arg-type]
    model = merged(source, [(Adapter(factors, OURS, "lora"), 1.0)])
    assert len(model.changes) == 1052 - 2 * 32  # q, k, v of 32 blocks share a tensor
    name = "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"
    assert [layer.rows for layer, _ in model.changes[name]] == [(0, 1280), (1280, 2560), (2560, 3840)]
    factors.clear()
    expected = torch.cat([product(factors[layer.name]) for layer, _ in model.changes[name]])
    assert torch.equal(model.load(name), (source.load(name).float() + expected).half())


def with_facts(tuned: TunedAdapter, **facts: Any) -> TunedAdapter:
    origin = replace(tuned.provenance, flow_shift=None, **facts)
    return replace(tuned, metadata=origin.to_metadata())


def test_markers_follow_the_trained_prediction(
    tiny_split: TinySplit, tiny_checkpoint: Path, base: Checkpoint
) -> None:
    """Other programs recognize v-prediction and its schedule only by these keys."""
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.0)
    v = merged(base, [(with_facts(tuned, prediction="v", noise_schedule="zero_terminal_snr"), 1.0)])
    assert set(v.tensors) - set(base.tensors) == {"v_pred", "ztsnr"}
    assert v.load("ztsnr").numel() == 0
    assert source_prediction(v) == Ddpm("v", zero_terminal_snr=True)

    values = {name: v.load(name) for name in v.tensors}
    foreign = {key: value for key, value in v.metadata.items() if key == LAYOUT_KEY}
    as_others_write_it = MemorySource(values, foreign)
    assert source_prediction(as_others_write_it) == Ddpm("v", zero_terminal_snr=True)
    back = with_facts(tuned, prediction="eps", noise_schedule="sdxl")
    eps = merged(as_others_write_it, [(back, 1.0)])
    assert set(eps.tensors) == set(base.tensors)
    assert source_prediction(eps) == Ddpm("eps")


def test_a_rebuilt_model_declares_the_vae_of_its_training(
    tiny_split: TinySplit, tiny_checkpoint: Path, base: Checkpoint
) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.0)
    facts = {
        "vae_scale": 0.1406,
        "vae_shift": -0.4743,
        "vae_padding": "reflect",
        "vae_name": "eq.safetensors",
    }
    origin = replace(tuned.provenance, **facts)
    rebuilt = merged(base, [(replace(tuned, metadata=origin.to_metadata()), 1.0)]).provenance
    assert {key: getattr(rebuilt, key) for key in facts} == facts
