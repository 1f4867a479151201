"""Test that .json files of the kohya_ss interface become the command that the interface runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.interop.kohya.gui import parse_gui_json
from spectune.interop.kohya.importer import ImportedRecipe, import_command
from spectune.training.recipe.commented import nested

LORA = {
    "LoRA_type": "Standard",
    "sdxl": True,
    "pretrained_model_name_or_path": "m.safetensors",
    "train_data_dir": "img",
    "output_dir": "o",
    "learning_rate": 1e-4,
    "unet_lr": 1e-4,
    "text_encoder_lr": 5e-5,
    "network_dim": 8,
    "epoch": 10,
    "max_train_epochs": 0,
    "max_train_steps": 0,
    "optimizer": "AdamW",
    "lr_scheduler": "cosine",
    "max_resolution": "1024,1024",
}
FINETUNE = {
    "sdxl_checkbox": True,
    "pretrained_model_name_or_path": "m.safetensors",
    "image_folder": "flat",
    "train_dir": "meta",
    "output_dir": "o",
    "learning_rate": 1e-5,
    "learning_rate_te1": 0,
    "learning_rate_te2": 1e-6,
    "train_text_encoder": True,
    "dataset_repeats": "3",
    "epoch": 4,
    "max_train_steps": 0,
    "max_train_epochs": 0,
    "max_resolution": "768,768",
    "vae": "ignored.safetensors",
}


def imported(settings: dict[str, Any], **changes: Any) -> ImportedRecipe:
    return import_command(parse_gui_json(json.dumps(settings | changes), "x.json"), folder=Path())


def recipe(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return nested(imported(settings, **changes).settings)


@pytest.mark.parametrize(
    ("rates", "parts"),
    [
        ({"text_encoder_lr": 0}, ["unet"]),
        ({"text_encoder_lr": ""}, ["unet"]),
        ({"text_encoder_lr": "0"}, ["unet"]),
        ({"unet_lr": 0}, ["te1", "te2"]),
        ({"unet_lr": 0, "text_encoder_lr": 0}, None),  # all parts train at learning_rate
        ({}, None),
    ],
)
def test_a_rate_of_zero_beside_another_freezes_the_part(
    rates: dict[str, Any], parts: list[str] | None
) -> None:
    result = imported(LORA, **rates)
    model = nested(result.settings)["model"]
    assert model.get("parts") == parts
    frozen = [note for note in result.notes if "does not train that part" in note]
    assert len(frozen) == (parts is not None)


def test_rates_that_are_all_zero_are_an_error() -> None:
    with pytest.raises(InputError, match=r"x\.json: all learning rates are 0"):
        imported(LORA, learning_rate=0, unet_lr=0, text_encoder_lr=0)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"max_train_steps": 1600, "epoch": 1}, {"steps": 1600}),
        ({"max_train_steps": "1600"}, {"steps": 1600}),
        ({"max_train_steps": 0}, {"epochs": 10}),
        ({"max_train_steps": "", "epoch": "7"}, {"epochs": 7}),
        ({"max_train_steps": 1600, "max_train_epochs": 3}, {"epochs": 3}),
        ({"dataset_config": "d.toml"}, {"steps": 1600}),  # the default of sd-scripts; epoch does not count
    ],
)
def test_steps_win_over_epoch_and_epochs_over_steps(length: dict[str, Any], expected: dict[str, int]) -> None:
    run = recipe(LORA, **length)["run"]
    assert {key: run[key] for key in ("steps", "epochs") if key in run} == expected


def test_warmup_in_percent_and_in_steps() -> None:
    assert recipe(LORA, lr_warmup=10)["optimizer"]["warmup_share"] == 0.1
    assert recipe(LORA, lr_warmup=10, max_train_steps=500)["optimizer"]["warmup_steps"] == 50
    assert recipe(LORA, lr_warmup=10, lr_warmup_steps=20)["optimizer"]["warmup_steps"] == 20
    with pytest.raises(InputError, match=r"x\.json: `lr_warmup` is `abc`, expected a number"):
        imported(LORA, lr_warmup="abc")


def test_prompts_are_in_the_file_that_the_interface_writes() -> None:
    assert (
        recipe(LORA, sample_prompts="a --w 832", sample_every_n_steps=5)["run"]["preview"]
        == "o/sample/prompt.txt"
    )
    assert "preview" not in recipe(LORA, sample_prompts="a --w 832", sample_every_n_steps=0)["run"]


def test_the_kind_of_noise_selects_its_settings() -> None:
    noise = {"noise_offset": 0.05, "multires_noise_iterations": 6, "multires_noise_discount": 0.3}
    offset = imported(LORA, noise_offset_type="Original", **noise)
    assert nested(offset.settings)["objective"]["noise_offset"] == 0.05
    assert offset.understood
    multires = imported(LORA, noise_offset_type="Multires", **noise)
    assert "noise_offset" not in nested(multires.settings)["objective"]
    assert not multires.understood


def test_settings_that_the_interface_shows_by_default() -> None:
    data = recipe(LORA)["data"]
    assert data["bucket"] == {"enabled": True, "min_px": 256, "max_px": 2048, "step_px": 64}
    assert data["caption"]["extensions"] == [".txt"]
    assert recipe(LORA, enable_bucket=False)["data"]["bucket"]["enabled"] is False


def test_networks_and_attention_are_named_as_in_sd_scripts() -> None:
    result = imported(LORA, LoRA_type="LyCORIS/LoKr", factor=4, xformers=True)
    lines = [str(line) for line in result.results]
    assert "--network_args algo=lokr: not supported: spectune trains factors in the form of locon" in lines
    assert any(line.startswith("--xformers: ignored") for line in lines)


def test_a_preset_without_a_model_is_imported_with_a_key_to_fill_in() -> None:
    preset = {key: value for key, value in LORA.items() if key != "pretrained_model_name_or_path"}
    result = imported(preset)
    assert nested(result.settings)["model"]["base"] == "model.safetensors"
    assert "model.base: to fill in" in result.notes
    assert not result.understood
    assert recipe(preset, network_weights="p.safetensors")["model"]["residual"] == "model.safetensors"


def test_the_finetune_tab_trains_one_folder() -> None:
    data = recipe(FINETUNE, generate_caption_database=True)
    assert data["data"]["sets"] == [{"path": "flat", "repeats": 3}]
    assert "folders" not in data["data"]
    assert "vae" not in data
    assert data["model"]["parts"] == ["unet", "te2"]
    assert data["run"]["epochs"] == 4
    assert "sidecar" not in data["data"]["caption"]
    assert recipe(FINETUNE)["data"]["caption"]["sidecar"] == ["../meta/meta_cap.json"]


def test_the_finetune_tab_halves_the_steps_of_mirrored_images() -> None:
    assert recipe(FINETUNE, flip_aug=True)["run"]["epochs"] == 2
    assert recipe(FINETUNE, flip_aug=True, max_train_steps=101)["run"]["steps"] == 51


def test_the_dreambooth_tab_trains_encoders_with_a_rate() -> None:
    dreambooth = {
        key: value for key, value in LORA.items() if key not in ("LoRA_type", "network_dim", "unet_lr")
    }
    te1 = recipe(dreambooth, learning_rate_te1=1e-6, learning_rate_te2=0)["model"]
    assert te1["parts"] == ["unet", "te1"]
    assert recipe(dreambooth, learning_rate_te1=0, learning_rate_te2=0)["model"]["parts"] == ["unet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sdxl": False, "flux1_checkbox": True},
            "x.json does not train SDXL: its `sdxl` is off, it trains FLUX",
        ),
        ({"epoch": "many"}, "x.json: `epoch` is `many`, expected a number"),
        ({"max_train_steps": "9" * 400}, "x.json: `max_train_steps` is `99999"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        imported(LORA, **changes)
    assert error.value.what.startswith(message)
    assert len(error.value.what) < 150
