from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.pairs.spectrum_report import CURVE_RANKS, SpectrumReport, all_spectra, measure_spectra
from spectune.sdxl.layers import RANKS, Catalogue, build_catalogue, layer_weight, rank_cost


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source)


@pytest.fixture(scope="module")
def report(source: MemorySource, catalogue: Catalogue) -> SpectrumReport:
    return measure_spectra(source, catalogue)


@pytest.fixture(scope="module")
def squares(source: MemorySource, catalogue: Catalogue) -> list[torch.Tensor]:
    """Return the squared singular values from the full SVD of every layer."""
    weights = (layer_weight(source, layer).double().flatten(1) for layer in catalogue)
    return [torch.linalg.svdvals(weight).square() for weight in weights]


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_energy_of_all_layers_equals_that_of_the_svd(
    squares: list[torch.Tensor], report: SpectrumReport, rank: int
) -> None:
    def share(rank: int) -> float:
        return float(sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares))

    assert report.total.energies[rank] == pytest.approx(share(rank), abs=1e-9)
    assert report.total.energies[rank] != pytest.approx(share(rank + 1), abs=1e-4)


def test_fused_query_key_value_are_three_layers(source: MemorySource, catalogue: Catalogue) -> None:
    fused = next(layers for layers in catalogue.by_tensor.values() if len(layers) == 3)
    found = all_spectra(source, fused)
    for layer, values in zip(fused, found, strict=True):
        exact = torch.linalg.svdvals(layer_weight(source, layer).double())
        assert torch.allclose(values, exact, atol=1e-6 * float(exact[0]))
    assert not torch.allclose(found[0], found[1], rtol=1e-3)


def test_spectra_are_in_the_order_of_the_given_layers(source: MemorySource, catalogue: Catalogue) -> None:
    backwards = tuple(reversed(catalogue.layers))
    found, forwards = all_spectra(source, backwards), all_spectra(source, catalogue.layers)
    assert [len(values) for values in found] == [layer.full_rank for layer in backwards]
    assert all(torch.equal(a, b) for a, b in zip(found, forwards[::-1], strict=True))


def test_progress_counts_layers(source: MemorySource, catalogue: Catalogue) -> None:
    seen: list[tuple[int, int]] = []
    all_spectra(source, catalogue.layers, lambda done, total, _: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(catalogue), len(catalogue))


def test_groups_are_in_network_order_and_contain_every_layer_once(
    catalogue: Catalogue, report: SpectrumReport
) -> None:
    assert [part.name for part in report.parts] == ["unet", "te1", "te2"]
    names = [block.name for block in report.blocks]
    assert names[:4] == ["down.0", "down.1", "down.2", "mid"]
    assert names[-1] == "te2.1"
    for groups in (report.parts, report.blocks, (report.total,)):
        assert sum(group.layers for group in groups) == len(catalogue)
        total = sum(group.norm**2 for group in groups)
        assert total == pytest.approx(report.total.norm**2)
        held = sum(group.norm**2 * group.energies[4] for group in groups)
        assert held / total == pytest.approx(report.total.energies[4])


def test_lowest_and_highest_are_the_range_of_the_layers(report: SpectrumReport) -> None:
    for rank in CURVE_RANKS:
        energies = [layer.energies[rank] for layer in report.layers if layer.part == "te1"]
        te1 = report.parts[1]
        assert (te1.lowest[rank], te1.highest[rank]) == (min(energies), max(energies))
        assert te1.lowest[rank] <= te1.energies[rank] <= te1.highest[rank] + 1e-12


def test_layers_have_all_energy_at_their_full_rank(report: SpectrumReport) -> None:
    assert len(report.smaller_than(257)) == len(report.layers)
    assert report.smaller_than(4) == ()
    for layer in report.layers:
        assert layer.full_rank == min(layer.shape[0], torch.Size(layer.shape[1:]).numel())
        assert all(layer.energies[rank] == 1.0 for rank in CURVE_RANKS if rank >= layer.full_rank)
        assert layer.energies[1] < 1.0
        assert 1 <= layer.rank_90 <= layer.full_rank
    assert report.total.energies[256] == pytest.approx(1.0, abs=1e-12)


def test_costs_are_those_of_the_measured_layers(source: MemorySource, catalogue: Catalogue) -> None:
    part = replace(catalogue, layers=catalogue.layers[:5])
    report = measure_spectra(source, part)
    assert [cost.rank for cost in report.costs] == list(RANKS)
    assert report.costs[0] == rank_cost(part, 16)
    assert report.costs[0].file_bytes < rank_cost(catalogue, 16).file_bytes
    assert set(RANKS) <= set(CURVE_RANKS)


def test_a_damaged_layer_is_named(source: MemorySource, catalogue: Catalogue) -> None:
    layer = catalogue.layers[3]
    broken = source.values[layer.tensor].clone()
    broken.view(-1)[7] = float("nan")
    damaged = replace(source, values={**source.values, layer.tensor: broken})
    message = f"layer {layer.name} of {source.label}: 1 of {broken.numel()} values are NaN or infinite"
    with pytest.raises(InputError) as refused:
        measure_spectra(damaged, catalogue)
    assert refused.value.what == message


def test_other_dtypes_are_refused_before_anything_is_read(source: MemorySource, catalogue: Catalogue) -> None:
    layer = catalogue.layers[-1]
    integers = replace(
        source, values={**source.values, layer.tensor: source.values[layer.tensor].to(torch.int8)}
    )
    seen: list[int] = []
    with pytest.raises(InputError, match=f"layer {layer.name} of .* is stored in int8"):
        all_spectra(integers, catalogue.layers, lambda done, *_: seen.append(done))
    assert seen == []


def test_a_zero_model_has_all_of_its_energy_at_any_rank(source: MemorySource, catalogue: Catalogue) -> None:
    zero = replace(source, values={name: torch.zeros_like(t) for name, t in source.values.items()})
    report = measure_spectra(zero, catalogue)
    assert report.total.energies[1] == 1.0
    assert report.total.norm == 0.0
    assert report.total.median_decay is None
    assert report.layers[0].rank_90 == 0
