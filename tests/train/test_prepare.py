"""Which files a run can start from, and that they all start the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectune.errors import InputError, PairingError
from spectune.model.inject import Injection
from spectune.model.sdxl import Sdxl
from spectune.model.text import tokenize
from spectune.rebuild.files import SplitReport, split_checkpoint
from spectune.rebuild.ranks import FixedRank
from spectune.train.prepare import Prepared, prepare
from spectune.train.recipe import ModelSection
from spectune.weights.provenance import weights_hash
from spectune.weights.reader import open_checkpoint
from spectune.weights.writer import write_tensors


@pytest.fixture(scope="module")
def split(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitReport:
    folder = tmp_path_factory.mktemp("split")
    return split_checkpoint(tiny_checkpoint, folder, ranks=FixedRank(4), residual_dtype=torch.float32)


def prepared(base: Path, **keys: Any) -> Prepared:
    return prepare(ModelSection(base=base, **keys))


@torch.no_grad()
def answer(model: Sdxl) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(2, 4, 8, 8, generator=generator)
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
    return model.denoise(noised, torch.tensor([10, 900]), model.encode_text(tokenize(["a", "b c"])), time_ids)


def trained_parts(injection: Injection) -> set[str]:
    return {name.partition(".")[0] for name in injection.layers}


def test_all_starts_are_the_same_model(tiny_checkpoint: Path, split: SplitReport) -> None:
    assert split.residual is not None
    original = answer(prepared(tiny_checkpoint, rank=4).model)  # the delta form changes nothing at step 0
    starts = [
        prepared(tiny_checkpoint, principal=split.principal),
        prepared(tiny_checkpoint, principal=split.principal, form="residual"),
        prepared(split.residual, principal=split.principal, form="residual"),
        prepared(split.residual, principal=split.principal, form="residual", parts=("te1",)),
    ]
    scale = original.abs().max()
    for start in starts:
        assert (answer(start.model) - original).abs().max() < 1e-5 * scale
        assert start.origin.base_hash == split.base_hash
        assert start.origin.principal_hash == split.principal_hash
        assert start.origin.base_name == tiny_checkpoint.name
    assert starts[0].frame_hash == starts[1].frame_hash == starts[2].frame_hash
    assert trained_parts(starts[2].injection) == {"unet", "te1", "te2"}
    assert trained_parts(starts[3].injection) == {"te1"}


def test_without_its_principal_a_residual_is_another_model(tiny_checkpoint: Path, split: SplitReport) -> None:
    assert split.residual is not None
    start = prepared(split.residual, principal=split.principal, form="residual")
    original = answer(prepared(tiny_checkpoint, rank=4).model)
    with start.injection.switched_off():
        assert (answer(start.model) - original).abs().max() > 1e-2 * original.abs().max()


def test_a_principal_of_another_base_is_refused(
    tiny_checkpoint: Path, split: SplitReport, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    with open_checkpoint(tiny_checkpoint) as base:
        tensors = {name: base.load(name).clone() for name in base.tensors}
        tensors["model.diffusion_model.out.2.bias"] += 1
        found = write_tensors(other, tensors, metadata=base.metadata)
        own = weights_hash(base)
    with pytest.raises(PairingError) as caught:
        prepared(other, principal=split.principal)
    assert found[:16] in caught.value.what
    assert own[:16] in caught.value.what


def test_files_in_the_wrong_place(tiny_checkpoint: Path, split: SplitReport) -> None:
    assert split.residual is not None
    with pytest.raises(InputError, match="is a principal file: expected a checkpoint"):
        prepared(split.principal, rank=4)
    with pytest.raises(InputError, match="is a residual: the delta form trains on the original weights"):
        prepared(split.residual, principal=split.principal)
    with pytest.raises(InputError, match="is a residual: its principal directions are in another file"):
        prepared(split.residual, rank=4, form="residual")
