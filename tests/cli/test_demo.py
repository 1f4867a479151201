"""Test the demo end to end on the embedded base, with two training steps."""

from dataclasses import replace

import pytest
from PIL import Image
from safetensors.torch import load_file

from spectune.cli import demo as cli
from spectune.cli.demo import check_hash, demo, demo_files
from spectune.errors import InputError
from spectune.sampling.contact_sheet import mean_psnr
from spectune.training.data.folders import scan_training
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.sections.data import DataSection


def test_the_embedded_base_has_the_pinned_hash(tmp_path):
    files = demo_files()
    check_hash(files.base, files.checksum)
    damaged = tmp_path / "base.safetensors"
    data = bytearray(files.base.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match="is damaged: expected sha256"):
        check_hash(damaged, files.checksum)


def test_drawn_captions_are_held_out():
    files = demo_files()
    folder = files.base.parent
    scans = [scan_training(DataSection(folders=(folder / name,))) for name in ("images", "validation")]
    train, held_out = ({image.caption for image in scan.images} for scan in scans)
    drawn = {line for line in files.captions.read_text(encoding="utf-8").splitlines() if line}
    assert (len(train), len(held_out)) == (120, 40)
    assert not train & held_out
    assert drawn <= held_out


def test_demo_passes_all_its_checks(tmp_path, monkeypatch):
    """`demo` raises unless the pair is exact, its pictures are identical and the LoRA has 45 dB."""
    monkeypatch.setattr(cli, "PICTURES", replace(cli.PICTURES, steps=4))
    short = ("run.validation_times=1", "run.batch=4")
    monkeypatch.setattr(cli, "load_recipe", lambda path, changes: load_recipe(path, [*changes, *short]))
    report = demo(tmp_path / "demo", steps=2)
    assert report.sheet == tmp_path / "demo" / "demo.png"
    assert report.share == 1.0
    assert report.lora_db > report.tuned_db + 6, (
        "pictures of the LoRA are closer to the tuned model than to the original"
    )
    with Image.open(report.sheet) as picture:
        assert picture.width > 5 * 128
    written = {path.name for path in (tmp_path / "demo").glob("*.safetensors")}
    assert {"base.principal-r16.safetensors", "base.residual.safetensors", "emoji3d.safetensors"} <= written
    assert {"base-emoji3d.safetensors", "emoji3d-lora.safetensors"} <= written
    before = load_file(demo_files().base)
    after = load_file(tmp_path / "demo" / "base-emoji3d.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed), "only the UNet is tuned"


def test_slightly_different_pictures_are_below_45_db():
    one, other = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (103, 100, 100))
    assert mean_psnr([one], [other]) < 45
