from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel

from spectune.adapters.coverage import ProgramCoverage, coverage_rows
from spectune.adapters.coverage_checkpoint import checkpoint_coverage
from spectune.adapters.coverage_rules import Program
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource, TensorInfo
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, UNET_ROOT, VAE_ROOT
from tests.layouts import Modules

COMFYUI, SD_SCRIPTS, DIFFUSERS = Program.COMFYUI, Program.SD_SCRIPTS, Program.DIFFUSERS


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """SDXL without numbers."""
    return {info.name: torch.empty(info.shape, device="meta") for info in full_infos.values()}


def covered(
    tensors: Mapping[str, torch.Tensor], provenance: Provenance | None = None
) -> dict[Program, ProgramCoverage]:
    metadata = (provenance or Provenance()).to_metadata()
    return {coverage.program: coverage for coverage in checkpoint_coverage(MemorySource(tensors, metadata))}


def outside(tensors: Mapping[str, torch.Tensor], root: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(root)}


def test_all_tensors_load_everywhere(full: dict[str, torch.Tensor]) -> None:
    coverages = covered(full)
    assert list(coverages) == [COMFYUI, SD_SCRIPTS, DIFFUSERS]
    assert {(coverage.loads, coverage.of) for coverage in coverages.values()} == {(2515, 2515)}
    assert all(coverage.complete for coverage in coverages.values())
    assert coverage_rows(coverages.values())[0] == ("ComfyUI", "2515 of 2515", "", "")


def test_what_no_module_holds_may_be_absent(full: dict[str, torch.Tensor]) -> None:
    bare = dict(full)
    del bare[f"{TE1_ROOT}embeddings.position_ids"], bare[f"{TE2_ROOT}logit_scale"]
    assert all(coverage.complete and coverage.of == 2513 for coverage in covered(bare).values())


def test_unknown_keys_are_ignored(full: dict[str, torch.Tensor]) -> None:
    coverages = covered(full | {"model_ema.decay": torch.zeros(())})
    assert {(coverage.loads, coverage.of) for coverage in coverages.values()} == {(2515, 2516)}
    assert {coverage.ignores[0].text for coverage in coverages.values()} == {
        "1 (model_ema.decay): belongs to no part"
    }


def test_a_spare_tensor_inside_a_part(full: dict[str, torch.Tensor]) -> None:
    name = f"{UNET_ROOT}input_blocks.1.1.proj_in.weight"
    coverages = covered(full | {name: torch.zeros(1)})
    assert coverages[COMFYUI].ignores[0].names == coverages[SD_SCRIPTS].raises[0].names == (name,)
    assert {program: coverage.loads for program, coverage in coverages.items()} == {
        COMFYUI: 2515,
        SD_SCRIPTS: 0,
        DIFFUSERS: 2515,
    }


def test_a_missing_tensor(full: dict[str, torch.Tensor]) -> None:
    name = f"{UNET_ROOT}out.0.bias"
    coverages = covered({key: tensor for key, tensor in full.items() if key != name})
    assert coverages[COMFYUI].notes[0].names == (name,)
    assert coverages[SD_SCRIPTS].raises[0].text == (f"1 ({name}): the parts must have exactly SDXL's tensors")
    assert (coverages[COMFYUI].loads, coverages[SD_SCRIPTS].loads) == (2514, 0)


@pytest.mark.parametrize(("root", "part"), [(VAE_ROOT, "vae"), (TE1_SHORT_ROOT, "te1"), (TE2_ROOT, "te2")])
def test_a_missing_part(root: str, part: str, full: dict[str, torch.Tensor]) -> None:
    rest = outside(full, root)
    coverages = covered(rest)
    assert coverages[COMFYUI].loads == len(rest) < 2515
    assert coverages[COMFYUI].notes[0].text == f"1 ({part}): has to be loaded by a node of its own"
    assert coverages[SD_SCRIPTS].raises[0].names == coverages[DIFFUSERS].raises[0].names == (part,)
    assert coverages[SD_SCRIPTS].loads == coverages[DIFFUSERS].loads == 0


def test_the_first_encoder_as_transformers_5_spells_it(full: dict[str, torch.Tensor]) -> None:
    short = {name.replace(TE1_ROOT, TE1_SHORT_ROOT): tensor for name, tensor in full.items()}
    coverages = covered(short)
    (ignored,) = coverages[COMFYUI].ignores
    assert len(ignored.names) == 197
    assert coverages[COMFYUI].loads == 2515 - 197
    assert coverages[SD_SCRIPTS].raises[0].reason == coverages[DIFFUSERS].raises[0].reason == ignored.reason


def test_other_sizes(source: MemorySource) -> None:
    coverages = covered(source.values)
    assert coverages[COMFYUI].raises[0].reason == "recognises SDXL by its widths and depths"
    assert coverages[SD_SCRIPTS].loads == 0
    assert coverages[DIFFUSERS].loads == len(source.values)
    assert "folder of configurations" in coverages[DIFFUSERS].notes[0].reason


def test_residuals_and_predictions(full: dict[str, torch.Tensor]) -> None:
    def notes(provenance: Provenance, **more: torch.Tensor) -> list[str]:
        return [finding.reason for finding in covered(full | more, provenance)[COMFYUI].notes]

    assert notes(Provenance(role=Role.MODEL, prediction="eps")) == []
    assert "a residual" in notes(Provenance(role=Role.RESIDUAL))[0]
    assert "ModelSamplingSD3" in notes(Provenance(prediction="flow"))[0]
    assert "takes it for eps" in notes(Provenance(prediction="v"))[0]
    assert notes(Provenance(prediction="v"), v_pred=torch.zeros(0)) == []
    marked = covered(full | {"v_pred": torch.zeros(0)})
    assert marked[COMFYUI].complete
    assert marked[SD_SCRIPTS].ignores[0].names == ("v_pred",)


def test_what_is_no_sdxl(full: dict[str, torch.Tensor]) -> None:
    for tensors in (
        {"lora_unet_out_2.lora_down.weight": torch.zeros(1)},
        outside(full, UNET_ROOT),
        {f"{UNET_ROOT}double_blocks.0.weight": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match="memory is not an SDXL checkpoint"):
            covered(tensors)


@pytest.mark.parametrize(
    ("spare", "missing", "loads"),
    [
        ({}, "", True),
        ({"model_ema.decay": torch.zeros(1)}, "", True),
        ({f"{UNET_ROOT}input_blocks.3.1.more.weight": torch.zeros(1)}, "", True),
        ({}, f"{UNET_ROOT}out.0.bias", False),
    ],
)
def test_diffusers_does_what_the_table_says(
    spare: dict[str, torch.Tensor],
    missing: str,
    loads: bool,
    source: MemorySource,
    tiny_modules: Modules,
    tmp_path: Path,
) -> None:
    tensors = {name: tensor for name, tensor in source.values.items() if name != missing} | spare
    coverage = covered(tensors)[DIFFUSERS]
    assert bool(coverage.raises) == (not loads)
    assert [finding.names for finding in coverage.ignores] == [(name,) for name in spare]
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
