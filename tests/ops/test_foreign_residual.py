"""Test rebuilding from another program's residual and an adapter that spectune trained on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.writer import save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import added_to_residual
from spectune.core.low_rank import product
from spectune.errors import PairingError
from spectune.files.provenance import Provenance
from spectune.files.weights_hash import weights_hash
from spectune.ops.rebuild import rebuild
from spectune.pairs.rules import foreign_residual_hash
from spectune.sdxl.layers import build_catalogue, layer_weight
from tests.sample_pairs import tuned_from
from tests.split_fixtures import TinySplit


@pytest.fixture
def residual(tiny_split: TinySplit, tmp_path: Path) -> Path:
    """Return a residual without metadata."""
    made = tiny_split(torch.float32).residual
    assert made is not None
    path = tmp_path / "diff.safetensors"
    save_file({name: t for name, t in load_file(made).items() if "spectune" not in name}, path)
    return path


def tuned_on(residual: Path, tuned: TunedAdapter, out: Path) -> Path:
    """Save the tuned adapter as training on such a residual does."""
    declared = Provenance.from_metadata(tuned.metadata)
    with open_checkpoint(residual) as source:
        residual_hash = foreign_residual_hash(weights_hash(source), declared.principal_hash)
    save_tuned(out, tuned, replace(declared, base_hash=residual_hash))
    return out


def test_the_tuned_factors_replace_the_principal(
    tiny_checkpoint: Path, tiny_split: TinySplit, residual: Path, tmp_path: Path
) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(torch.float32), size=0.02)
    path = tuned_on(residual, tuned, tmp_path / "tuned.safetensors")
    out = rebuild(residual, path, tmp_path / "rebuilt.safetensors", dtype=torch.float32).path
    with open_checkpoint(residual) as rest, open_checkpoint(out) as rebuilt:
        for layer in build_catalogue(rest):
            expected = layer_weight(rest, layer) + product(added_to_residual(tuned.layers[layer.name]))
            assert torch.allclose(layer_weight(rebuilt, layer), expected, rtol=1e-6, atol=1e-7)


def test_the_adapter_is_refused_for_the_original(
    tiny_checkpoint: Path, tiny_split: TinySplit, residual: Path, tmp_path: Path
) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(torch.float32), size=0.02)
    path = tuned_on(residual, tuned, tmp_path / "tuned.safetensors")
    with pytest.raises(PairingError, match="was trained from base"):
        rebuild(tiny_checkpoint, path, tmp_path / "rebuilt.safetensors")
    assert not (tmp_path / "rebuilt.safetensors").exists()


def test_an_adapter_with_a_part_of_the_principal_is_refused(
    tiny_checkpoint: Path, tiny_split: TinySplit, residual: Path, tmp_path: Path
) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(torch.float32), size=0.02, only="unet.")
    path = tuned_on(residual, tuned, tmp_path / "tuned.safetensors")
    with pytest.raises(PairingError, match=r"lacks the principal of \d+ of its layers: te1"):
        rebuild(residual, path, tmp_path / "rebuilt.safetensors")
