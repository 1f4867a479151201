"""Test the commands that work on files with all 2515 tensors of SDXL, at full depth with narrow layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.core.delta import Delta
from spectune.files.writer import write_tensors
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import hints_metadata
from tests.layouts import FULL, build_modules

_UNET, _TE1, _TE2, _VAE = FULL.unet, FULL.te1, FULL.te2, FULL.vae
assert _VAE is not None
NARROW = replace(
    FULL,
    unet=replace(
        _UNET, channels=(8, 16, 32), heads=(1, 2, 2), context=24, pooled=16, time_id_channels=8, norm_groups=8
    ),
    te1=replace(_TE1, width=8, heads=2, mlp=32, vocab=64),
    te2=replace(_TE2, width=16, heads=2, mlp=64, vocab=64, projection=16),
    vae=replace(_VAE, channels=(8, 16, 32, 32), norm_groups=4),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = build_modules(NARROW).single_file()
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    write_tensors(path, halves, metadata=hints_metadata(NARROW))
    return path


@pytest.fixture(scope="module")
def pair(model):
    folder = model.parent
    assert run(["split", str(model), "-o", str(folder), "--rank", "4", "--residual-dtype", "float32"]) == 0
    return folder / "full.residual.safetensors", folder / "full.principal-r4.safetensors"


def test_split_covers_the_modules_of_the_guide_and_every_tensor_is_exact(model, pair, capfd):
    residual, principal = pair
    assert run(["inspect", str(principal), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["layers"] == {"unet": 788, "te1": 72, "te2": 192}
    assert run(["verify", str(model), str(residual), str(principal), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["tensors"], report["exact_tensors"], report["exact"]) == (2515, 2515, True)


def test_rebuild_restores_the_original_bit_for_bit(model, pair, tmp_path):
    residual, principal = pair
    rebuilt = tmp_path / "rebuilt.safetensors"
    assert run(["rebuild", str(principal), "--base", str(residual), "-o", str(rebuilt)]) == 0
    before, after = load_file(model), load_file(rebuilt)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_export_of_a_tuned_adapter_covers_all_layers(model, pair, tmp_path, capfd):
    with open_checkpoint(model) as base:
        catalogue = build_catalogue(base)
        frames = open_adapter(pair[1], catalogue)
        generator = torch.Generator().manual_seed(1)
        deltas = {
            name: Delta(
                frame,
                1e-3 * torch.randn(frame.down.shape, generator=generator),
                1e-3 * torch.randn(frame.up.shape, generator=generator),
            )
            for name, frame in frames.layers.items()
        }
        tuned = tmp_path / "tuned.safetensors"
        origin = frames.provenance
        save_tuned(tuned, TunedAdapter(deltas, {}, "tuned"), origin)
    lora = tmp_path / "lora.safetensors"
    assert run(["export", str(tuned), "--base", str(model), "-o", str(lora), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["layers"] == 1052
    assert report["error"] < 1e-3
    keys = load_file(lora).keys()
    assert len(keys) == 3 * 1052
    assert {"lora_te2_text_model_encoder_layers_31_self_attn_q_proj.lora_down.weight"} <= keys
