from __future__ import annotations

import pytest
import torch

from spectune.adapters.alphas import alpha_problems, read_alphas
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource
from spectune.sdxl.layers import Layer, build_catalogue
from tests.sample_adapters import Tensors, as_tuned, pair, pairs, without

OURS = Provenance(role=Role.PRINCIPAL).to_metadata()


@pytest.fixture(scope="module")
def layers(source: MemorySource) -> list[Layer]:
    return list(build_catalogue(source).layers[:20])


@pytest.fixture
def plain(layers: list[Layer]) -> Tensors:
    return pairs(layers, rank=3)


def test_a_principal_has_alpha_equal_to_rank(plain: Tensors, layers: list[Layer]) -> None:
    assert alpha_problems(MemorySource(plain, OURS)) == []
    assert alpha_problems(MemorySource(as_tuned(plain), OURS)) == []
    found = read_alphas(MemorySource(plain, OURS))
    assert {(alpha.rank, alpha.value) for alpha in found.values()} == {(3, 3.0)}
    assert list(found) == [layer.kohya for layer in layers]


def test_alpha_other_than_the_rank_is_a_problem_only_in_spectune_files(
    plain: Tensors, layers: list[Layer]
) -> None:
    tensors = plain | pair(layers[4], rank=3, alpha=3.03)
    assert alpha_problems(MemorySource(tensors, {})) == []
    assert alpha_problems(MemorySource(tensors, OURS)) == [
        f"1 layer with alpha different from the rank: {layers[4].kohya} 3.03 for 3"
    ]


def test_missing_and_invalid_alphas_are_reported(plain: Tensors, layers: list[Layer]) -> None:
    tensors = without(plain, f"{layers[0].kohya}.alpha")
    tensors[f"{layers[1].kohya}.alpha"] = torch.tensor([3.0, 3.0])
    tensors[f"{layers[2].kohya}.alpha"] = torch.tensor(float("nan"))
    assert alpha_problems(MemorySource(tensors, {})) == [
        f"1 layer without alpha: programs disagree about the scale: {layers[0].kohya}",
        f"2 layers with an alpha that is not a finite number: {layers[1].kohya}, {layers[2].kohya}",
    ]


@pytest.mark.parametrize(
    ("rank", "dtype", "held"),
    [
        (256, torch.bfloat16, True),
        (257, torch.bfloat16, False),
        (301, torch.bfloat16, False),
        (301, torch.float16, True),
        (2049, torch.float16, False),
        (2049, torch.float32, True),
    ],
)
def test_alphas_that_16_bits_cannot_hold_are_reported(
    rank: int, dtype: torch.dtype, held: bool, plain: Tensors, layers: list[Layer]
) -> None:
    tensors = plain | pair(layers[3], rank=rank)
    tensors[f"{layers[3].kohya}.alpha"] = torch.tensor(float(rank)).to(dtype)
    problems = alpha_problems(MemorySource(tensors, {}))
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype)
    stored = float(tensors[f"{layers[3].kohya}.alpha"])
    expected = f"{layers[3].kohya} {stored:g} for {rank} in {name}"
    assert problems == (
        [] if held else [f"1 layer with an alpha whose dtype cannot hold the rank: {expected}"]
    )
