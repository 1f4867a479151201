"""Test which autoencoder and which latent scaling draw the pictures."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectune.cli.app import run
from spectune.files.provenance import Provenance
from spectune.model.vae.convention import declare_vae, known_convention
from spectune.ops.drawing.models import declared_vae
from spectune.ops.drawing.models import load_model as load
from spectune.ops.drawing.specs import ModelSpec, Weighted
from spectune.ops.options.pictures import DrawingOptions
from spectune.sdxl.layout import VAE_ROOT

ANZHC = known_convention("eq-anzhc")


@pytest.fixture(scope="module")
def vae_file(tiny_checkpoint, tmp_path_factory):
    """Return the checkpoint's own autoencoder with another last bias, which gives brighter pictures."""
    tensors = {name: t for name, t in load_file(tiny_checkpoint).items() if name.startswith(VAE_ROOT)}
    tensors[f"{VAE_ROOT}decoder.conv_out.bias"] += 0.25
    path = tmp_path_factory.mktemp("vae") / "bright.safetensors"
    save_file(tensors, path, metadata_of(tiny_checkpoint))
    return path


@pytest.fixture
def pair(tiny_checkpoint, tmp_path, capfd):
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "4"]) == 0
    capfd.readouterr()
    return tmp_path / "tiny.residual.safetensors", tmp_path / "tiny.principal-r4.safetensors"


def load_model(spec, warnings=None, **options):
    notify = (lambda text: None) if warnings is None else warnings.append
    return load(spec, DrawingOptions(notify=notify, **options))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def declaring(path, folder, origin):
    """Return a copy of a file that declares the autoencoder of its training."""
    copy = folder / f"declaring-{path.name}"
    save_file(load_file(path), copy, metadata_of(path) | origin.to_metadata())
    return copy


def convention(model):
    conv = model.vae.encoder.conv_in
    return model.layout.vae.scale, model.layout.vae.shift, conv.padding_mode


def test_vae_options_change_the_pictures(tiny_checkpoint, vae_file, tmp_path, capfd):
    small = ["-c", "a cat", "--size", "32", "--steps", "2"]
    commands = {
        "own": [],
        "other": ["--vae", str(vae_file)],
        "name": ["--vae-name", "eq-anzhc"],
        "both": ["--vae", str(tiny_checkpoint), "--vae-name", "sdxl"],
    }
    for folder, options in commands.items():
        command = ["sample", str(tiny_checkpoint), *small, *options, "-o", str(tmp_path / folder)]
        assert run(command) == 0, capfd.readouterr().err
    pictures = {folder: (tmp_path / folder / "000-a-cat.png").read_bytes() for folder in commands}
    assert pictures["both"] == pictures["own"]
    assert len({pictures["own"], pictures["other"], pictures["name"]}) == 3


def test_compare_has_the_vae_options_and_refuses_a_wrong_name(tiny_checkpoint, vae_file, tmp_path, capfd):
    models = ["compare", str(tiny_checkpoint), str(tiny_checkpoint), "-o", str(tmp_path / "sheet.png")]
    small = ["-c", "a cat", "--size", "32", "--steps", "1", "--cell", "32"]
    assert run([*models, *small, "--vae", str(vae_file), "--json"]) == 0
    assert '"psnr_db": "inf"' in capfd.readouterr().out
    assert run([*models, *small, "--force", "--vae-name", "eq-anzc"]) == 2
    assert "unknown VAE 'eq-anzc'; did you mean `eq-anzhc`?" in capfd.readouterr().err


def test_an_adapter_declares_its_latent_scaling(pair, tmp_path):
    residual, principal = pair
    adapter = declaring(principal, tmp_path, declare_vae(Provenance(), ANZHC, None))
    plain = load_model(ModelSpec(residual, (Weighted(principal, 1.0),)))
    assert convention(plain) == (0.13025, 0.0, "zeros")
    warnings = []
    model = load_model(ModelSpec(residual, (Weighted(adapter, 1.0),)), warnings)
    assert convention(model) == (0.1406, -0.4743, "reflect")
    assert [text for text in warnings if "prediction type" not in text] == []
    overridden = load_model(ModelSpec(residual, (Weighted(adapter, 1.0),)), vae_name="sdxl")
    assert convention(overridden) == (0.13025, 0.0, "zeros")


def test_the_last_declaring_adapter_overrides_the_base(pair, tiny_checkpoint, tmp_path):
    base = declaring(tiny_checkpoint, tmp_path, Provenance(vae_scale=0.5))
    assert convention(load_model(ModelSpec(base, ()))) == (0.5, 0.0, "zeros")
    first = declaring(pair[1], tmp_path, Provenance(vae_scale=0.2, vae_shift=0.1))
    last = declaring(first, tmp_path, Provenance(vae_scale=0.3))
    plain_adapter = Weighted(pair[1], 1.0)
    adapters = (Weighted(first, 1.0), Weighted(last, 1.0), plain_adapter)
    assert declared_vae(ModelSpec(base, adapters)).vae_scale == 0.3
    assert declared_vae(ModelSpec(base, (plain_adapter,))).vae_scale == 0.5
    assert declared_vae(ModelSpec(tiny_checkpoint, (plain_adapter,))).vae_scale is None


def test_a_warning_names_a_missing_autoencoder(pair, vae_file, tmp_path):
    residual, principal = pair
    adapter = declaring(principal, tmp_path, declare_vae(Provenance(), ANZHC, vae_file))
    spec = ModelSpec(residual, (Weighted(adapter, 1.0),))
    warnings = []
    load_model(spec, warnings)
    (warning,) = [text for text in warnings if "prediction type" not in text]
    assert "was trained with the autoencoder bright.safetensors" in warning
    assert "pass `vae`" in warning
    warnings.clear()
    model = load_model(spec, warnings, vae=vae_file)
    assert [text for text in warnings if "prediction type" not in text] == []
    assert convention(model) == (0.1406, -0.4743, "reflect")
    own = load_model(ModelSpec(residual, (Weighted(principal, 1.0),)))
    brighter = model.vae.decoder.conv_out.bias - own.vae.decoder.conv_out.bias
    torch.testing.assert_close(brighter, torch.full((3,), 0.25), rtol=0, atol=2**-12)  # float16 in the file
