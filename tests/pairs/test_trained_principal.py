"""The deltas from a principal to the same principal after training in another program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.writer import adapter_hash
from spectune.core.delta import Delta, change
from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource
from spectune.pairs.trained_principal import rounded_factors, trained_deltas
from spectune.sdxl.layers import Catalogue, build_catalogue

HASH = "ab" * 32


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source)


def drawn(catalogue: Catalogue, seed: int, *, rank: int = 4, dtype: torch.dtype = torch.float16) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, LowRank] = {}
    for layer in catalogue:
        down, up = (torch.randn(shape, generator=generator).to(dtype) for shape in layer.factor_shapes(rank))
        pairs[layer.name] = LowRank(down, up, float(rank))
    provenance = Provenance(
        role=Role.PRINCIPAL, base_hash=HASH, base_name="tiny.safetensors", prediction="eps"
    )
    return Adapter(pairs, provenance.to_metadata(), "principal.safetensors", catalogue=catalogue)


@pytest.fixture(scope="module")
def original(catalogue: Catalogue) -> Adapter:
    return drawn(catalogue, 0)


def trained(original: Adapter, *, size: float = 0.1, **changes: object) -> Adapter:
    generator = torch.Generator().manual_seed(9)

    def moved(t: Tensor) -> Tensor:
        return (t.float() * (1 + size * torch.randn(t.shape, generator=generator))).to(t.dtype)

    pairs = {name: LowRank(moved(p.down), moved(p.up), p.alpha) for name, p in original.layers.items()}
    found = replace(original, layers=pairs, metadata={"ss_comment": "kohya"}, label="trained.safetensors")
    return replace(found, **changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frame_plus_delta_equals_the_trained_factors_exactly(
    catalogue: Catalogue, dtype: torch.dtype
) -> None:
    original = drawn(catalogue, 0, dtype=dtype)
    after = trained(original)
    deltas = trained_deltas(after, original)
    assert list(deltas.layers) == list(original.layers)
    for name, pair in after.layers.items():
        delta, before = deltas.layers[name], original.layers[name]
        assert (delta.down.dtype, delta.up.dtype) == (torch.float32, torch.float32)
        for found, frame, now, then in (
            (delta.down, delta.frame.down, pair.down, before.down),
            (delta.up, delta.frame.up, pair.up, before.up),
        ):
            assert torch.equal(frame, then)
            # Sterbenz: the difference of two 16-bit numbers this close to each other is a float32 number
            assert dtype == torch.float32 or torch.equal(frame.double() + found.double(), now.double())
        exact = product(pair).double() - product(before).double()
        assert float((change(delta) - exact).norm() / exact.norm()) < 1e-5
        assert float((1.01 * change(delta) - exact).norm() / exact.norm()) > 5e-3


def rounded(adapter: Adapter, *dtypes: torch.dtype) -> Adapter:
    """Cast the factors of an adapter to each of the dtypes in turn."""
    pairs: dict[str, LowRank] = {}
    for name, pair in adapter.layers.items():
        down, up = pair.down, pair.up
        for dtype in dtypes:
            down, up = down.to(dtype), up.to(dtype)
        pairs[name] = LowRank(down, up, pair.alpha)
    return replace(adapter, layers=pairs, label="trained.safetensors")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_principal_that_was_only_rounded_is_an_error(original: Adapter, stored: torch.dtype) -> None:
    with pytest.raises(InputError) as caught:
        trained_deltas(rounded(original, torch.bfloat16, stored), original)
    assert str(caught.value) == (
        "trained.safetensors equals principal.safetensors rounded to bfloat16: training changed nothing"
    )
    assert "spectune split --dtype bfloat16" in (caught.value.hint or "")
    same = rounded(original, torch.float16)
    assert not any(
        delta.down.any() or delta.up.any() for delta in trained_deltas(same, original).layers.values()
    )


def test_rounding_is_no_change_of_a_layer(original: Adapter) -> None:
    after = rounded(original, torch.bfloat16)
    first, *others = original.layers
    moved = after.layers[first]
    moved = LowRank(moved.down * 1.5, moved.up, moved.alpha)
    deltas = trained_deltas(replace(after, layers={**after.layers, first: moved}), original)
    changed = {name for name, delta in deltas.layers.items() if delta.down.any() or delta.up.any()}
    assert changed == {first}
    delta = deltas.layers[first]
    assert torch.equal(delta.frame.down.float() + delta.down, moved.down.float())
    assert deltas.warnings == (
        f"{len(others) + 1} layers of trained.safetensors have a narrower dtype than in "
        "principal.safetensors: the change is measured from the rounded principal",
    )


def test_factors_narrower_than_those_of_the_residual_are_reported(original: Adapter) -> None:
    residual = MemorySource({}, {"spectune.principal_dtype": "F16"}, "tiny.residual.safetensors")
    assert rounded_factors(residual, rounded(original, torch.float32)) == ()
    (warning,) = rounded_factors(residual, rounded(original, torch.bfloat16))
    assert "192 layers of trained.safetensors were rounded from float16 to bfloat16" in warning
    assert rounded_factors(MemorySource({}, {}), rounded(original, torch.bfloat16)) == ()


def test_the_deltas_declare_their_provenance(original: Adapter) -> None:
    deltas = trained_deltas(trained(original), original)
    provenance = deltas.provenance
    assert (provenance.role, provenance.base_hash, provenance.base_name) == (
        Role.TUNED,
        HASH,
        "tiny.safetensors",
    )
    assert (provenance.principal_hash, provenance.prediction) == (adapter_hash(original), "eps")
    assert deltas.metadata["ss_comment"] == "kohya"
    for_flow = Provenance(prediction="flow", flow_shift=2.5).to_metadata()
    provenance = trained_deltas(trained(original, metadata=for_flow), original).provenance
    assert (provenance.prediction, provenance.flow_shift) == ("flow", 2.5)


def test_a_principal_of_one_part_can_be_trained(original: Adapter) -> None:
    after = trained(original)
    part = {name: pair for name, pair in after.layers.items() if name.startswith("te1.")}
    assert list(trained_deltas(replace(after, layers=part), original).layers) == list(part)


def test_layers_that_the_principal_lacks_are_named(original: Adapter) -> None:
    fewer = {name: pair for name, pair in original.layers.items() if not name.startswith("te2.")}
    with pytest.raises(InputError) as caught:
        trained_deltas(trained(original), replace(original, layers=fewer))
    assert caught.value.what == (
        f"12 of {len(original.layers)} layers of trained.safetensors are not in principal.safetensors: "
        "te2.text_model.encoder.layers.0.self_attn.q_proj, te2.text_model.encoder.layers.0.self_attn.k_proj, "
        "te2.text_model.encoder.layers.0.self_attn.v_proj (9 more)"
    )


def test_other_ranks_are_refused(original: Adapter, catalogue: Catalogue) -> None:
    with pytest.raises(InputError) as caught:
        trained_deltas(trained(drawn(catalogue, 0, rank=3)), original)
    first = next(iter(original.layers))
    assert caught.value.what == (
        f"{len(original.layers)} layers of trained.safetensors have another rank than in "
        f"principal.safetensors: {first} has 3, expected 4"
    )
    assert caught.value.hint == "train with the ranks of the principal: set network_dim and conv_dim to them"


@pytest.mark.parametrize("alpha", [5.0, 2.0, 1.0, 16.0])
def test_another_scale_is_refused(original: Adapter, alpha: float) -> None:
    """Trainers use such a scale if network_alpha is forgotten; it may be close to 1 or far from it."""
    after = trained(original)
    rescaled = {name: replace(pair, alpha=alpha) for name, pair in after.layers.items()}
    first = next(iter(rescaled))
    with pytest.raises(InputError) as caught:
        # factors are read on access
        _ = trained_deltas(replace(after, layers=rescaled), original).layers[first]
    assert caught.value.what == (
        f"{first} has scale {alpha / 4:g} in trained.safetensors and 1 in principal.safetensors: "
        "expected the same scale"
    )
    assert caught.value.hint == "train with alpha = rank: set network_alpha and conv_alpha to the rank"


def test_another_principal_is_refused(original: Adapter, catalogue: Catalogue) -> None:
    other = drawn(catalogue, 1)
    with pytest.raises(PairingError) as caught:
        trained_deltas(trained(other), original)
    assert caught.value.what.startswith(
        "trained.safetensors does not look like principal.safetensors after training: it contains only "
    )
    named = Provenance(principal_hash=adapter_hash(other)).to_metadata()
    with pytest.raises(PairingError) as caught:
        trained_deltas(trained(original, metadata=named), original)
    assert caught.value.what == (
        f"trained.safetensors replaces principal {adapter_hash(other)[:16]}, principal.safetensors is "
        f"{adapter_hash(original)[:16]}"
    )
    own = Provenance(principal_hash=adapter_hash(original)).to_metadata()
    assert len(trained_deltas(trained(original, metadata=own), original).layers) == len(original.layers)


def test_tuned_adapters_are_refused(original: Adapter) -> None:
    deltas = {name: Delta(pair, pair.down.float(), pair.up.float()) for name, pair in original.layers.items()}
    tuned = TunedAdapter(deltas, {}, "tuned.safetensors")
    with pytest.raises(InputError, match=r"tuned\.safetensors is a tuned adapter: expected a trained princ"):
        trained_deltas(tuned, original)
    with pytest.raises(InputError, match="expected the principal it was trained from") as caught:
        trained_deltas(original, tuned)
    assert caught.value.hint == "leave out `principal`: a tuned adapter contains its frame"
