"""From a checkpoint and a folder of odd files to a LoRA: new, --dry-run, train, stop, resume, export."""

from __future__ import annotations

import json
import signal
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import spectune
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.cli.demo import demo_files
from spectune.training.callbacks import Callbacks, StepInfo

TAGS = ", ".join(f"tag {number}" for number in range(300))


def draw(number: int) -> Image.Image:
    return Image.linear_gradient("L").resize((80 + 8 * number, 64)).convert("RGB")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder with a picture of each kind: EXIF, animated GIF, HEIC, UTF-16 and long captions."""
    heif = pytest.importorskip("pillow_heif")
    folder = tmp_path / "my pictures"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    draw(0).save(folder / "rotated.jpg", exif=exif)
    draw(1).save(folder / "moving.gif", save_all=True, append_images=[draw(1).rotate(90)])
    heif.from_pillow(draw(2)).save(folder / "phone.heic")
    draw(3).save(folder / "plain.png")
    draw(4).save(folder / "tagged.webp")
    (folder / "rotated.txt").write_text("a gray ramp, turned", encoding="utf-16")
    (folder / "moving.txt").write_bytes("a café".encode("cp1252"))
    (folder / "phone.txt").write_text("a gray ramp\nsecond line\n", encoding="utf-8-sig")
    (folder / "tagged.txt").write_text(TAGS, encoding="utf-8")
    return folder


class Stop(Callbacks):
    """Presses Ctrl-C after a step."""

    def on_step(self, info: StepInfo) -> None:
        if info.step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_from_a_checkpoint_and_odd_pictures_to_a_lora(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = str(demo_files().base)
    assert run(["new", base, pictures.name, "--yes", "--rank", "2", "--steps", "4", "-o", "r.toml"]) == 0
    made = capfd.readouterr()
    assert made.out.splitlines() == ["spectune train r.toml --dry-run", "spectune train r.toml"]
    assert "1 caption empty: plain.png" in " ".join(made.err.split())

    assert run(["train", "r.toml", "--dry-run", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["problems"] == []
    assert plan["schedule"]["steps"] == 4
    assert plan["pictures"]["training"] == 5, plan["warnings"]
    found = " | ".join(plan["warnings"])
    for expected in ("tagged", "rotated"):
        assert expected in found

    Path("r.prompts.txt").write_text("a gray ramp --s 2 --d 1\na cat --s 2 --l 3\n", encoding="utf-8")
    one_part = ("model.parts=unet", "run.batch=1", "run.preview_every_steps=4")
    first = spectune.train(Path("r.toml"), overrides=one_part, callbacks=(Stop(),))
    assert (first.steps, first.interrupted) == (2, True)
    faster = (*one_part, "optimizer.learning_rate=0.001")
    assert run(["train", "r.toml", *(word for pair in faster for word in ("--set", pair))]) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "resuming after step 2" in shown
    assert "optimizer.learning_rate" in shown

    name = tomllib.loads(Path("r.toml").read_text(encoding="utf-8"))["run"]["name"]
    assert name == "my_pictures"
    tuned = Path("runs", name, f"{name}.safetensors")
    assert len(list((tuned.parent / "previews").rglob("*.png"))) > 1
    assert run(["export", base, str(tuned), "-o", "lora.safetensors"]) == 0
    with open_checkpoint(Path("lora.safetensors")) as lora:
        names = [key for key in lora.tensors if key.endswith("lora_down.weight")]
        assert len(names) > 100
        assert max(lora.tensors[key].shape[0] for key in names) == 4  # twice the trained rank
