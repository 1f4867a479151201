from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.data.folders import FilesBeside, ImageSet, scan_data, scan_held_out, scan_parents
from tests.training.conftest import draw

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


def test_sets_and_regularisation_have_weights_of_their_own(tmp_path: Path) -> None:
    for name in ("train/3_cat/a.png", "set/b.png", "keep/c.png", "class/2_animal/d.png"):
        draw(tmp_path / name)
    sets = [
        ImageSet(tmp_path / "set", repeats=4, caption="given", loss_weight=0.5),
        ImageSet(tmp_path / "keep", loss_weight=0.5, regularisation=True),
    ]

    scan = scan_data(
        [tmp_path / "train"],
        sets,
        regularisation_parents=[tmp_path / "class"],
        regularisation_weight=0.25,
    )

    found = [(image.path.name, image.caption, image.repeats, image.weight) for image in scan.images]
    assert found == [
        ("a.png", "cat", 3, 1.0),
        ("b.png", "given", 4, 0.5),
        ("c.png", "", 1, 0.125),
        ("d.png", "animal", 2, 0.25),
    ]
    assert scan.warnings() == [
        "2 images have no caption file, their folder's name is used: a.png, d.png",
        "1 captions are empty: c.png",
    ]


def test_each_source_of_images_must_hold_one(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "1_x" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"")
    train = [tmp_path / "train"]

    with pytest.raises(InputError, match=r"no usable image in .*empty$") as caught:
        scan_data(train, [ImageSet(tmp_path / "empty")])
    assert "[[data.sets]]" in (caught.value.hint or "")
    with pytest.raises(InputError, match=r"torn; 1 images skipped: a\.png is an empty file"):
        scan_data(sets=[ImageSet(tmp_path / "torn")])
    with pytest.raises(InputError, match="nowhere is not a folder"):
        scan_data(sets=[ImageSet(tmp_path / "nowhere")])
    with pytest.raises(InputError, match=r"no usable image in .*empty") as caught:
        scan_data(train, regularisation_parents=[tmp_path / "empty"])
    assert "data.regularisation_folders" in (caught.value.hint or "")
    with pytest.raises(InputError, match="no usable image"):
        scan_data()


def test_a_caption_file_wins_over_the_sidecar(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    for name in ("a.png", "b.png", "c.png"):
        draw(folder / name)
    (folder / "torn.png").write_text("no image")
    (folder / "a.txt").write_text("from its file")
    (folder / "metadata.jsonl").write_text(
        "\n".join(
            f'{{"file_name": "{name}", "text": "{text}"}}'
            for name, text in (
                ("a.png", "sidecar a"),
                ("b.png", "sidecar b"),
                ("torn.png", "t"),
                ("z.png", "z"),
                ("sub/c.png", "c"),
            )
        )
    )

    scan = scan_data([tmp_path], beside=FilesBeside(EXTENSIONS, sidecar="metadata.jsonl"))

    assert [image.caption for image in scan.images] == ["from its file", "sidecar b", "x"]
    assert scan.warnings() == [
        "1 images skipped: torn.png is not an image that Pillow can read",
        "1 images have no caption file, their folder's name is used: c.png",
        "2 captions of sidecars have no image: sub/c.png, z.png",
    ]
    assert [image.caption for image in scan_parents([tmp_path], EXTENSIONS).images] == [
        "from its file",
        "x",
        "x",
    ]
    held_out = scan_held_out(folder, EXTENSIONS, sidecar="metadata.jsonl")
    assert held_out.images[1].caption == "sidecar b"


def test_mask_files_are_never_images(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    for name in ("a.webp", "a.mask.png", "b.png", "z.mask.png"):
        draw(folder / name)

    for scan in (scan_parents([tmp_path], EXTENSIONS), scan_held_out(tmp_path, EXTENSIONS)):
        assert [image.path.name for image in scan.images] == ["a.webp", "b.png"]
        assert [image.mask for image in scan.images] == [None, None]
        assert scan.warnings()[-1] == "2 mask files are not used: a.mask.png, z.mask.png"
    masked = scan_data([tmp_path], beside=FilesBeside(EXTENSIONS, mask="file"))
    assert [image.mask for image in masked.images] == [folder / "a.mask.png", None]
    assert masked.warnings()[-2:] == [
        "1 images have no mask and count fully: b.png",
        "1 mask files are not used: z.mask.png",
    ]
    other = scan_data([tmp_path], beside=FilesBeside(EXTENSIONS, mask="file", mask_suffix="_m.png"))
    assert len(other.images) == 4

    draw(folder / "b.mask.png", (40, 20))
    with pytest.raises(InputError, match=r"b\.mask\.png is 40x20, of another aspect"):
        scan_data([tmp_path], beside=FilesBeside(EXTENSIONS, mask="file"))


def test_images_without_an_alpha_channel_are_counted(tmp_path: Path) -> None:
    draw(tmp_path / "1_x" / "a.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "1_x" / "b.png")
    scan = scan_data([tmp_path], beside=FilesBeside(EXTENSIONS, mask="alpha"))
    assert scan.warnings()[-1] == "1 images have no mask and count fully: a.png"
    assert not any("mask" in line for line in scan_data([tmp_path]).warnings())


def test_odd_files_are_handled_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    draw(folder / "good.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (1, 40)).save(folder / "strip.png")
    Image.new("F", (4, 4), 0.5).save(folder / "float.tif")
    (folder / "none.png").write_bytes(b"")
    (folder / "text.png").write_text("a cat")
    (folder / "notes.md").write_text("not looked at")

    scan = scan_parents([tmp_path], EXTENSIONS)

    assert [(image.path.name, image.size) for image in scan.images] == [
        ("dot.png", Size(1, 1)),
        ("good.png", Size(40, 40)),
    ]
    assert {path.name: why for path, why in scan.skipped} == {
        "float.tif": "holds floating-point levels, whose range is not known",
        "none.png": "is an empty file",
        "strip.png": "is 1x40, longer than 32 times its shorter side",
        "text.png": "is not an image that Pillow can read",
    }
    assert scan.warnings()[0].startswith("4 images skipped: float.tif holds")
