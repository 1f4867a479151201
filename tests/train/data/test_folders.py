from __future__ import annotations

from pathlib import Path

import pytest

from spectune.errors import InputError
from spectune.train.data.buckets import Size
from spectune.train.data.folders import scan_held_out, scan_parents
from tests.train.conftest import draw

EXTENSIONS = (".txt",)


def test_repeats_captions_and_everything_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "10_red cat" / "a.png", (30, 20))
    draw(tmp_path / "10_red cat" / "b.JPG")
    draw(tmp_path / "2_dog" / "c.webp")
    draw(tmp_path / "plain" / "d.png")
    draw(tmp_path / "0_off" / "e.png")
    (tmp_path / "10_red cat" / "a.txt").write_text("a red cat")
    (tmp_path / "10_red cat" / "b.txt").write_text("\n")
    (tmp_path / "2_dog" / "torn.png").write_bytes(b"\x89PNG")

    scan = scan_parents([tmp_path], EXTENSIONS)

    found = {image.path.name: (image.caption, image.repeats) for image in scan.images}
    assert found == {"a.png": ("a red cat", 10), "b.JPG": ("", 10), "c.webp": ("dog", 2)}
    assert scan.images[0].size == Size(30, 20)
    assert scan.warnings() == [
        "2 folders ignored, not named `N_name`: 0_off, plain",
        "1 images skipped: torn.png is not an image that Pillow can read",
        "1 images have no caption file, their folder's name is used: c.webp",
        "1 captions are empty: b.JPG",
    ]


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1_none").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"no usable image in .*1 folders ignored.*images") as caught:
        scan_parents([tmp_path], EXTENSIONS)
    assert "N = repeats" in (caught.value.hint or "")
    with pytest.raises(InputError, match="is not a folder"):
        scan_parents([tmp_path / "nowhere"], EXTENSIONS)


def test_held_out_images_may_lie_bare(tmp_path: Path) -> None:
    draw(tmp_path / "bare" / "a.png")
    draw(tmp_path / "kohya" / "1_x" / "a.png")
    assert len(scan_held_out(tmp_path / "bare", EXTENSIONS).images) == 1
    assert scan_held_out(tmp_path / "kohya", EXTENSIONS).images[0].caption == "x"
