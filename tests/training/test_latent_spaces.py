"""Training in other latent spaces: sizes, latents and the files of a run fit 16 and 32 pixels per latent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run as spectune
from spectune.cli.reports.train import commands_after_training
from spectune.errors import InputError
from spectune.model.vae.known import KNOWN_VAES
from spectune.ops.forecast import forecast
from spectune.sdxl.layout import SDXL, UNET_ROOT, VAE_ROOT, LatentStatistics, VaeLayout
from spectune.training.loop import train
from spectune.training.objective import noising, objective
from spectune.training.recipe.defaults import bucket_defaults
from spectune.training.recipe.sections.data import DataSection
from spectune.training.trainable_model import build_trainable, with_chosen_vae
from tests.training.conftest import MakeRecipe

CONV_IN, CONV_OUT = f"{UNET_ROOT}input_blocks.0.0.weight", f"{UNET_ROOT}out.2"
LEVELS: dict[str, Any] = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def widened(checkpoint: Path, path: Path, channels: int) -> Path:
    """Write a checkpoint whose UNet takes latents of other channels, without an autoencoder."""
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    tensors = {name: t for name, t in load_file(checkpoint).items() if not name.startswith(VAE_ROOT)}
    repeats = channels // 4
    tensors[CONV_IN] = tensors[CONV_IN].repeat(1, repeats, 1, 1) / repeats
    tensors[f"{CONV_OUT}.weight"] = tensors[f"{CONV_OUT}.weight"].repeat(repeats, 1, 1, 1)
    tensors[f"{CONV_OUT}.bias"] = tensors[f"{CONV_OUT}.bias"].repeat(repeats)
    save_file(tensors, path, metadata)
    return path


def autoencoder(kind: str) -> AutoencoderKL | AutoencoderKLFlux2 | AutoencoderDC:
    torch.manual_seed(0)
    if kind == "flux1":
        return AutoencoderKL(**LEVELS, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    if kind == "flux2-packed":
        return AutoencoderKLFlux2(**LEVELS)
    widths = (8, 8, 8, 8, 8, 32)
    return AutoencoderDC(
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
    )


@pytest.mark.parametrize(
    ("name", "channels", "pixels", "step"),
    [
        pytest.param("flux1", 16, 8, 32, marks=pytest.mark.slow),
        pytest.param("flux2-packed", 128, 16, 64, marks=pytest.mark.slow),
        ("sana", 32, 32, 128),
    ],
)
def test_a_run_in_another_latent_space(
    make_recipe: MakeRecipe,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    channels: int,
    pixels: int,
    step: int,
) -> None:
    base = widened(tiny_checkpoint, tmp_path / "base.safetensors", channels)
    autoencoder(name).save_pretrained(tmp_path / "vae")
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (4 * step, step), "gray").save(picture)
    mask = Image.new("L", (4 * step, step))
    mask.paste(255, (0, 0, step, step))
    mask.save(picture.with_name("a.mask.png"))
    recipe = make_recipe(
        model={"base": base, "parts": ["unet"]},
        vae={"path": tmp_path / "vae", **({} if name == "flux2-packed" else {"name": name})},
        data={
            "folders": [picture.parent],
            "resolution_px": 2 * step,
            "mask": "file",
            "bucket": {"enabled": True},
        },
        run={"steps": 1, "batch": 1, "seed": 0},
    )
    noised: list[tuple[tuple[int, ...], int]] = []

    def noise_at_random(prediction: Any, x0: torch.Tensor, *args: Any, **options: Any) -> Any:
        noised.append((tuple(x0.shape), options["pixels_per_latent"]))
        return noising.noise_at_random(prediction, x0, *args, **options)

    monkeypatch.setattr(objective, "noise_at_random", noise_at_random)
    report = train(recipe)
    # the flow shift by resolution takes the area in pixels from these
    ((shape, edge),) = noised
    assert (shape[:2], edge) == ((1, channels), pixels)
    height, width = (side * pixels for side in shape[2:])
    assert (height % step, width % step) == (0, 0)
    assert width > height
    with open_checkpoint(report.files[-1]) as file:
        declared = file.provenance
    known = KNOWN_VAES[name]
    assert (declared.vae_scale, declared.vae_shift, declared.vae_name) == (known.scale, known.shift, "vae")

    capfd.readouterr()
    drawing = ["sample", f"{base}", f"{report.files[-1]}", "-c", "a", "--size", f"{step}", "--steps", "1"]
    drawing += ["-o", str(tmp_path / "drawn")]
    assert spectune([*drawing, "--vae", str(tmp_path / "vae")]) == 0, capfd.readouterr().err
    with Image.open(next((tmp_path / "drawn").glob("*.png"))) as drawn:
        assert drawn.size == (step, step)
    assert spectune([*drawing, "--force"]) == 2
    assert "the checkpoint has no VAE" in capfd.readouterr().err


def test_the_step_of_buckets_fits_the_latents() -> None:
    def step(resolution: int, vae: VaeLayout) -> int:
        data = DataSection.model_validate({"folders": ["a"], "resolution_px": resolution})
        return bucket_defaults(data, replace(SDXL, vae=vae))["step_px"]

    assert SDXL.vae is not None
    packed = replace(SDXL.vae, packed=LatentStatistics((0.0,), (1.0,)))
    deep = replace(SDXL.vae, channels=(8,) * 6)
    assert [step(size, SDXL.vae) for size in (256, 512, 1024)] == [32, 32, 64]
    assert [step(size, packed) for size in (512, 1024)] == [64, 64]
    assert [step(size, deep) for size in (512, 1024)] == [128, 128]


def test_the_forecast_refuses_an_autoencoder_that_does_not_fit(
    make_recipe: MakeRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    autoencoder("flux1").save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="vae makes latents of 16 channels, but the UNet takes 4"):
        forecast(make_recipe(vae={"path": tmp_path / "vae"}), force=False)
    with pytest.raises(InputError, match=r"tiny\.safetensors is not the VAE 'flux1'"):
        forecast(make_recipe(vae={"name": "flux1"}), force=False)
    base = widened(tiny_checkpoint, tmp_path / "base.safetensors", 16)
    config = tmp_path / "vae" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("0.18215", "null"))
    with pytest.raises(InputError, match="neither a name nor a file declares the scale and shift of vae"):
        forecast(make_recipe(model={"base": base}, vae={"path": tmp_path / "vae"}), force=False)


def test_packed_latents_have_no_other_scale(
    make_recipe: MakeRecipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = widened(tiny_checkpoint, tmp_path / "base.safetensors", 128)
    autoencoder("flux2-packed").save_pretrained(tmp_path / "vae")
    recipe = make_recipe(
        model={"base": base, "parts": ["unet"]}, vae={"path": tmp_path / "vae", "scale": 0.5}
    )
    trainable = build_trainable(recipe.model, seed=0)
    with pytest.raises(InputError, match="packed latents are normalized by the statistics in the file"):
        with_chosen_vae(trainable, recipe.vae)
    plain = recipe.vae.model_copy(update={"scale": None})
    declared = with_chosen_vae(trainable, plain).provenance
    assert (declared.vae_scale, declared.vae_shift, declared.vae_name) == (1.0, 0.0, "vae")


def test_the_commands_after_a_run_name_its_autoencoder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(vae={"path": tmp_path / "vae"})
    assert commands_after_training(recipe, folder=tmp_path)[-1].endswith("--vae vae -o out/t-pictures")
