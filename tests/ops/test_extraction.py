"""Test `export --form tuned`: tuned adapters of checkpoints and LoRAs, and their stated loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spectune
from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.core.linalg import norm
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Role
from spectune.sdxl.layers import build_catalogue, layer_weight
from tests.sample_pairs import changed_copy, recast, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recast(tiny_checkpoint, tmp_path_factory.mktemp("extract") / "base.safetensors", torch.float32)


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """Return another checkpoint: the UNet's layers and one norm differ."""
    generator = torch.Generator().manual_seed(0)
    changes = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(base).items()
        if (tensor.ndim > 1 and "diffusion_model.middle" in name)
        or name.endswith("input_blocks.3.1.norm.weight")
    }
    return changed_copy(base, base.with_name("tuned.safetensors"), changes)


def test_the_stated_loss_is_that_of_the_rebuilt_model(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = spectune.export(tuned, tmp_path / "a.safetensors", base=base, form="tuned", rank=4)
    rebuilt = spectune.rebuild(base, report.path, tmp_path / "b.safetensors").path
    with open_checkpoint(base) as one, open_checkpoint(tuned) as two, open_checkpoint(rebuilt) as three:
        for layer in report.layers:
            record = build_catalogue(one).by_name[layer.name]
            before, wanted, made = (layer_weight(source, record) for source in (one, two, three))
            if not layer.norm:
                assert torch.equal(before, made)
                continue
            assert norm(wanted - before) == pytest.approx(layer.norm, rel=1e-5)
            assert norm(wanted - made) / layer.norm == pytest.approx(layer.error, rel=1e-4)
            assert abs(norm(wanted - before - 1.01 * (made - before)) / layer.norm / layer.error - 1) > 1e-6
    assert 0.3 < report.error < 1
    assert report.warnings == (
        f"{report.error:.0%} of the change is lost, because it is outside the principal directions: pass a "
        "higher `rank`; to keep the whole change, use the model or the adapter itself as the base of the "
        "training",
    )
    assert list(report.outside or {}) == ["model.diffusion_model.input_blocks.3.1.norm.weight"]
    with open_checkpoint(report.path) as file:
        declared = file.provenance
    assert (declared.role, declared.base_name, declared.frame) == (Role.TUNED, base.name, "principal")
    full = spectune.export(tuned, tmp_path / "c.safetensors", base=base, form="tuned", rank=999)
    assert full.error < 1e-5
    assert full.warnings == ()


def test_a_lora_inside_the_principal_is_recovered(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    pair = tiny_split(None)
    trained = saved_tuned(tuned_from(tiny_checkpoint, pair, size=0.05), tmp_path / "trained.safetensors")
    lora = spectune.export(trained, tmp_path / "lora.safetensors", base=tiny_checkpoint, dtype="float32").path
    report = spectune.export(
        lora, tmp_path / "a.safetensors", base=tiny_checkpoint, form="tuned", principal=pair.principal
    )
    assert report.error < 1e-4
    with open_checkpoint(tiny_checkpoint) as source:
        catalogue = build_catalogue(source)
    with open_adapter(trained, catalogue) as one, open_adapter(report.path, catalogue) as other:
        assert isinstance(other, TunedAdapter)
        assert other.provenance.principal_hash == pair.principal_hash
        for name in list(one.layers)[::20]:
            wanted = change(one.layers[name])
            assert norm(change(other.layers[name]) - wanted) < 1e-4 * norm(wanted)
            assert torch.equal(other.layers[name].frame.up, one.layers[name].frame.up)


def test_options_that_do_not_fit_are_refused(
    base: Path, tuned: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    out, pair = tmp_path / "x.safetensors", tiny_split(None)
    for options, message in (
        ({}, "a tuned adapter needs the model that it changes"),
        (
            {"base": base, "keys": "diffusers", "energy": 0.9},
            "`energy`, `keys` cannot apply to a tuned adapter",
        ),
        (
            {"base": base, "principal": pair.principal, "rank": 4},
            "`rank` cannot apply .*the principal has its",
        ),
        ({"base": tuned}, "no layer of tuned.safetensors differs from tuned.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            spectune.export(tuned, out, form="tuned", **options)
    with pytest.raises(PairingError, match="was split from base"):
        spectune.export(tuned, out, base=base, form="tuned", principal=pair.principal)
    assert list(tmp_path.iterdir()) == []
