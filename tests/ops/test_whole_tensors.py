"""Files of complete tensors only, as full fine-tuning writes them, in every command that takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectune
from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.writer import save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.core.spectrum import squares_at
from spectune.errors import InputError
from spectune.files.provenance import Provenance
from spectune.files.weights_hash import weights_hash
from spectune.ops.inspect.summary import AdapterSummary
from spectune.ops.options.values import Slice, parse_slice
from spectune.ops.slice.adapters import SliceReport
from tests.loras import same_bits

UNET = "model.diffusion_model."
WEIGHT, CONV = f"{UNET}middle_block.0.emb_layers.1.weight", f"{UNET}middle_block.0.in_layers.2.weight"
BIAS = f"{UNET}out.2.bias"
FUSED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
NAMES = (WEIGHT, CONV, BIAS, FUSED)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> dict[str, Tensor]:
    base, generator = load_file(tiny_checkpoint), torch.Generator().manual_seed(5)
    return {
        name: (base[name].float() + 0.1 * torch.randn(base[name].shape, generator=generator)).bfloat16()
        for name in NAMES
    }


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Path, whole: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "full.safetensors"
    with open_checkpoint(tiny_checkpoint) as source:
        base_hash = weights_hash(source)
    tuned = TunedAdapter({}, {}, out.name, replaced=whole)
    save_tuned(out, tuned, Provenance(base_hash=base_hash, base_name=tiny_checkpoint.name))
    return out


def pieces(*words: str) -> tuple[Slice, ...]:
    return tuple(map(parse_slice, words))


def test_rebuild_copies_the_bits_and_verify_finds_one_that_differs(
    path: Path, whole: dict[str, Tensor], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    report = spectune.rebuild(tiny_checkpoint, path, out, dtype="bfloat16")
    found = load_file(out)
    assert all(same_bits(found[name], whole[name]) for name in NAMES)
    assert (report.changed_tensors, report.warnings) == (4, ())
    assert report.layers["unet"][0] == 2
    assert report.layers["te2"][0] == 3  # q, k and v of one tensor
    assert spectune.verify(out, tiny_checkpoint, path).exact
    assert run(["verify", str(out), str(tiny_checkpoint), str(path)]) == 0
    save_file({**found, BIAS: found[BIAS] * 1.01}, out)
    verified = spectune.verify(out, tiny_checkpoint, path)
    assert verified.problems == (f"1 tensor of x.safetensors differ from base + tuned adapter: {BIAS}",)


def test_a_rounded_copy_is_counted(path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = spectune.rebuild(tiny_checkpoint, path, tmp_path / "x.safetensors")
    assert report.warnings[0].startswith("4 complete tensors of full.safetensors rounded from bfloat16 to")
    assert spectune.verify(report.path, tiny_checkpoint, path).exact


def test_another_base_is_refused(path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    tensors = load_file(tiny_checkpoint)
    save_file({**tensors, BIAS: tensors[BIAS] + 1}, other)
    for call in (
        lambda: spectune.rebuild(other, path, tmp_path / "x.safetensors"),
        lambda: spectune.verify(other, other, path),
        lambda: spectune.export(path, tmp_path / "x.safetensors", base=other, rank=2),
    ):
        with pytest.raises(spectune.PairingError, match=r"full\.safetensors was trained from base"):
            call()
    assert not (tmp_path / "x.safetensors").exists()


def test_slice_takes_parts(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    report = spectune.slice(pieces(f"{path}:te"), out)
    assert isinstance(report, SliceReport)
    assert load_file(out).keys() == {f"replaced.{FUSED}"}
    assert len(report.slices[0].removed) == 3
    spectune.slice(pieces(f"{path}:te", f"{path}:unet"), out, force=True)
    assert load_file(out).keys() == {f"replaced.{name}" for name in NAMES}
    cases = {
        f"{path}:content": "which are sliced by part: expected one of unet, te, te1, te2",
        f"{path}:unet:0.5": "a weight cannot apply",
        f"{path}:te1": "changes nothing there",
    }
    for piece, what in cases.items():
        with pytest.raises(InputError, match=what):
            spectune.slice(pieces(piece), tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="4 tensors in more than one slice"):
        spectune.slice(pieces(str(path), str(path)), tmp_path / "y.safetensors")


def test_export_writes_the_best_factors_and_counts_the_rest(
    path: Path, whole: dict[str, Tensor], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = load_file(tiny_checkpoint)
    changes = {name: whole[name].float() - base[name].float() for name in NAMES}
    report = spectune.export(path, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=4)
    assert set(report.outside or ()) == {BIAS}
    total = sum(float(change.square().sum()) for change in changes.values())
    layers = [changes[WEIGHT], changes[CONV], *changes[FUSED].chunk(3)]
    for rank, share in report.held.items():
        exact = sum(float(torch.linalg.svdvals(one.flatten(1))[:rank].square().sum()) for one in layers)
        assert share == pytest.approx(exact / total, rel=1e-4)
    assert list(report.held) == [4, 16, 64, 128]
    assert 1 - report.error**2 == pytest.approx(
        report.held[4] * total / (total - float(changes[BIAS].square().sum())), abs=1e-3
    )
    whole_rank = spectune.export(
        path, tmp_path / "y.safetensors", base=tiny_checkpoint, rank=4096, dtype="float32"
    )
    assert whole_rank.error < 1e-4


def test_squares_at_ranks_above_the_full_rank_are_all() -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    low, full, above = squares_at(weight, (1, 6, 100)).tolist()
    assert low < full == above == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_inspect_counts_them(
    path: Path, whole: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    found = spectune.inspect(path)
    assert isinstance(found, AdapterSummary)
    numbers = sum(tensor.numel() for tensor in whole.values())
    assert (found.role, found.replaced, found.replaced_parameters) == ("tuned", 4, numbers)
    assert run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().err
    assert "full.safetensors: tuned adapter of complete tensors" in shown
    assert "`spectune rebuild MODEL FILE` writes the checkpoint" in shown
