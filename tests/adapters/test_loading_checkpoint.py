from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel

from spectune.adapters.loading import Loading, loading_table
from spectune.adapters.programs import Program
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.reader import Checkpoint
from spectune.files.source import MemorySource, RenamedFiles, RenamedTensor, TensorInfo
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT, VAE_ROOT
from tests.layouts import Modules

COMFYUI, SD_SCRIPTS, DIFFUSERS = Program.COMFYUI, Program.SD_SCRIPTS, Program.DIFFUSERS


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Return the tensors of SDXL without values."""
    return {info.name: torch.empty(info.shape, device="meta") for info in full_infos.values()}


def loadings_of(
    tensors: Mapping[str, torch.Tensor], provenance: Provenance | None = None
) -> dict[Program, Loading]:
    metadata = (provenance or Provenance()).to_metadata()
    return {loading.program: loading for loading in loading_table(MemorySource(tensors, metadata))}


def outside(tensors: Mapping[str, torch.Tensor], root: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(root)}


def test_all_tensors_load_everywhere(full: dict[str, torch.Tensor]) -> None:
    loadings = loadings_of(full)
    assert list(loadings) == [COMFYUI, SD_SCRIPTS, DIFFUSERS]
    assert {(loading.loads, loading.of) for loading in loadings.values()} == {(2515, 2515)}
    assert all(loading.complete for loading in loadings.values())
    assert loadings[COMFYUI].row == ("ComfyUI", "2515 of 2515", "", "")


def test_tensors_that_no_module_uses_are_optional(full: dict[str, torch.Tensor]) -> None:
    bare = dict(full)
    del bare[f"{TE1_ROOT}embeddings.position_ids"], bare[f"{TE2_ROOT}logit_scale"]
    assert all(loading.complete and loading.of == 2513 for loading in loadings_of(bare).values())


def test_unknown_keys_are_ignored(full: dict[str, torch.Tensor]) -> None:
    loadings = loadings_of(full | {"model_ema.decay": torch.zeros(())})
    assert {(loading.loads, loading.of) for loading in loadings.values()} == {(2515, 2516)}
    assert {str(loading.ignores[0]) for loading in loadings.values()} == {
        "1 (model_ema.decay): belongs to no part"
    }


def test_a_surplus_tensor_in_a_part_is_reported(full: dict[str, torch.Tensor]) -> None:
    name = f"{UNET_ROOT}input_blocks.1.1.proj_in.weight"
    loadings = loadings_of(full | {name: torch.zeros(1)})
    assert loadings[COMFYUI].ignores[0].names == loadings[SD_SCRIPTS].refuses[0].names == (name,)
    assert {program: loading.loads for program, loading in loadings.items()} == {
        COMFYUI: 2515,
        SD_SCRIPTS: 0,
        DIFFUSERS: 2515,
    }


def test_a_missing_tensor(full: dict[str, torch.Tensor]) -> None:
    name = f"{UNET_ROOT}out.0.bias"
    loadings = loadings_of({key: tensor for key, tensor in full.items() if key != name})
    assert loadings[COMFYUI].notes[0].names == (name,)
    assert str(loadings[SD_SCRIPTS].refuses[0]) == (f"1 ({name}): the parts must have exactly SDXL's tensors")
    assert (loadings[COMFYUI].loads, loadings[SD_SCRIPTS].loads) == (2514, 0)


@pytest.mark.parametrize(("root", "part"), [(VAE_ROOT, "vae"), (TE1_SHORT_ROOT, "te1"), (TE2_ROOT, "te2")])
def test_a_missing_part_is_named(root: str, part: str, full: dict[str, torch.Tensor]) -> None:
    rest = outside(full, root)
    loadings = loadings_of(rest)
    assert loadings[COMFYUI].loads == len(rest) < 2515
    assert str(loadings[COMFYUI].notes[0]) == f"1 ({part}): needs a separate loader node"
    assert loadings[SD_SCRIPTS].refuses[0].names == loadings[DIFFUSERS].refuses[0].names == (part,)
    assert loadings[SD_SCRIPTS].loads == loadings[DIFFUSERS].loads == 0


def test_the_first_encoder_with_transformers_5_names_is_reported(full: dict[str, torch.Tensor]) -> None:
    """ComfyUI, sd-scripts and diffusers look for `text_model.`; spectune renames on opening."""
    names = {name: name.replace(TE1_ROOT, TE1_SHORT_ROOT) for name in full if name.startswith(TE1_ROOT)}
    entries = {
        name: RenamedTensor(TensorInfo(name, t.dtype, tuple(t.shape)), t.clone) for name, t in full.items()
    }
    opened = Checkpoint(Path("short"), [RenamedFiles(entries, [])], {}, file_names=names)
    loadings = {loading.program: loading for loading in loading_table(opened)}
    (ignored,) = loadings[COMFYUI].ignores
    assert len(ignored.names) == 197
    assert loadings[COMFYUI].loads == 2515 - 197
    assert loadings[SD_SCRIPTS].refuses[0].reason == loadings[DIFFUSERS].refuses[0].reason == ignored.reason


def test_other_sizes_are_reported(source: MemorySource) -> None:
    loadings = loadings_of(source.values)
    assert loadings[COMFYUI].refuses[0].reason == "loads only SDXL's widths and depths"
    assert loadings[SD_SCRIPTS].loads == 0
    assert loadings[DIFFUSERS].loads == len(source.values)
    assert "folder of configurations" in loadings[DIFFUSERS].notes[0].reason


def test_residuals_and_predictions_are_reported(full: dict[str, torch.Tensor]) -> None:
    def notes(provenance: Provenance, **more: torch.Tensor) -> list[str]:
        return [finding.reason for finding in loadings_of(full | more, provenance)[COMFYUI].notes]

    assert notes(Provenance(role=Role.MODEL, prediction="eps")) == []
    assert "a residual" in notes(Provenance(role=Role.RESIDUAL))[0]
    assert "ModelSamplingSD3" in notes(Provenance(prediction="flow"))[0]
    assert "reads it as eps" in notes(Provenance(prediction="v"))[0]
    assert notes(Provenance(prediction="v"), v_pred=torch.zeros(0)) == []
    marked = loadings_of(full | {"v_pred": torch.zeros(0)})
    assert marked[COMFYUI].complete
    assert marked[SD_SCRIPTS].ignores[0].names == ("v_pred",)


def test_other_models_are_refused(full: dict[str, torch.Tensor]) -> None:
    for tensors in (
        outside(full, UNET_ROOT),
        {f"{UNET_ROOT}double_blocks.0.weight": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match="memory is not an SDXL checkpoint"):
            loadings_of(tensors)


@pytest.mark.parametrize(
    ("spare", "missing", "loads"),
    [
        ({}, "", True),
        ({"model_ema.decay": torch.zeros(1)}, "", True),
        ({f"{UNET_ROOT}input_blocks.3.1.more.weight": torch.zeros(1)}, "", True),
        ({}, f"{UNET_ROOT}out.0.bias", False),
    ],
)
def test_diffusers_agrees_with_the_table(
    spare: dict[str, torch.Tensor],
    missing: str,
    loads: bool,
    source: MemorySource,
    tiny_modules: Modules,
    tmp_path: Path,
) -> None:
    tensors = {name: tensor for name, tensor in source.values.items() if name != missing} | spare
    loading = loadings_of(tensors)[DIFFUSERS]
    assert bool(loading.refuses) == (not loads)
    assert [finding.names for finding in loading.ignores] == [(name,) for name in spare]
    cast("UNet2DConditionModel", tiny_modules.unet).save_config(tmp_path)
    unet: Any = {
        name: tensor.clone() for name, tensor in tensors.items() if name.startswith((UNET_ROOT, *spare))
    }
    if loads:
        made = UNet2DConditionModel.from_single_file(unet, config=str(tmp_path), local_files_only=True)
        wanted = tiny_modules.unet.state_dict()
        assert all(torch.equal(tensor.float(), wanted[name]) for name, tensor in made.state_dict().items())
    else:
        with pytest.raises(NotImplementedError, match="meta tensor"):
            UNet2DConditionModel.from_single_file(unet, config=str(tmp_path), local_files_only=True)


def test_other_latents_are_reported(full: dict[str, torch.Tensor]) -> None:
    wide = full | {
        f"{UNET_ROOT}input_blocks.0.0.weight": torch.empty(320, 16, 3, 3, device="meta"),
        f"{UNET_ROOT}out.2.weight": torch.empty(16, 320, 3, 3, device="meta"),
        f"{UNET_ROOT}out.2.bias": torch.empty(16, device="meta"),
    }
    loadings = loadings_of(wide)
    assert loadings[SD_SCRIPTS].refuses[0].reason == "its UNet has 4 latent channels"
    assert "inpainting model" in loadings[COMFYUI].notes[0].reason
    assert loadings[DIFFUSERS].complete
