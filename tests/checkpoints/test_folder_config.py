from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from spectune.checkpoints.diffusers_folder.config import FolderFacts, Schedule, folder_metadata, read_schedule
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.source import declared_prediction
from spectune.model.network import source_prediction
from spectune.model.prediction import Ddpm
from spectune.sdxl.layout import hints_metadata, read_hints
from tests.layouts import FULL, TINY
from tests.pipelines import edit_json

SCHEDULER = "scheduler/scheduler_config.json"
STANDARD = {
    "unet_heads": [5, 10, 20],
    "te1_heads": 12,
    "te2_heads": 20,
    "unet_norm_groups": 32,
    "vae_norm_groups": 32,
}


def metadata(folder: Path) -> dict[str, str]:
    with open_checkpoint(folder) as source:
        return dict(source.metadata)


def message(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return caught.value.what


def facts(**changes: Any) -> FolderFacts:
    nothing = FolderFacts(hints={}, schedule=Schedule(), vae_scale=None, vae_shift=None)
    return replace(nothing, **changes)


def test_a_standard_sdxl_needs_no_metadata() -> None:
    declared = facts(hints=STANDARD, schedule=Schedule("eps"), vae_scale=0.13025, vae_shift=0.0)
    assert folder_metadata({"format": "pt"}, declared, FULL, "x") == {
        "format": "pt",
        "spectune.prediction": "eps",
    }
    other = facts(hints=STANDARD | {"te2_heads": 10})
    assert read_hints(folder_metadata({}, other, FULL, "x")) == {"te2_heads": 10}


def test_heads_and_groups_are_read_from_the_configurations(folder: Path) -> None:
    assert read_hints(metadata(folder)) == read_hints(hints_metadata(TINY))
    edit_json(folder / "unet/config.json", attention_head_dim=4)
    assert read_hints(metadata(folder))["unet_heads"] == [4, 4, 4]


def test_a_folder_without_configurations_gives_no_hints(folder: Path) -> None:
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        (folder / name / "config.json").unlink()
    assert read_hints(metadata(folder)) == {}


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({}, Schedule()),
        ({"prediction_type": "epsilon"}, Schedule("eps")),
        ({"prediction_type": "v_prediction"}, Schedule("v")),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, Schedule("v", None, True)),
        ({"prediction_type": "flow_prediction", "flow_shift": 2.5}, Schedule("flow", 2.5)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3}, Schedule("flow", 3.0)),
    ],
)
def test_schedules_are_read_from_scheduler_configurations(config: dict[str, Any], schedule: Schedule) -> None:
    assert read_schedule(config, "x") == schedule


def test_a_v_prediction_folder_gets_metadata_and_markers(folder: Path) -> None:
    edit_json(folder / SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with open_checkpoint(folder) as source:
        assert declared_prediction(source) == "v"
        # other programs recognize such a single file by these markers
        assert {source.load(name).numel() for name in ("v_pred", "ztsnr")} == {0}
        assert source_prediction(source) == Ddpm("v", zero_terminal_snr=True)


def test_an_unknown_prediction_is_refused(folder: Path) -> None:
    edit_json(folder / SCHEDULER, prediction_type="sample")
    assert message(folder) == (
        f"{folder / SCHEDULER}: prediction_type is 'sample': "
        "expected one of epsilon, flow_prediction, v_prediction"
    )
    edit_json(folder / SCHEDULER, prediction_type="flow_prediction", flow_shift=0)
    assert message(folder) == f"{folder / SCHEDULER}: flow_shift is 0: expected a positive number"


def test_scale_and_shift_of_another_vae_are_read(folder: Path) -> None:
    assert "spectune.vae_scale" not in metadata(folder)
    edit_json(folder / "vae/config.json", scaling_factor=0.1406, shift_factor=-0.4743)
    found = metadata(folder)
    assert (found["spectune.vae_scale"], found["spectune.vae_shift"]) == ("0.1406", "-0.4743")
    edit_json(folder / "vae/config.json", scaling_factor="0.1406")
    assert message(folder).endswith("scaling_factor is '0.1406': expected a number")


def test_an_activation_that_sdxl_lacks_is_refused(folder: Path) -> None:
    edit_json(folder / "text_encoder/config.json", hidden_act="gelu")
    assert message(folder).endswith("hidden_act is 'gelu': expected 'quick_gelu', as in SDXL")


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "is not valid JSON: "), ("[1]", "is not a JSON object")]
)
def test_damaged_configurations_are_refused(text: str, expected: str, folder: Path) -> None:
    (folder / "unet/config.json").write_text(text)
    assert f"{folder / 'unet/config.json'} {expected}" in message(folder)


@pytest.mark.parametrize(
    ("header", "declared", "expected"),
    [
        ({"spectune.prediction": "v"}, {"schedule": Schedule("eps")}, "prediction is eps"),
        ({"spectune.vae_scale": "0.1406"}, {"vae_scale": 0.13025}, "vae_scale is 0.13025"),
        ({"spectune.layout": '{"te1_heads": 2}'}, {"hints": {"te1_heads": 3}}, "te1_heads is 3"),
        (
            {"spectune.prediction": "flow", "spectune.flow_shift": "2.5"},
            {"schedule": Schedule("flow", 3.0)},
            "flow_shift is 3.0",
        ),
    ],
)
def test_contradictions_between_header_and_configurations_are_refused(
    header: dict[str, str], declared: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        folder_metadata(header, facts(**declared), TINY, "mixed-xl")
    assert caught.value.what.startswith(f"mixed-xl contradicts itself: {expected} in its configuration files")


def test_the_header_of_another_program_is_kept(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "spectune.role": "model", "other": "1"})
    found = metadata(folder)
    assert (found["spectune.role"], found["other"]) == ("model", "1")


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("unet/config.json", {"attention_head_dim": "4"}, "unet/config.json: unet_heads is '4'"),
        ("unet/config.json", {"attention_head_dim": True}, "unet_heads is True: expected a list of positive"),
        ("unet/config.json", {"attention_head_dim": [4, 10**30, 4]}, "at most 65536"),
        (
            "unet/config.json",
            {"norm_num_groups": [8]},
            "unet_norm_groups is [8]: expected a positive integer",
        ),
        ("vae/config.json", {"norm_num_groups": {"a": 1}}, "vae_norm_groups is {'a': 1}"),
        ("vae/config.json", {"scaling_factor": [0.1]}, "scaling_factor is [0.1]: expected a number"),
        ("vae/config.json", {"scaling_factor": 10**90}, "scaling_factor is 1000"),
        ("vae/config.json", {"shift_factor": float("nan")}, "shift_factor is nan: expected a number"),
        ("text_encoder/config.json", {"hidden_act": ["gelu"]}, "hidden_act is ['gelu']"),
        ("text_encoder/config.json", {"num_attention_heads": 2.0}, "te1_heads is 2.0"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": ["epsilon"]},
            "prediction_type is ['epsilon']",
        ),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": "no"}, "expected true or false"),
    ],
)
def test_configurations_with_values_of_another_type_are_refused(
    file: str, changes: dict[str, Any], expected: str, folder: Path
) -> None:
    edit_json(folder / file, **changes)
    assert expected in message(folder)


@pytest.mark.parametrize("text", ["[" * 5000, '{"attention_head_dim": ' + "9" * 400 + "}"])
def test_a_hostile_configuration_is_refused(text: str, folder: Path) -> None:
    (folder / "unet/config.json").write_text(text)
    assert "unet/config.json is not valid JSON: " in message(folder)
