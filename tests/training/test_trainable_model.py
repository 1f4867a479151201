"""The files that a run can start from. All of them give the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from spectune.checkpoints.open import open_checkpoint
from spectune.core.linalg import row_norms
from spectune.errors import InputError, PairingError
from spectune.files.provenance import LAYOUT_KEY, FrameKind, Provenance, Role
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import write_tensors
from spectune.model.inject import Injection
from spectune.model.network import Sdxl
from spectune.model.text import tokenize
from spectune.ops.split import SplitReport, split
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.trainable_model import TrainableModel, build_trainable


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitReport:
    folder = tmp_path_factory.mktemp("split")
    return split(tiny_checkpoint, folder, rank=4, residual_dtype=torch.float32)


def trainable(base: Path, **keys: Any) -> TrainableModel:
    return build_trainable(ModelSection(base=base, **keys))


@torch.no_grad()
def predict(model: Sdxl) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(2, 4, 8, 8, generator=generator)
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
    return model.denoise(noised, torch.tensor([10, 900]), model.encode_text(tokenize(["a", "b c"])), time_ids)


def trained_parts(injection: Injection) -> set[str]:
    return {name.partition(".")[0] for name in injection.layers}


def test_all_files_give_the_same_model(tiny_checkpoint: Path, pair: SplitReport) -> None:
    assert pair.residual is not None
    original = predict(trainable(tiny_checkpoint, rank=4).sdxl)  # the delta form changes nothing at step 0
    starts = [
        trainable(tiny_checkpoint, principal=pair.principal),
        trainable(tiny_checkpoint, principal=pair.principal, form="residual"),
        trainable(pair.residual, principal=pair.principal, form="residual"),
        trainable(pair.residual, principal=pair.principal, form="residual", parts=("te1",)),
    ]
    scale = original.abs().max()
    for start in starts:
        assert (predict(start.sdxl) - original).abs().max() < 1e-5 * scale
        assert start.provenance.base_hash == pair.base_hash
        assert start.provenance.principal_hash == pair.principal_hash
        assert start.provenance.base_name == tiny_checkpoint.name
    assert starts[0].frame_hash == starts[1].frame_hash == starts[2].frame_hash
    assert trained_parts(starts[2].injection) == {"unet", "te1", "te2"}
    assert trained_parts(starts[3].injection) == {"te1"}


def test_a_residual_without_its_principal_is_another_model(tiny_checkpoint: Path, pair: SplitReport) -> None:
    assert pair.residual is not None
    start = trainable(pair.residual, principal=pair.principal, form="residual")
    original = predict(trainable(tiny_checkpoint, rank=4).sdxl)
    with start.injection.switched_off():
        assert (predict(start.sdxl) - original).abs().max() > 1e-2 * original.abs().max()


def test_a_principal_of_another_base_is_refused(
    tiny_checkpoint: Path, pair: SplitReport, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    with open_checkpoint(tiny_checkpoint) as base:
        tensors = {name: base.load(name).clone() for name in base.tensors}
        tensors["model.diffusion_model.out.2.bias"] += 1
        other_hash = write_tensors(other, tensors, metadata=base.metadata)
        base_hash = weights_hash(base)
    with pytest.raises(PairingError) as caught:
        trainable(other, principal=pair.principal)
    assert other_hash[:16] in caught.value.what
    assert base_hash[:16] in caught.value.what


def test_files_of_the_wrong_kind_are_refused(tiny_checkpoint: Path, pair: SplitReport) -> None:
    assert pair.residual is not None
    with pytest.raises(InputError, match="is a principal file: expected a checkpoint"):
        trainable(pair.principal, rank=4)
    with pytest.raises(InputError, match="is a residual: the delta form trains on the original weights"):
        trainable(pair.residual, principal=pair.principal)
    with pytest.raises(InputError, match="is a residual: it can only be trained with its principal"):
        trainable(pair.residual, rank=4, form="residual")


def without_metadata(source: Path, target: Path, *, drop: str = "") -> Path:
    """Copy a file without spectune's metadata, as if another tool had written it."""
    with open_checkpoint(source) as file:
        layout = {key: value for key, value in file.metadata.items() if key == LAYOUT_KEY}
        tensors = {name: file.load(name) for name in file.tensors if not drop or not name.endswith(drop)}
    write_tensors(target, tensors, metadata=layout)
    return target


def test_a_run_can_start_from_files_of_other_tools(
    tiny_checkpoint: Path, pair: SplitReport, tmp_path: Path
) -> None:
    """A residual and a principal without metadata, the principal without its alphas."""
    assert pair.residual is not None
    residual = without_metadata(pair.residual, tmp_path / "diff.safetensors")
    principal = without_metadata(pair.principal, tmp_path / "ext.safetensors", drop=".alpha")
    section = ModelSection(residual=residual, principal=principal, form="residual")
    start = build_trainable(section)
    original = predict(trainable(tiny_checkpoint, rank=4).sdxl)
    assert (predict(start.sdxl) - original).abs().max() < 1e-5 * original.abs().max()
    assert start.provenance.base_name == "diff.safetensors"

    # as model.base, it is used as a complete model
    wrong = build_trainable(ModelSection(base=residual, principal=principal, form="residual"))
    assert (predict(wrong.sdxl) - original).abs().max() > 1e-2 * original.abs().max()


def test_the_base_hash_of_another_tools_residual_differs_from_its_hash_and_the_original(
    pair: SplitReport, tmp_path: Path
) -> None:
    assert pair.residual is not None
    residual = without_metadata(pair.residual, tmp_path / "diff.safetensors")
    start = build_trainable(ModelSection(residual=residual, principal=pair.principal, form="residual"))
    with open_checkpoint(residual) as file:
        assert start.provenance.base_hash not in (None, weights_hash(file), pair.base_hash)


def test_bf16_parameters_of_the_residual_form_start_from_the_same_model(
    tiny_checkpoint: Path, pair: SplitReport
) -> None:
    """The factors are rounded before training, and the residual is computed from the rounded factors."""
    assert pair.residual is not None
    original = predict(trainable(tiny_checkpoint, rank=4).sdxl)
    for base in (tiny_checkpoint, pair.residual):
        section = ModelSection(base=base, principal=pair.principal, form="residual")
        start = build_trainable(section, trained_dtype=torch.bfloat16)
        layer = next(iter(start.injection.layers.values()))
        assert layer.down.dtype == torch.bfloat16
        assert (predict(start.sdxl) - original).abs().max() < 1e-4 * original.abs().max()
        assert not any(tensor.any() for tensor in layer.trained_change())


def test_a_complete_model_is_not_accepted_as_a_residual(
    tiny_checkpoint: Path, pair: SplitReport, tmp_path: Path
) -> None:
    stamped = tmp_path / "model.safetensors"
    with open_checkpoint(tiny_checkpoint) as file:
        tensors = {name: file.load(name) for name in file.tensors}
        metadata = {**file.metadata, **Provenance(role=Role.MODEL).to_metadata()}
    write_tensors(stamped, tensors, metadata=metadata)
    section = ModelSection(residual=stamped, principal=pair.principal, form="residual")
    with pytest.raises(InputError, match="is a complete model: model"):
        build_trainable(section)


@pytest.mark.parametrize("frame", get_args(FrameKind))
def test_every_frame_starts_as_the_original_bit_for_bit(tiny_checkpoint: Path, frame: str) -> None:
    """Gradient and data frames are still plain frames here, because no batch has been read."""
    start = trainable(tiny_checkpoint, rank=4, frame=frame, layers=("all",))
    assert "unet.time_embed.0" in start.injection.layers
    assert start.provenance.frame == frame
    framed = predict(start.sdxl)
    with start.injection.switched_off():
        assert torch.equal(framed, predict(start.sdxl))


@pytest.mark.parametrize("frame", ["minor", "plain", "svd-down"])
def test_other_frames_of_the_residual_form(tiny_checkpoint: Path, frame: str) -> None:
    original = predict(trainable(tiny_checkpoint, rank=4).sdxl)
    start = trainable(tiny_checkpoint, rank=4, frame=frame, form="residual")
    assert (predict(start.sdxl) - original).abs().max() < 1e-5 * original.abs().max()


def test_the_seed_determines_a_plain_frame(tiny_checkpoint: Path) -> None:
    section = ModelSection(base=tiny_checkpoint, rank=4, frame="plain", parts=("te1",), frame_norm=1.0)
    one, same, other = (build_trainable(section, seed=seed) for seed in (1, 1, 2))
    assert one.frame_hash == same.frame_hash != other.frame_hash
    first, second = [layer.frame_down for layer in one.injection.layers.values()][:2]
    assert not torch.equal(first, second)
    assert row_norms(first).tolist() == pytest.approx([1.0] * 4)


def test_rank_stabilized_scaling_is_stored_as_alpha(tiny_checkpoint: Path) -> None:
    keys: dict[str, Any] = {"rank": 4, "conv_rank": 1, "frame": "svd-down", "parts": ("unet",)}
    frames = trainable(tiny_checkpoint, scaling="rank_stabilized", **keys).injection.frames()
    assert {(frame.rank, frame.alpha) for frame in frames.values()} == {(4, 8.0), (1, 4.0)}
    frames = trainable(tiny_checkpoint, **keys).injection.frames()
    assert {(frame.rank, frame.alpha) for frame in frames.values()} == {(4, 4.0), (1, 1.0)}
    with pytest.raises(ValidationError, match="with another B0 than zero, the scale would change the base"):
        ModelSection(base=tiny_checkpoint, rank=4, scaling="rank_stabilized")


def test_layers_are_selected_as_in_split(tiny_checkpoint: Path) -> None:
    start = trainable(tiny_checkpoint, rank=4, layers=("unet.*attn2*", "te1", "!te1.1"), parts=("unet",))
    assert start.injection.layers
    assert all("attn2" in name for name in start.injection.layers)
    assert start.provenance.frame == "principal"
    with pytest.raises(InputError, match=r"no layer to train: model\.layers = te1 has no layers in unet"):
        trainable(tiny_checkpoint, rank=4, layers=("te1",), parts=("unet",))
    with pytest.raises(InputError, match=r"no layer matches `atn2`"):
        trainable(tiny_checkpoint, rank=4, layers=("atn2",))


def test_convolutions_can_have_their_own_rank(tiny_checkpoint: Path) -> None:
    start = trainable(tiny_checkpoint, rank=4, conv_rank=2)
    ranks = {
        (layer.down.ndim == 4 and layer.down.shape[-1] > 1): layer.down.shape[0]
        for layer in start.injection.layers.values()
    }
    assert ranks == {False: 4, True: 2}
