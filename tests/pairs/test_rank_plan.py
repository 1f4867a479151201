from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spectune.adapters.writer import AdapterHeader, AdapterWriter
from spectune.core.low_rank import LowRank, to_factors
from spectune.core.rank import BudgetRank, EnergyRank, FixedRank
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource
from spectune.pairs.rank_plan import RankPlan, RankRequest, choose_ranks, request_label
from spectune.pairs.sizes import parse_bytes
from spectune.pairs.spectrum_report import all_spectra
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source)


def chosen(source: MemorySource, catalogue: Catalogue, request: RankRequest) -> RankPlan:
    return choose_ranks(source, catalogue.layers, request, store=torch.float16)


def written_bytes(layers: tuple[Layer, ...], plan: RankPlan, store: torch.dtype, path: Path) -> int:
    """Return the size of the file of a plan, with the longest names that a file may have."""
    kept = [layer for layer in layers if layer.name in plan.ranks]
    hashes = {"base_hash": "0" * 64, "principal_hash": "1" * 64}
    origin = Provenance(role=Role.PRINCIPAL, base_name="語" * 84, version="1.2.3", prediction="v", **hashes)
    path = path / ("語" * 70 + ".safetensors")
    with AdapterWriter(path, AdapterHeader(kept, plan.ranks, store, origin)) as writer:
        for layer in kept:
            rank = plan.ranks[layer.name]
            up, down = to_factors(
                torch.zeros(layer.out_features, rank), torch.zeros(rank, layer.in_features), layer.shape
            )
            writer.write_layer(layer, LowRank(down=down.to(store), up=up.to(store), alpha=float(rank)))
    return path.stat().st_size


@pytest.mark.parametrize(
    ("request_", "label"),
    [
        (FixedRank(64), "r64"),
        (FixedRank(64, 64), "r64"),
        (FixedRank(64, 32), "r64-c32"),
        (EnergyRank(0.9), "e0.90"),
        (EnergyRank(0.995), "e0.995"),
        (EnergyRank(1.0), "e1.00"),
        (EnergyRank(0.9, max_rank=128), "e0.90-r128"),
        (BudgetRank(parse_bytes("600MB")), "600MB"),
        (BudgetRank(parse_bytes("1.5GB")), "1500MB"),
    ],
)
def test_labels_for_file_names(request_: RankRequest, label: str) -> None:
    assert request_label(request_) == label


def test_a_fixed_rank_reads_no_weights(source: MemorySource, catalogue: Catalogue) -> None:
    class Unreadable(MemorySource):
        def load(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read")

    plan = chosen(Unreadable(source.values, source.metadata), catalogue, FixedRank(20, conv_rank=3))
    assert list(plan.ranks) == [layer.name for layer in catalogue]
    for layer in catalogue:
        wanted = 3 if layer.shape[2:] == (3, 3) else 20
        assert plan.ranks[layer.name] == min(wanted, layer.full_rank)
    assert plan.energy is None
    assert plan.left_out == ()
    assert plan.parameters == sum(plan.ranks[x.name] * (x.in_features + x.out_features) for x in catalogue)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_each_layer_keeps_the_smallest_rank_that_holds_the_energy(
    source: MemorySource, catalogue: Catalogue, share: float
) -> None:
    plan = chosen(source, catalogue, EnergyRank(share))
    for layer, values in zip(catalogue, all_spectra(source, catalogue.layers), strict=True):
        squares = values.square()
        rank = plan.ranks[layer.name]
        assert float(squares[:rank].sum() / squares.sum()) >= share - 1e-9
        assert float(squares[: rank - 1].sum() / squares.sum()) < share
    assert plan.energy is not None
    assert share - 1e-9 <= plan.energy <= 1.0


def test_max_rank_limits_the_rank_by_energy(source: MemorySource, catalogue: Catalogue) -> None:
    plan = chosen(source, catalogue, EnergyRank(0.9, max_rank=5))
    assert max(plan.ranks.values()) == 5
    assert plan.energy is not None
    assert plan.energy < 0.9


def test_a_layer_of_zeros_is_left_out(source: MemorySource, catalogue: Catalogue) -> None:
    layer = catalogue.layers[2]
    zero = torch.zeros_like(source.values[layer.tensor])
    emptied = replace(source, values={**source.values, layer.tensor: zero})
    plan = chosen(emptied, catalogue, EnergyRank(0.9))
    assert plan.left_out == (layer.name,)
    assert layer.name not in plan.ranks
    assert len(plan.ranks) == len(catalogue) - 1


@pytest.mark.parametrize("nbytes", [70_000, 150_000, 400_000, 10**9])
@pytest.mark.parametrize("store", [torch.float16, torch.float32])
def test_the_file_is_not_larger_than_the_budget(
    source: MemorySource, catalogue: Catalogue, nbytes: int, store: torch.dtype, tmp_path: Path
) -> None:
    plan = choose_ranks(source, catalogue.layers, BudgetRank(nbytes), store=store)
    size = written_bytes(catalogue.layers, plan, store, tmp_path)
    assert size <= plan.nbytes <= nbytes
    assert size > plan.nbytes - 20_000
    # the unused bytes are fewer than any next direction costs, or no direction is left
    bigger = [
        layer
        for layer in catalogue
        if layer.name in plan.ranks
        and plan.ranks[layer.name] < layer.full_rank
        and (layer.in_features + layer.out_features) * store.itemsize <= nbytes - plan.nbytes
    ]
    assert bigger == []


@pytest.mark.parametrize("request_", [FixedRank(4), EnergyRank(0.5)])
def test_other_requests_estimate_the_file_size(
    source: MemorySource, catalogue: Catalogue, request_: RankRequest, tmp_path: Path
) -> None:
    plan = chosen(source, catalogue, request_)
    size = written_bytes(catalogue.layers, plan, torch.float16, tmp_path)
    assert plan.nbytes - 20_000 < size <= plan.nbytes


def test_a_budget_keeps_more_energy_than_a_fixed_rank_of_the_same_size(
    source: MemorySource, catalogue: Catalogue
) -> None:
    fixed = chosen(source, catalogue, FixedRank(4))
    spectra = all_spectra(source, catalogue.layers)
    held = sum(float(values[:4].square().sum()) for values in spectra)
    share = held / sum(float(values.square().sum()) for values in spectra)
    budget = chosen(source, catalogue, BudgetRank(fixed.nbytes))
    assert budget.energy is not None
    assert budget.energy > share + 0.01


@pytest.mark.slow
def test_a_larger_budget_never_keeps_less_energy(source: MemorySource, catalogue: Catalogue) -> None:
    shares = [
        chosen(source, catalogue, BudgetRank(nbytes)).energy or 0.0
        for nbytes in (60_000, 120_000, 240_000, 480_000)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_layers_with_a_larger_norm_come_first(source: MemorySource, catalogue: Catalogue) -> None:
    layer = catalogue.layers[5]
    loud = replace(source, values={**source.values, layer.tensor: 8 * source.values[layer.tensor]})
    budget = BudgetRank(70_000)
    before = chosen(source, catalogue, budget).ranks.get(layer.name, 0)
    after = chosen(loud, catalogue, budget).ranks.get(layer.name, 0)
    assert after > before
    assert after == layer.full_rank


def test_the_same_request_gives_the_same_ranks(source: MemorySource, catalogue: Catalogue) -> None:
    first, second = (chosen(source, catalogue, BudgetRank(150_000)) for _ in range(2))
    assert first == second


def test_a_budget_that_is_too_small_is_refused(source: MemorySource, catalogue: Catalogue) -> None:
    with pytest.raises(InputError) as refused:
        chosen(source, catalogue, BudgetRank(10_000))
    assert (
        refused.value.what == f"a budget of 10kB does not hold rank 1 of any of the {len(catalogue)} layers"
    )
    assert "the smallest adapter takes 25," in (refused.value.hint or "")
