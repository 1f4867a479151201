"""Distinguish a principal from a LoRA, and a residual from a model, only by their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank, product, to_factors, to_matrix
from spectune.errors import PairingError
from spectune.files.provenance import LAYOUT_KEY, Provenance
from spectune.files.source import MemorySource
from spectune.pairs.overlap import LARGE, Overlap, Place, overlap, overlap_of_adapters
from spectune.pairs.rules import Action, pairing
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue

RANKS = (4, 8)


@dataclass(frozen=True)
class Model:
    """A model with spectra like those of trained models, s_i ~ i^-0.4, with its principals and residuals."""

    source: MemorySource
    catalogue: Catalogue

    def weight(self, layer: Layer) -> Tensor:
        return self.source.load(layer.tensor)[layer.row_slice].float()

    def principal(self, rank: int) -> Adapter:
        return Adapter({layer.name: self._pair(layer, rank) for layer in self.catalogue}, {}, "p")

    def _pair(self, layer: Layer, rank: int) -> LowRank:
        u, s, vh = torch.linalg.svd(to_matrix(self.weight(layer)), full_matrices=False)
        root = s[:rank].sqrt()
        up, down = to_factors(u[:, :rank] * root, root[:, None] * vh[:rank], layer.shape)
        return LowRank(down.half(), up.half(), float(up.shape[1]))

    def residual(self, rank: int) -> MemorySource:
        values = {name: self.source.load(name) for name in self.source.tensors}
        for name, pair in self.principal(rank).layers.items():
            layer = self.catalogue.by_name[name]
            whole = values[layer.tensor].float().clone()
            whole[layer.row_slice] -= product(pair)
            values[layer.tensor] = whole.half()
        return MemorySource(values, self.source.metadata, "residual.safetensors")


def drawn(source: MemorySource, seed: int) -> Model:
    """Return the tiny model with other weights in its default layers."""
    catalogue = build_catalogue(source)
    generator = torch.Generator().manual_seed(seed)
    values = {name: source.load(name) for name in source.tensors}
    for layer in catalogue:
        u, _, vh = torch.linalg.svd(
            torch.randn(layer.out_features, layer.in_features, generator=generator), full_matrices=False
        )
        s = torch.arange(1, u.shape[1] + 1).float() ** -0.4
        whole = values[layer.tensor].float().clone()
        whole[layer.row_slice] = (u * s @ vh).reshape(layer.shape)
        values[layer.tensor] = whole.half()
    metadata = {LAYOUT_KEY: source.metadata[LAYOUT_KEY]}
    return Model(MemorySource(values, metadata, "model.safetensors"), catalogue)


@pytest.fixture(scope="module")
def model(source: MemorySource) -> Model:
    return drawn(source, 0)


@pytest.fixture(scope="module")
def other(source: MemorySource) -> Model:
    return drawn(source, 1)


def mapped(adapter: Adapter, change: Callable[[LowRank], LowRank]) -> Adapter:
    return replace(adapter, layers={name: change(pair) for name, pair in adapter.layers.items()})


def unbalanced(pair: LowRank) -> LowRank:
    """Return factors U S and Vh, as other extractors write them."""
    norm = to_matrix(pair.down.float()).norm(dim=1)  # (rank)
    ones = (1,) * (pair.down.ndim - 2)
    down = pair.down / norm.reshape(-1, 1, *ones)
    return LowRank(down.half(), (pair.up * norm.reshape(1, -1, *ones)).half(), pair.alpha)


def trained(pair: LowRank, size: float = 0.05) -> LowRank:
    generator = torch.Generator().manual_seed(pair.down.numel())

    def moved(t: Tensor) -> Tensor:
        return (t + size * t.float().std() * torch.randn(t.shape, generator=generator)).half()

    return LowRank(moved(pair.down), moved(pair.up), pair.alpha)


def rescaled(pair: LowRank) -> LowRank:
    return LowRank(pair.down, 4 * pair.up, pair.alpha / 4)


FORMS: dict[str, Callable[[LowRank], LowRank]] = {
    "as it was split": lambda pair: pair,
    "unbalanced": unbalanced,
    "trained a bit": trained,
    "unbalanced and trained": lambda pair: trained(unbalanced(pair)),
    "of another scale": rescaled,
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_contains_its_principal_and_a_residual_lacks_it(rank: int, form: str, model: Model) -> None:
    adapter = mapped(model.principal(rank), FORMS[form])
    whole, rest = overlap(model.source, adapter), overlap(model.residual(rank), adapter)
    assert (whole.place, rest.place) == (Place.INSIDE, Place.MISSING)
    assert whole.projection == pytest.approx(1, abs=0.03)
    assert rest.projection == pytest.approx(0, abs=0.03)
    with pytest.raises(PairingError, match="p has the values of a principal adapter: model"):
        pairing(model.source, adapter)
    action, warning = pairing(model.residual(rank), adapter)
    assert action is Action.RESTORE
    assert "lacks the values of p: assuming that the two are a pair" in warning
    assert pairing(model.source, adapter, strengthens=False) == (Action.ADD, "")


def test_size_is_the_ratio_of_norms(model: Model) -> None:
    names = [layer.name for layer in model.catalogue if layer.full_rank == 32][:1]
    pairs = {name: model.principal(4).layers[name] for name in names}
    found = overlap(model.source, Adapter(pairs, {}, "p"))
    s = torch.arange(1, 33).double() ** -0.4
    expected = float((s[:4].square().sum() / s.square().sum()).sqrt())
    assert found.size == pytest.approx(expected, rel=2e-3)
    assert found.size != pytest.approx(expected * 1.01, rel=2e-3)


@pytest.mark.parametrize("size", [1e-3, 0.03, 0.1])
@pytest.mark.parametrize("rank", RANKS)
def test_a_lora_is_unrelated_to_any_model(rank: int, size: float, model: Model) -> None:
    generator = torch.Generator().manual_seed(rank)
    pairs: dict[str, LowRank] = {}
    for layer in model.catalogue:
        down, up = (torch.randn(shape, generator=generator) for shape in layer.factor_shapes(rank))
        pair = LowRank(down, up, float(rank))
        ratio = size * float(model.weight(layer).norm()) / float(product(pair).norm())
        pairs[layer.name] = LowRank(down, up * ratio, float(rank))
    adapter = Adapter(pairs, {}, "lora")
    for base in (model.source, model.residual(rank)):
        found = overlap(base, adapter)
        assert found.place is Place.UNRELATED
        # a residual has a smaller norm, so the same product is a larger share of it
        assert size * 0.99 < found.size < 2 * size
        if found.size < LARGE:
            assert pairing(base, adapter) == (Action.ADD, "")


def test_a_model_does_not_contain_the_principal_of_another_model(model: Model, other: Model) -> None:
    found = overlap(model.source, other.principal(4))
    assert found.place is not Place.INSIDE
    assert abs(found.projection) < 0.3
    assert overlap(other.source, other.principal(4)).place is Place.INSIDE


def test_principals_are_compared_without_a_model(model: Model, other: Model) -> None:
    original = model.principal(4)
    assert overlap_of_adapters(original, original).projection == pytest.approx(1, abs=1e-6)
    assert overlap_of_adapters(original, original).size == pytest.approx(1, abs=1e-6)
    for form in FORMS.values():
        assert overlap_of_adapters(original, mapped(original, form)).place is Place.INSIDE
    assert overlap_of_adapters(original, other.principal(4)).place is not Place.INSIDE
    # the exact value of <W, BA> / |BA|^2 of the products
    name = model.catalogue.layers[0].name
    one, two = original.layers[name], trained(original.layers[name], 0.3)
    found = overlap_of_adapters(Adapter({name: one}, {}, ""), Adapter({name: two}, {}, ""))
    left, right = product(one).double(), product(two).double()
    assert found.projection == pytest.approx(float((left * right).sum() / right.square().sum()), rel=1e-5)
    assert found.size == pytest.approx(float(right.norm() / left.norm()), rel=1e-5)


def test_zero_nonfinite_and_unknown_layers_do_not_overlap(model: Model) -> None:
    principal = model.principal(4)
    zero = mapped(principal, lambda pair: replace(pair, up=torch.zeros_like(pair.up)))
    broken = mapped(principal, lambda pair: replace(pair, up=pair.up * float("nan")))
    small = LowRank(torch.ones(1, 3), torch.ones(5, 1), 1.0)
    misfit = Adapter({"te1.text_model.encoder.layers.0.mlp.fc1": small}, {}, "x")
    strange = Adapter({"unet.nowhere": principal.layers[model.catalogue.layers[0].name]}, {}, "x")
    for adapter in (zero, broken, misfit, strange, Adapter({}, {}, "x")):
        assert overlap(model.source, adapter) == Overlap(0.0, 0.0)
        assert pairing(model.source, adapter) == (Action.ADD, "")
    few = {name: zero.layers[name] for name in list(zero.layers)[:3]}
    assert overlap(model.source, replace(principal, layers={**principal.layers, **few})).place is Place.INSIDE


def test_the_frame_of_a_tuned_adapter_is_compared(model: Model) -> None:
    principal = model.principal(4)
    deltas = {
        name: Delta(pair, torch.zeros_like(pair.down), torch.zeros_like(pair.up))
        for name, pair in principal.layers.items()
    }
    tuned = TunedAdapter(deltas, {}, "tuned")
    assert overlap(model.source, tuned) == overlap(model.source, principal)
    # without the hash of its principal, the deltas are added as a change
    assert pairing(model.residual(4), tuned) == (Action.ADD_CHANGE, "")
    named = replace(tuned, metadata=Provenance(principal_hash="ab" * 32).to_metadata())
    assert pairing(model.residual(4), named) == (Action.REPLACE, "")
    assert pairing(model.source, named) == (Action.ADD_CHANGE, "")
