"""Test the import of single flags, and that the table of flags agrees with recipes and the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from docs.kohya_flags import flags_page
from spectune.errors import InputError
from spectune.interop.kohya.command_line import parse_command
from spectune.interop.kohya.derived import OPTIMIZER_NAMES
from spectune.interop.kohya.flags import RULES, convert_flag
from spectune.interop.kohya.flags.model import NETWORK_ARGS
from spectune.interop.kohya.importer import import_command
from spectune.training.recipe.commented import nested
from spectune.training.recipe.recipe import Recipe
from tests.interop.kohya_commands import converted, recipe, result_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "section", "expected"),
    [
        ("--network_dim 16 --network_args conv_dim=8", "model", {"rank": 16, "conv_rank": 8}),
        ("", "model", {"rank": 4}),  # the default of sd-scripts
        ("--network_train_unet_only", "model", {"parts": ["unet"]}),
        ("--network_train_text_encoder_only", "model", {"parts": ["te1", "te2"]}),
        ("--text_encoder_lr=0 --unet_lr=1e-4", "model", {"parts": ["unet"]}),
        ("--network_module=networks.lora --network_dropout=0.1", "model", {"dropout_probability": 0.1}),
        ("", "objective", {"kind": "eps"}),
        ("--v_parameterization --zero_terminal_snr", "objective", {"kind": "v", "zero_terminal_snr": True}),
        (
            "--noise_offset 0.05 --ip_noise_gamma .1",
            "objective",
            {"noise_offset": 0.05, "input_perturbation": 0.1},
        ),
        ("--min_snr_gamma=5", "loss", {"weighting": "min_snr", "min_snr_gamma": 5.0}),
        ("--debiased_estimation_loss", "loss", {"weighting": "debiased"}),
        (
            "--edm2_loss_weighting --edm2_loss_weighting_optimizer_lr=0.01",
            "loss",
            {"weighting": "edm2", "edm2": {"learning_rate": 0.01}},
        ),
        ("--v_parameterization --scale_v_pred_loss_like_noise_pred", "loss", {"scale_v_like_noise": True}),
        ("--loss_type l2", "loss", {"kind": "mse"}),
        (
            "--loss_type huber --huber_c .2",
            "loss",
            {"kind": "huber", "huber_c": 0.2, "huber_schedule": "snr"},
        ),
        ("--learning_rate=1e-4", "optimizer", {"learning_rate": 1e-4}),
        ("", "optimizer", {"learning_rate": 2e-6}),  # the default of sd-scripts
        (
            "--unet_lr 1e-4 --text_encoder_lr 1e-5 2e-5",
            "optimizer",
            {"part_learning_rates": {"unet": 1e-4, "te1": 1e-5, "te2": 2e-5}},
        ),
        (
            "--optimizer_type=Prodigy --learning_rate=1",
            "optimizer",
            {"name": "prodigy", "learning_rate": 1.0},
        ),
        ("--use_8bit_adam", "optimizer", {"name": "adamw8bit"}),
        (
            "--optimizer_type adafactor --optimizer_args warmup_init=True",
            "optimizer",
            {"name": "adafactor", "options": {"relative_step": True, "warmup_init": True}},
        ),
        (
            "--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3 --lr_warmup_steps=0.1 "
            "--max_train_steps=200",
            "optimizer",
            {"schedule": "cosine_restarts", "cycles": 3, "warmup_steps": 20},
        ),
        (
            "--lr_scheduler polynomial --lr_scheduler_power 2",
            "optimizer",
            {"schedule": "polynomial", "power": 2.0},
        ),
        ("--resolution=832,1216 --enable_bucket", "data", {"resolution_px": 1006}),
        ("--reg_data_dir=r --prior_loss_weight=0.5", "data", {"regularisation_weight": 0.5}),
        ("--shuffle_caption --keep_tokens=1", "data", {"caption": {"shuffle": True, "keep_tokens": 1}}),
        ("", "data", {"caption": {"extensions": [".caption"]}}),  # the default of sd-scripts
        ("--masked_loss", "data", {"mask": "file"}),
        ("--masked_loss --alpha_mask", "data", {"mask": "alpha"}),
        ("--cache_latents_to_disk", "data", {"cache_latents": True, "cache_folder": "o/latents"}),
        (
            "--network_train_unet_only --cache_text_encoder_outputs",
            "data",
            {"cache_text": True, "folders": ["d"]},
        ),
        ("", "run", {"steps": 1600, "name": "last"}),  # defaults of sd-scripts
        ("--max_train_epochs=3 --max_train_steps=9", "run", {"epochs": 3}),
        (
            "--save_every_n_steps=100 --save_last_n_steps=200",
            "run",
            {"save_every_steps": 100, "keep_last_adapters": 3},
        ),
        ("--output_name 'my style'", "run", {"name": "my_style"}),
        ("--mixed_precision=bf16", "run", {"precision": "bf16"}),
        ("--sample_every_n_steps=50", "run", {"preview_every_steps": 50}),
        ("--seed=1 --seed=2", "run", {"seed": 2}),
    ],
)
def test_imported_flags(flags: str, section: str, expected: dict[str, Any]) -> None:
    settings = recipe(flags)[section]
    for key, value in expected.items():
        if isinstance(value, dict):
            assert settings[key].items() >= value.items()
        else:
            assert settings[key] == value
    if section == "run":
        assert ("steps" in settings) != ("epochs" in settings)


@pytest.mark.parametrize(
    ("flags", "name", "line"),
    [
        ("--min_snr_gamma=5 --flow_matching", "min_snr_gamma", "flow has no weighting by signal-to-noise"),
        ("--keep_tokens=1", "keep_tokens", "ignored: the order of tags changes only with --shuffle_caption"),
        ("--cache_latents --random_crop", "cache_latents", "ignored: crops or colors vary"),
        ("--cache_text_encoder_outputs", "cache_text_encoder_outputs", "ignored: the encoders train or"),
        ("--full_bf16", "full_bf16", "ignored: this optimizer would lose small updates"),
        ("--network_dim=8 --network_alpha=1", "network_alpha", "sd-scripts scales by 1/8"),
        ("--network_dropout=0.1", "network_dropout", "ignored: LyCORIS applies it in bypass_mode only"),
        ("--seed=1 --seed=2", "seed", "ignored: a later value overrides it"),
        ("--mixed_precision=fp16", "mixed_precision", "ignored: the default is bf16, or fp16 on a GPU"),
        ("--min_timestep=0", "min_timestep", "ignored: spectune always does this"),
        ("--min_timestep=10", "min_timestep", "not supported: eps and v train all noise levels"),
        ("--network_args algo=lokr", "algo", "not supported: spectune trains factors in the form of locon"),
        ("--dataset_config=d.toml", "dataset_config", "not supported: the file is not here"),
        ("--optimizer_type=Prodigy --learning_rate=0.5", "learning_rate", "its rate must be 1"),
        ("--optimizer_type=SGDNesterov", "optimizer_type", "not supported: the recipe uses adamw instead"),
        ("--optimizer_args decouple=True", "decouple", "not supported: adamw has no option `decouple`"),
        ("--lr_scheduler=inverse_sqrt", "lr_scheduler", "not supported: optimizer.schedule is one of"),
        ("--seed=x", "seed", "not supported: expected a whole number, found `x`"),
        ("--seed", "seed", "not supported: it has no value"),
        ("--loss_type=l3", "loss_type", "not supported: loss.kind is one of mse, l1, huber"),
        ("--min_snr_gamma=5 --debiased_estimation_loss", "debiased_estimation_loss", "already sets loss."),
        ("--min_snr_gama=5", "min_snr_gama", "unknown flag; did you mean `min_snr_gamma`?"),
        ("--network_args convdim=5", "convdim", "unknown flag; did you mean `conv_dim`?"),
        ("--flip_aug yes", "flip_aug", "imported as data.flip_probability = 0.5 (extra values ignored: yes)"),
        ("--max_train_epochs=10 $more", "max_train_epochs", "run.epochs = 10 (extra values ignored: $more)"),
        ("--unet_lr=1e-4 1e-5", "unet_lr", "part_learning_rates.unet = 0.0001 (extra values ignored: 1e-5)"),
        ("--flow_matching true", "flow_matching", '"flow" (extra values ignored: true)'),
        ("--wandb_api_key=hidden", "wandb_api_key", "--wandb_api_key=***: ignored"),
    ],
)  # fmt: skip
def test_flags_that_are_not_imported(flags: str, name: str, line: str) -> None:
    assert line in result_of(flags, name)


def test_notes_name_missing_values() -> None:
    imported = converted(
        script="sdxl_train_network.py --pretrained_model_name_or_path m --dataset_config d.toml"
    )
    data = nested(imported.settings)
    assert (data["data"]["folders"], data["run"]["output"]) == (["images"], "output")
    assert imported.notes == ("data.folders: to fill in", "run.output: to fill in")
    unset = converted("--vae=%VAE%").notes
    assert unset == ("vae.path contains a variable that the text does not set: %VAE%",)


def test_full_training_stays_full_training() -> None:
    script = "sdxl_train.py --pretrained_model_name_or_path m.safetensors --train_data_dir d --output_dir o"
    assert recipe(script=script)["model"] == {"base": "m.safetensors", "rank": "full", "parts": ["unet"]}
    data = recipe("--train_text_encoder --learning_rate=1e-5 --learning_rate_te2=0", script=script)
    assert data["model"]["parts"] == ["unet", "te1"]
    fused = "--fused_backward_pass --full_bf16 --mixed_precision bf16 --optimizer_type adafactor "
    adafactor = fused + "--optimizer_args scale_parameter=False relative_step=False warmup_init=False"
    data = recipe(f"{adafactor} --learning_rate=4e-7", script=script)
    assert data["run"]["trained_precision"] == "bf16"
    assert "precision" not in data["run"]
    assert (data["optimizer"]["step_in_backward"], data["optimizer"]["max_grad_norm"]) == (True, 0)
    data = recipe(f"{adafactor} --gradient_accumulation_steps=2 --max_grad_norm=1", script=script)
    assert ("step_in_backward" in data["optimizer"], data["optimizer"]["max_grad_norm"]) == (False, 1)
    data = recipe("--mixed_precision bf16", script=script)
    assert not data["run"].keys() & {"precision", "trained_precision"}
    principal = recipe("--network_weights p.safetensors", script=script)
    assert "rank" not in principal["model"]


def test_pickles_and_hub_names_are_reported() -> None:
    text = "sdxl_train_network.py --train_data_dir d --output_dir o --pretrained_model_name_or_path "
    hub = import_command(parse_command(text + "stabilityai/stable-diffusion-xl-base-1.0"), folder=Path())
    assert "if this is a Hugging Face name, download it first" in str(hub.results[2])
    with pytest.raises(InputError, match="set either `base`"):
        import_command(parse_command(text + "m.ckpt"), folder=Path())


def test_every_rule_handles_every_kind_of_value() -> None:
    for table, shape in ((RULES, "--{name}{value}"), (NETWORK_ARGS, "--network_args {name}{value}")):
        for name in table:
            for value in ("", "=1", "=0", "=x", "=1,2"):
                command = parse_command("sdxl_train_network.py " + shape.format(name=name, value=value))
                lines = [str(result) for flag in command.flags for result in convert_flag(flag, command)]
                assert lines, name
                assert all(re.search(r": (imported as|ignored|not supported)", line) for line in lines)


def test_every_key_in_a_summary_exists_in_recipes() -> None:
    keys = {key for rule in [*RULES.values(), *NETWORK_ARGS.values()] for key in _keys_in(rule.summary)}
    assert {"data.bucket.min_px", "loss.edm2.learning_rate", "optimizer.part_learning_rates"} <= keys
    assert {key for key in keys if not _is_key(key)} == set()
    assert not _is_key("data.bucket.min_pixels")


def _keys_in(text: str) -> list[str]:
    sections = "|".join(Recipe.model_fields)
    return re.findall(rf"\b((?:{sections})\.[a-z_\d.]*[a-z\d])", text)


def _is_key(key: str) -> bool:
    section: Any = Recipe
    for name in key.split("."):
        fields = getattr(section, "model_fields", {})
        if name not in fields:
            return False
        section = fields[name].annotation
    return True


def test_the_page_of_flags_is_generated_from_the_tables() -> None:
    page = (ROOT / "docs" / "reference" / "kohya-flags.md").read_text(encoding="utf-8")
    assert page.endswith(flags_page())
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", flags_page(), flags=re.MULTILINE))
    summaries = {name: rule.summary for name, rule in {**RULES, **NETWORK_ARGS}.items()}
    assert rows == summaries | {name: f"`{ours}`" for name, ours in OPTIMIZER_NAMES.items()}


FORK = "--flow_model --flow_timestep_distribution "


@pytest.mark.parametrize(
    ("flags", "objective"),
    [
        (
            f"{FORK} uniform --flow_uniform_static_ratio 2.5 --flow_logit_mean=1",
            {"kind": "flow", "flow_times": "uniform", "flow_shift": 2.5},
        ),
        (
            f"{FORK} logit_normal --flow_logit_mean -0.2 --flow_logit_std 1.5 --flow_uniform_shift",
            {
                "kind": "flow",
                "flow_times": "logit_normal",
                "flow_times_mean": -0.2,
                "flow_times_std": 1.5,
                "flow_shift": "resolution",
            },
        ),
        ("--flow_model", {"kind": "flow", "flow_times": "logit_normal"}),  # the default of the fork
        ("--flow_uniform_static_ratio=2.5", {"kind": "eps"}),
    ],
)
def test_the_flags_of_the_rectified_flow_forks(flags: str, objective: dict[str, Any]) -> None:
    assert recipe(flags)["objective"] == objective


@pytest.mark.parametrize(
    ("flags", "objective", "loss"),
    [
        (
            f"{FORK} uniform --flow_use_ot --train_batch_size 4",
            {"flow_times": "uniform", "flow_pairing": "optimal_transport"},
            {},
        ),
        (f"{FORK} uniform --flow_use_ot --contrastive_flow_matching", {"flow_times": "uniform"}, {}),
        (
            f"{FORK} uniform --contrastive_flow_matching --train_batch_size=2",
            {"flow_times": "uniform"},
            {"contrastive_weight": 0.05},
        ),
        (
            f"{FORK} uniform --cfm_lambda=0.02 --contrastive_flow_matching --train_batch_size=2",
            {"flow_times": "uniform"},
            {"contrastive_weight": 0.02},
        ),
        (f"{FORK} uniform --cfm_lambda=0.02 --train_batch_size=2", {"flow_times": "uniform"}, {}),
    ],
)
def test_flags_that_use_the_other_images_of_a_batch(
    flags: str, objective: dict[str, Any], loss: dict[str, Any]
) -> None:
    found = recipe(flags)
    assert found["objective"] == {"kind": "flow", **objective}
    assert found.get("loss", {}) == loss


def test_the_autoencoders_of_the_forks() -> None:
    flags = (
        "--vae=v.safetensors --vae_custom_scale 0.1406 --vae_custom_shift -0.4743 --vae_reflection_padding"
    )
    values = {"path": "v.safetensors", "scale": 0.1406, "shift": -0.4743, "padding": "reflect"}
    assert recipe(flags)["vae"] == values
    assert recipe("--vae_type=flux --latent_channels=16")["vae"] == {"scale": 0.3611, "shift": 0.0}
    assert "vae" not in recipe("--vae_type=sdxl")
    for flag in ("flow_uniform_base_pixels=4096", "use_sga"):
        assert "not supported" in result_of(f"--flow_model --{flag}", flag.partition("=")[0])


@pytest.mark.parametrize(
    ("flags", "run"),
    [
        ("--save_every_n_epochs=2 --save_last_n_epochs=3", {"save_every_epochs": 2, "keep_last_adapters": 3}),
        (
            "--sample_prompts=p.txt --sample_every_n_epochs=1 --sample_every_n_steps=9 "
            "--sample_sampler=euler_a",
            {"preview": "p.txt", "preview_every_epochs": 1, "preview_sampler": "euler_a"},
        ),
        ("--sample_prompts=p.txt --sample_at_first", {"preview": "p.txt", "preview_at_start": True}),
        ("--sample_prompts=p.txt --sample_sampler=ddim", {}),  # sd-scripts draws nothing
        ("--validate_every_n_epochs=2 --log_with=all", {"validate_every_epochs": 2, "trackers": ["wandb"]}),
    ],
)
def test_saves_and_previews(flags: str, run: dict[str, Any]) -> None:
    found = recipe(flags)["run"]
    keys = {key for key in found if key.startswith(("save_", "keep_", "preview", "validate_", "trackers"))}
    assert {key: found[key] for key in keys} == run


def test_captions_as_in_sd_scripts() -> None:
    flags = "--max_token_length=150 --caption_prefix=a --caption_suffix=b --enable_wildcard --shuffle_caption"
    assert recipe(f"{flags} --keep_tokens_separator=|||")["data"]["caption"] == {
        "extensions": [".caption"],
        "max_tokens": 150,
        "prefix": "a",
        "suffix": "b",
        "wildcards": True,
        "lines": "random",
        "shuffle": True,
        "keep_tokens_separator": "|||",
    }


def test_metadata_of_captions() -> None:
    captions = recipe("--in_json=meta/cap.json --dataset_repeats=2")["data"]
    assert captions["caption"]["sidecar"] == ["../meta/cap.json"]
    assert captions["sets"] == [{"path": "d", "repeats": 2}]


@pytest.mark.parametrize(
    ("file", "folder", "sidecar"),
    [
        ("D:\\train\\meta_lat.json", "d:\\train\\img", "../meta_lat.json"),
        ("/meta/cap.json", "/train/img", "../../meta/cap.json"),
        ("/train/img/cap.json", "/train/img", "cap.json"),
        ("/meta/cap.json", "/a/b/img", None),  # three folders up
        ("E:\\cap.json", "D:\\train\\img", None),
        ("/cap.json", "img", None),
    ],
)
def test_a_file_of_captions_far_from_the_images_is_reported(
    file: str, folder: str, sidecar: str | None
) -> None:
    flags = f'--in_json="{file}" --train_data_dir="{folder}"'
    if sidecar is None:
        assert "copy the file into the folder of the images" in result_of(flags, "in_json")
    else:
        assert recipe(flags)["data"]["caption"]["sidecar"] == [sidecar]


def test_a_warmup_in_parts_of_epochs_is_a_share() -> None:
    flags = "--lr_scheduler=cosine --lr_warmup_steps=0.1 --max_train_epochs=3"
    assert recipe(flags)["optimizer"]["warmup_share"] == 0.1


def test_steps_of_buckets_are_multiples_of_8() -> None:
    assert recipe("--enable_bucket --bucket_reso_steps=1")["data"]["bucket"]["step_px"] == 8
