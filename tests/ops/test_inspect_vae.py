"""`inspect` names the kind of an autoencoder, its latents, and the known ones that have this form."""

import json

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from safetensors.torch import load_file, save_file

from spectune.cli.app import run
from spectune.sdxl.layout import VAE_ROOT, hints_metadata
from tests.layouts import TINY
from tests.training.test_latent_spaces import LEVELS, autoencoder


def shown(path, capfd):
    code, shown = run(["inspect", str(path)]), capfd.readouterr().err
    assert code == 0, shown
    return shown


def test_folders(tmp_path, capfd):
    autoencoder("sana").save_pretrained(tmp_path / "sana")
    assert shown(tmp_path / "sana", capfd).splitlines() == [
        "sana: an autoencoder (AutoencoderDC), diffusers key names",
        "  latents       32 channels, 32 pixels per latent, without quant convolutions",
        "  scale, shift  1, 0 (declared)",
        "  names         sana (the form fits; the weights are not compared)",
    ]
    AutoencoderKLFlux2(**LEVELS).save_pretrained(tmp_path / "flux2")
    assert shown(tmp_path / "flux2", capfd).splitlines() == [
        "flux2: an autoencoder (AutoencoderKLFlux2), diffusers key names",
        "  latents       32 channels, 8 pixels per latent",
        "  packed        128 channels, 16 pixels per latent",
        "  scale, shift  unknown: the file does not declare them; packed latents need none",
        "  names         flux2, flux2-packed (the form fits; the weights are not compared)",
    ]


def test_single_files(tiny_checkpoint, tmp_path, capfd):
    tensors = {name: t for name, t in load_file(tiny_checkpoint).items() if name.startswith(VAE_ROOT)}
    path = tmp_path / "vae.safetensors"
    save_file(tensors, path, hints_metadata(TINY))
    out = shown(path, capfd)
    assert "vae.safetensors: an autoencoder (AutoencoderKL), sgm key names" in out
    assert "0.13025, 0 (assumed: the file does not declare them)" in out
    assert "4 pixels per latent" in out
    assert "  names " not in out  # no known one has 4 pixels per latent
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["channels"] == 4
    save_file(AutoencoderKL(**LEVELS).state_dict(), path, {"spectune.layout": '{"vae_norm_groups": 4}'})
    assert "names         sdxl, eq-kblueleaf, eq-anzhc, eq-bluvoll" in shown(path, capfd)
    flux = AutoencoderKL(**LEVELS, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    save_file(flux.state_dict(), path, {"spectune.layout": '{"vae_norm_groups": 4}'})
    out = shown(path, capfd)
    assert "16 channels, 8 pixels per latent, without quant convolutions" in out
    assert "names         flux1" in out
    save_file({"encoder.0.bias": torch.zeros(4), "decoder.1.bias": torch.ones(4)}, path)
    assert run(["inspect", str(path)]) == 2
    assert "is not laid out like SDXL's VAE" in capfd.readouterr().err
