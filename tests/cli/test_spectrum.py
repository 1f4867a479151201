"""Test `inspect --spectrum`: tables, JSON and the plot."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from spectune.cli.command import Flags, execute
from spectune.cli.commands import COMMANDS
from spectune.errors import InputError
from spectune.ops.inspect.plot import draw_spectrum
from spectune.pairs.spectrum_report import measure_spectra
from spectune.sdxl.layers import RANKS, build_catalogue


def inspect_spectrum(model, *, as_json=False, **options):
    """Run `inspect --spectrum` without parsing arguments."""
    command = next(command for command in COMMANDS if command.name == "inspect")
    execute(command, {"model": model, "spectrum": True, **options}, Flags(json=as_json))


@pytest.fixture(scope="module")
def spectra(source):
    return measure_spectra(source, build_catalogue(source))


def test_tables_show_energy_costs_and_small_layers(tiny_checkpoint, capfd, monkeypatch):
    monkeypatch.setattr("spectune.cli.console.err._width", 160)
    inspect_spectrum(tiny_checkpoint)
    out, err = capfd.readouterr()
    assert out == ""
    text = " ".join(err.split())
    for title in ("by part", "by block", "cost of a rank"):
        assert title in text
    assert "by layer" not in text
    assert "full rank below 256 (the lowest is 16); that rank holds 100 % of their energy" in text
    assert "te2.1" in text


def test_per_layer_lists_selected_layers(tiny_checkpoint, capfd, monkeypatch):
    monkeypatch.setattr("spectune.cli.console.err._width", 200)
    inspect_spectrum(tiny_checkpoint, layers=["te1.0"], per_layer=True)
    err = capfd.readouterr().err
    assert "te1.text_model.encoder.layers.0.mlp.fc1" in err
    assert "6 layers in" in err
    assert "unet" not in err


def test_stdout_holds_only_json(tiny_checkpoint, capfd, spectra, tmp_path):
    plot = tmp_path / "spectrum.png"
    inspect_spectrum(tiny_checkpoint, as_json=True, plot=plot)
    record = json.loads(capfd.readouterr().out)
    assert record["label"] == tiny_checkpoint.name
    assert record["plot"] == str(plot)
    assert [part["name"] for part in record["parts"]] == ["unet", "te1", "te2"]
    assert [cost["rank"] for cost in record["costs"]] == list(RANKS)
    energy = record["total"]["energies"]["16"]
    assert energy == pytest.approx(spectra.total.energies[16])
    assert energy != pytest.approx(spectra.total.energies[12], rel=0.01)
    assert "layers" not in record
    inspect_spectrum(tiny_checkpoint, as_json=True, per_layer=True)
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert len(layers) == len(spectra.layers)


def test_the_plot_draws_all_three_panels(spectra, tmp_path):
    target = tmp_path / "spectrum.png"
    draw_spectrum(spectra, target)
    with Image.open(target) as file:
        assert file.format == "PNG"
        picture = file.convert("RGB")
    width, height = picture.size
    assert width >= 1200
    panels = [
        (0, 0.1, 0.6, 0.5),  # curves: the colors of the UNet and of both encoders
        (0.65, 0.1, 1, 0.5),  # costs: grey
        (0, 0.55, 1, 0.9),  # blocks
    ]
    colors = [(0, 114, 178), (213, 94, 0), (0, 158, 115)]
    for index, (left, top, right, bottom) in enumerate(panels):
        panel = picture.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
        present = {color for _, color in panel.getcolors(maxcolors=1 << 24)}
        if index == 0:
            assert set(colors) <= present
        if index == 1:
            assert (138, 138, 138) in present
            assert not set(colors) & present
        if index == 2:  # all blocks of the tiny model have full rank: pale colors, 0.35
            assert {tuple(round(255 - 0.35 * (255 - c)) for c in color) for color in colors} <= present
    assert not list(tmp_path.glob(".*.partial"))


def test_a_plot_of_many_blocks(spectra, tmp_path):
    blocks = tuple(replace(spectra.blocks[-1], name=f"te2.{n}", largest_full_rank=1280) for n in range(54))
    draw_spectrum(replace(spectra, blocks=blocks, label="x" * 300), tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.size[0] >= 1200


def test_a_wrong_plot_path_stops_before_measuring(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("spectune.ops.inspect.measure_spectra", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"spectrum\.svg: expected a \.png file"):
        inspect_spectrum(tiny_checkpoint, plot=tmp_path / "spectrum.svg")
    existing = tmp_path / "spectrum.png"
    existing.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        inspect_spectrum(tiny_checkpoint, plot=existing)
    assert existing.read_bytes() == b"mine"
    with pytest.raises(InputError, match="there is no folder"):
        inspect_spectrum(tiny_checkpoint, plot=tmp_path / "nowhere" / "spectrum.png")


def test_force_overwrites_a_plot(tiny_checkpoint, tmp_path, capfd):
    existing = tmp_path / "spectrum.png"
    existing.write_bytes(b"mine")
    inspect_spectrum(tiny_checkpoint, plot=existing, force=True)
    assert existing.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {existing}" in capfd.readouterr().err


def test_damaged_weights_and_unknown_layers_are_errors(tiny_checkpoint, tmp_path):
    tensors = load_file(tiny_checkpoint)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors[name].view(-1)[0] = math.nan
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged)
    with pytest.raises(
        InputError, match=r"layer unet\.middle_block\.1\.proj_in of damaged\.safetensors: 1 of"
    ):
        inspect_spectrum(damaged)
    with pytest.raises(InputError, match="no layer matches `te3`; did you mean `te2`"):
        inspect_spectrum(tiny_checkpoint, layers=["te3"])


def test_an_adapter_has_no_spectrum(tmp_path, source):
    save_file(
        {"lora_unet_x.lora_down.weight": source.values[next(iter(source.values))]}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=r"a\.safetensors is an adapter: expected a checkpoint"):
        inspect_spectrum(tmp_path / "a.safetensors")
