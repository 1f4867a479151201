"""A checkpoint moves to another number of latent channels, and everything else knows them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import spectune
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, SpectuneError
from spectune.files.provenance import Provenance, Role
from spectune.model.network import build_model, new_vae
from spectune.ops.convert import convert
from spectune.ops.export import export
from spectune.ops.inspect import inspect
from spectune.ops.inspect.summary import ModelSummary
from spectune.ops.latent_space.fit import nearest_noise_map
from spectune.ops.latent_space.initial import first_convolution, last_convolution
from spectune.ops.latent_space.move import CONV_IN, CONV_OUT
from spectune.ops.null import null
from spectune.ops.options.values import parse_slice
from spectune.ops.rebuild import rebuild
from spectune.ops.sample import sample
from spectune.ops.slice import slice as slice_files
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import hints_metadata
from tests.layouts import TINY
from tests.loras import saved_lora

CHANNELS = 16


def saved_vae(path: Path, channels: int, *, declares: bool = True, quant_convs: bool = True) -> Path:
    """Save a random autoencoder with diffusers names; its metadata has the scale 0.5 and the shift 0.1."""
    assert TINY.vae is not None
    layout = replace(TINY.vae, latent_channels=channels, quant_convs=quant_convs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        state = new_vae(layout).state_dict()
    declared = Provenance(vae_scale=0.5, vae_shift=0.1).to_metadata() if declares else {}
    save_file(dict(state), path, metadata=hints_metadata(replace(TINY, vae=layout)) | declared)
    return path


@pytest.fixture(scope="module")
def vae16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_vae(tmp_path_factory.mktemp("vae") / "vae16.safetensors", CHANNELS)


@pytest.fixture(scope="module")
def moved(tiny_checkpoint: Path, vae16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny SDXL with 16 latent channels."""
    path = tmp_path_factory.mktemp("moved") / "wide.safetensors"
    convert(tiny_checkpoint, path, latent_channels=CHANNELS, vae=vae16)
    return path


def test_copies_repeat_and_keep_the_size_of_the_response_to_noise() -> None:
    weight = torch.arange(2 * 4 * 9.0).view(2, 4, 3, 3)
    copied = first_convolution(weight, 16, repeat=True)
    assert torch.equal(copied[:, 5], weight[:, 1] / 2)
    assert float(copied.square().sum()) == pytest.approx(float(weight.square().sum()))
    narrow = first_convolution(weight, 2, repeat=True)
    assert torch.equal(narrow, weight[:, :2] * math.sqrt(2))
    rows, bias = last_convolution(weight.transpose(0, 1), torch.arange(4.0), 6, repeat=True)
    assert torch.equal(rows[5], weight[:, 1])
    assert bias.tolist() == [0, 1, 2, 3, 0, 1]


def test_zeros_keep_the_first_channels() -> None:
    weight = torch.randn(2, 4, 3, 3)
    padded = first_convolution(weight, 6, repeat=False)
    assert torch.equal(padded[:, :4], weight)
    assert float(padded[:, 4:].abs().sum()) == 0
    rows, bias = last_convolution(weight.transpose(0, 1), torch.ones(4), 2, repeat=False)
    assert torch.equal(rows, weight.transpose(0, 1)[:2])
    assert bias.tolist() == [1, 1]


def test_a_moved_file_has_new_convolutions_and_the_new_autoencoder(
    moved: Path, tiny_checkpoint: Path, vae16: Path
) -> None:
    old, new = load_file(tiny_checkpoint), load_file(moved)
    changed = {
        name
        for name in old.keys() | new.keys()
        if not name.startswith("first_stage_model.")
        and (name not in old or name not in new or not torch.equal(old[name], new[name]))
    }
    assert changed == {f"{CONV_IN}.weight", f"{CONV_OUT}.weight", f"{CONV_OUT}.bias"}
    assert new[f"{CONV_IN}.weight"].shape[1] == new[f"{CONV_OUT}.weight"].shape[0] == CHANNELS
    assert new[f"{CONV_IN}.weight"].dtype == torch.float16
    with open_checkpoint(moved) as source:
        layout, declared = infer_layout(source), source.provenance
        model = build_model(source)
    assert layout.vae is not None
    assert (layout.unet.in_channels, layout.unet.out_channels, layout.vae.latent_channels) == (16, 16, 16)
    assert (layout.vae.scale, layout.vae.shift, layout.vae.norm_groups) == (0.5, 0.1, 4)
    assert (declared.role, declared.vae_name, declared.base_hash) == (Role.MODEL, None, None)
    assert model.vae is not None
    expected = load_file(vae16)["decoder.conv_in.weight"]
    assert torch.equal(model.vae.state_dict()["decoder.conv_in.weight"], expected)


def test_the_report_counts_what_is_left_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    report = convert(tiny_checkpoint, out, latent_channels=8, init="zeros")
    old = load_file(tiny_checkpoint)
    assert set(report.dropped) == {name for name in old if name.startswith("first_stage_model.")}
    assert report.count == len(old) - len(report.dropped)
    assert report.latents is not None
    assert (report.latents.channels_before, report.latents.channels, report.latents.has_vae) == (4, 8, False)
    summary = inspect(out)
    assert isinstance(summary, ModelSummary)
    assert summary.layout.vae is None
    assert summary.layout.unet.in_channels == 8


def test_there_and_back_is_the_same_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    wide, back = tmp_path / "wide.safetensors", tmp_path / "back.safetensors"
    convert(tiny_checkpoint, wide, latent_channels=8, init="zeros")
    convert(wide, back, latent_channels=4, init="zeros", vae=tiny_checkpoint)
    old, new = load_file(tiny_checkpoint), load_file(back)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_folder_gets_the_channels_in_its_configurations(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    plain = saved_vae(tmp_path / "plain.safetensors", CHANNELS, quant_convs=False)
    convert(tiny_folder, out, latent_channels=CHANNELS, vae=plain)
    unet = json.loads((out / "unet" / "config.json").read_text())
    vae = json.loads((out / "vae" / "config.json").read_text())
    assert (unet["in_channels"], unet["out_channels"]) == (CHANNELS, CHANNELS)
    assert (vae["latent_channels"], vae["scaling_factor"], vae["shift_factor"]) == (CHANNELS, 0.5, 0.1)
    with open_checkpoint(out) as source:
        assert infer_layout(source).unet.in_channels == CHANNELS
    pipeline = StableDiffusionXLPipeline.from_pretrained(out)
    assert pipeline.unet.config["in_channels"] == CHANNELS
    assert (pipeline.vae.config["use_quant_conv"], pipeline.vae.quant_conv) == (False, None)


def test_wrong_inputs_name_what_to_change(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    eight = saved_vae(tmp_path / "eight.safetensors", 8)
    silent = saved_vae(tmp_path / "silent.safetensors", 16, declares=False)
    cases = [
        ({"latent_channels": 16, "vae": eight}, "makes latents of 8 channels, but `latent_channels` is 16"),
        ({"latent_channels": 16, "vae": silent}, "declares the scale and shift of silent.safetensors"),
        ({"vae": eight}, "`vae` requires `latent_channels`"),
        ({"latent_channels": 16, "init": "fit", "vae": eight}, "requires `pictures` and `vae`"),
        ({"latent_channels": 16, "init": "copy", "pictures": tmp_path, "vae": eight}, "no `pictures`"),
        ({"latent_channels": 16, "vae_scale": 1.0}, "require `vae`"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"latent_channels": 16, "keys": "diffusers"}, "is a checkpoint"),
    ]
    for values, expected in cases:
        with pytest.raises(InputError) as caught:
            convert(tiny_checkpoint, out, **values)
        assert expected in caught.value.what
    assert not out.exists()
    convert(tiny_checkpoint, out, latent_channels=16, vae=silent, vae_scale=0.7)
    with open_checkpoint(out) as source:
        assert source.provenance.vae_scale == 0.7


def test_the_noise_of_old_latents_follows_the_map_between_the_latents() -> None:
    """Old latents that are a rotation of four new channels get the noise of these channels, rotated."""
    generator = torch.Generator().manual_seed(0)
    new = [torch.randn(6, 16, 16, generator=generator) for _ in range(4)]
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    expected = torch.cat([rotation, torch.zeros(4, 2)], dim=1)
    old = [3 * torch.einsum("on,nhw->ohw", expected, one) + 1 for one in new]
    assert torch.allclose(nearest_noise_map(old, new), expected, atol=1e-3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        picture = Image.effect_noise((40, 32), 20 + 10 * number).convert("RGB")
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def test_the_fit_reproduces_the_old_network_in_turned_latents(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    """The new autoencoder makes the old latents in another order: the fit finds this order."""
    order = [2, 0, 3, 1]
    state = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(tiny_checkpoint).items()
        if name.startswith("first_stage_model.")
    }
    both = [*order, *(4 + channel for channel in order)]  # means, then log variances
    for kind in ("weight", "bias"):
        state[f"quant_conv.{kind}"] = state[f"quant_conv.{kind}"][both].contiguous()
    state["post_quant_conv.weight"] = state["post_quant_conv.weight"][:, order].contiguous()
    turned, out = tmp_path / "turned.safetensors", tmp_path / "out.safetensors"
    save_file(state, turned, metadata=hints_metadata(TINY))
    report = convert(
        tiny_checkpoint, out, latent_channels=4, vae=turned, vae_name="sdxl", pictures=pictures, size=32
    )
    latents = report.latents
    assert latents is not None
    assert (latents.init, latents.pictures) == ("fit", 3)
    assert latents.first_error is not None
    assert latents.first_error < 1e-3
    old, new = (load_file(path)[f"{CONV_IN}.weight"].float() for path in (tiny_checkpoint, out))
    assert float((new - old[:, order]).norm() / old.norm()) < 0.05
    assert latents.error is not None
    assert latents.before_error is not None
    assert latents.error < latents.before_error


def test_commands_on_files_know_the_channels(moved: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    summary = inspect(moved)
    assert isinstance(summary, ModelSummary)
    assert summary.layout.unet.in_channels == CHANNELS
    zero = tmp_path / "null.safetensors"
    null(moved, out=zero)
    with open_checkpoint(zero) as source:
        assert infer_layout(source).unet.out_channels == CHANNELS
    mixed = tmp_path / "mixed.safetensors"
    parts = (f"{moved}:unet", f"{moved}:te", f"{tiny_checkpoint}:vae")
    with pytest.raises(InputError) as caught:
        slice_files(tuple(map(parse_slice, parts)), out=mixed)
    assert "makes latents of 4 channels, but the UNet of wide.safetensors takes 16" in caught.value.what
    assert not mixed.exists()


def recipe_of(base: Path, pictures: Path, output: Path) -> dict[str, dict[str, Any]]:
    return {
        "model": {
            "base": base,
            "rank": 2,
            "parts": ["unet"],
            "layers": ["unet.out.2", "unet.input_blocks.0.0"],
        },
        "data": {"folders": [pictures], "resolution_px": 32},
        "objective": {"kind": "flow"},
        "optimizer": {"learning_rate": 1e-2},
        "run": {"name": "t", "output": output, "steps": 1, "batch": 2, "tensorboard": False},
    }


@pytest.fixture(scope="module")
def tuned(moved: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter of conv_in and conv_out, trained on the moved model for one step, to flow."""
    output = tmp_path_factory.mktemp("run")
    spectune.train(recipe_of(moved, pictures, output))
    return output / "t.safetensors"


def test_a_moved_model_is_trained_rebuilt_and_drawn(moved: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    rebuild(moved, tuned, out=out)
    before, after = load_file(moved), load_file(out)
    for name in (f"{CONV_IN}.weight", f"{CONV_OUT}.weight"):
        assert not torch.equal(before[name], after[name])
    drawn = sample(out, captions=("x",), out=tmp_path / "drawn", size="32", steps=1, cfg=1.0, device="cpu")
    with Image.open(drawn.pictures[0]) as picture:
        assert picture.size == (32, 32)
    lora = tmp_path / "lora.safetensors"
    export(tuned, out=lora, base=moved)
    rebuild(moved, lora, out=tmp_path / "same.safetensors")


def test_training_needs_an_autoencoder_with_the_channels(
    tiny_checkpoint: Path, pictures: Path, vae16: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_checkpoint, pictures, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"vae16\.safetensors makes latents of 16 channels, but the UNet takes 4"
    ):
        spectune.train({**recipe, "vae": {"path": vae16}})


def test_an_adapter_of_other_latents_is_refused_in_one_message(
    moved: Path, tuned: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with open_checkpoint(tiny_checkpoint) as source:
        lora = saved_lora(tmp_path / "old.safetensors", build_catalogue(source, all_layers=True))
    with pytest.raises(SpectuneError) as caught:
        rebuild(moved, lora, out=tmp_path / "x.safetensors")
    assert "was made for latents of 4 channels, the model has latents of 16" in caught.value.what
    with pytest.raises(SpectuneError) as caught:
        rebuild(tiny_checkpoint, tuned, out=tmp_path / "x.safetensors")
    assert "was made for latents of 16 channels, the model has latents of 4" in caught.value.what
    assert not (tmp_path / "x.safetensors").exists()
