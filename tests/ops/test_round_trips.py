"""Test round trips of files for any layers, ranks and dtypes: split and rebuild, export and apply."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta
from spectune.core.linalg import norm
from spectune.files.provenance import Provenance
from spectune.ops.export import export
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.sdxl.layers import Layer, build_catalogue
from tests.sample_pairs import open_principal, random_delta, recast, saved_tuned

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
types = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
subsets = st.integers(1, (1 << 24) - 1)  # layer n is selected by bit n mod 24
ranks = st.integers(1, 12)
# every example reads and writes several 4 MB files
few = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layers_of(base: Path) -> tuple[Layer, ...]:
    with open_checkpoint(base) as source:
        return build_catalogue(source, all_layers=True).layers


def chosen(base: Path, subset: int) -> list[str]:
    """Return a subset of all layers, which include fused layers, convolutions and both ends of the UNet."""
    names = [layer.name for n, layer in enumerate(layers_of(base)) if subset >> (n % 24) & 1]
    return names or [layers_of(base)[0].name]


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@given(subset=subsets, rank=ranks, conv_rank=ranks, store=types, dtype=types)
@few
def test_split_and_rebuild_restore_every_bit(
    tiny_checkpoint: Path, subset: int, rank: int, conv_rank: int, store: torch.dtype, dtype: torch.dtype
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = recast(tiny_checkpoint, folder / "base.safetensors", dtype)
        report = split(
            base,
            folder,
            rank=rank,
            conv_rank=conv_rank,
            dtype=store,
            residual_dtype=WIDER[dtype],
            layers=chosen(tiny_checkpoint, subset),
        )
        assert report.residual is not None
        rebuilt = rebuild(report.residual, report.principal, folder / "again.safetensors")
        assert rebuilt.identical
        before, after = load_file(base), load_file(rebuilt.path)
        assert before.keys() == after.keys()
        assert all(same_bits(before[key], after[key]) for key in before)


def tuned_on(base: Path, folder: Path, subset: int, rank: int, size: float) -> Path:
    """Return a tuned adapter for some layers, trained from a principal of the model."""
    report = split(base, folder, rank=rank, layers=chosen(base, subset), with_residual=False)
    principal = open_principal(base, report.principal)
    with principal:
        deltas = {
            name: random_delta(Delta(principal.layers[name], torch.empty(0), torch.empty(0)), size, seed)
            for seed, name in enumerate(principal.layers)
        }
    declared = Provenance.from_metadata(principal.metadata)
    provenance = replace(declared, principal_hash=report.principal_hash)
    return saved_tuned(TunedAdapter(deltas, provenance.to_metadata(), "tuned"), folder / "tuned.safetensors")


@given(
    subset=subsets,
    rank=ranks,
    size=st.sampled_from([1e-3, 1e-2, 0.1]),
    store=st.sampled_from([(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5)]),
)
@few
@pytest.mark.slow
def test_original_and_exported_lora_give_the_tuned_model(
    tiny_checkpoint: Path, subset: int, rank: int, size: float, store: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = store
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tuned = tuned_on(tiny_checkpoint, folder, subset, rank, size)
        lora = export(tuned, folder / "lora.safetensors", base=tiny_checkpoint, dtype=dtype)
        weights = {
            title: load_file(
                rebuild(tiny_checkpoint, path, folder / f"{title}.safetensors", dtype=torch.float32).path
            )
            for title, path in (("exact", tuned), ("applied", lora.path))
        }
        original = load_file(tiny_checkpoint)
        exported = {layer.name for layer in lora.layers}
        touched = {layer.tensor for layer in layers_of(tiny_checkpoint) if layer.name in exported}
        assert touched
        for key in original:
            exact, applied = weights["exact"][key], weights["applied"][key]
            if key not in touched:
                assert same_bits(exact, original[key])
                assert same_bits(applied, original[key])
                continue
            change = norm(exact - original[key].float())
            # float32 sums have an error of 2^-24 of the weight; the change may be only 1e-4 of the weight
            rounding = 2**-23 * norm(exact)
            assert norm(applied - exact) <= tolerance * change + rounding, key
        assert lora.error < tolerance
