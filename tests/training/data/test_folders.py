from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.data.pictures import formats
from spectune.training.data.scan import Scan
from spectune.training.recipe.sections.data import DataSection
from tests.training.conftest import draw


def scan_of(*folders: Path, sidecar: str = "metadata.jsonl", **keys: Any) -> Scan:
    return scan_training(DataSection(folders=folders, caption={"sidecar": sidecar}, **keys))  # pyright: ignore


def validation_of(folder: Path) -> Scan:
    scan = scan_validation(DataSection(folders=(folder,), validation_folder=folder))
    assert scan is not None
    return scan


def test_repeats_captions_and_skipped_files(tmp_path: Path) -> None:
    draw(tmp_path / "10_red cat" / "a.png", (30, 20))
    draw(tmp_path / "10_red cat" / "b.JPG")
    draw(tmp_path / "2_dog" / "c.webp")
    draw(tmp_path / "plain" / "d.png")
    draw(tmp_path / "0_off" / "e.png")
    (tmp_path / "10_red cat" / "a.txt").write_text("a red cat")
    (tmp_path / "10_red cat" / "b.txt").write_text("\n")
    (tmp_path / "2_dog" / "torn.png").write_bytes(b"\x89PNG")

    scan = scan_of(tmp_path)

    images = {image.path.name: (image.caption, image.repeats) for image in scan.images}
    assert images == {"a.png": ("a red cat", 10), "b.JPG": ("", 10), "c.webp": ("dog", 2)}
    assert scan.images[0].size == Size(30, 20)
    assert scan.warnings() == [
        "2 folders ignored, not named `N_name`: 0_off, plain",
        "1 image in nested folders not used; data.recursive = true includes them: d.png",
        "1 image skipped: torn.png is not an image that Pillow can read",
        "1 image without a caption file, captioned with the name of its folder: c.webp",
        "1 caption empty: b.JPG",
    ]


def test_an_empty_dataset_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1_none").mkdir()
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"no usable image in .*1 folder ignored.*images") as caught:
        scan_of(tmp_path)
    assert "N = repeats" in (caught.value.hint or "")
    with pytest.raises(InputError, match="is not a folder"):
        scan_of(tmp_path / "nowhere")


def test_validation_images_may_be_directly_in_the_folder(tmp_path: Path) -> None:
    draw(tmp_path / "bare" / "a.png")
    draw(tmp_path / "kohya" / "1_x" / "a.png")
    assert [image.caption for image in validation_of(tmp_path / "bare").images] == [""]
    assert validation_of(tmp_path / "kohya").images[0].caption == "x"
    assert scan_validation(DataSection(folders=(tmp_path,))) is None
    with pytest.raises(InputError, match="nowhere is not a folder"):
        validation_of(tmp_path / "nowhere")


def test_sets_and_regularization_images_are_weighted(tmp_path: Path) -> None:
    for name in ("train/3_cat/a.png", "set/b.png", "keep/c.png", "class/2_animal/d.png"):
        draw(tmp_path / name)
    sets = [
        {"path": tmp_path / "set", "repeats": 4, "caption": "given", "loss_weight": 0.5},
        {"path": tmp_path / "keep", "loss_weight": 0.5, "regularisation": True},
    ]

    scan = scan_of(
        tmp_path / "train",
        sets=sets,
        regularisation_folders=[tmp_path / "class"],
        regularisation_weight=0.25,
    )

    images = [(image.path.name, image.caption, image.repeats, image.weight) for image in scan.images]
    assert images == [
        ("a.png", "cat", 3, 1.0),
        ("b.png", "given", 4, 0.5),
        ("c.png", "", 1, 0.125),
        ("d.png", "animal", 2, 0.25),
    ]
    assert scan.warnings() == [
        "2 images without a caption file, captioned with the name of its folder: a.png, d.png",
        "1 caption empty: c.png",
    ]


def test_each_source_needs_a_usable_image(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "1_x" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"")
    train = tmp_path / "train"

    with pytest.raises(InputError, match=r"no usable image in .*empty$") as caught:
        scan_of(train, sets=[{"path": tmp_path / "empty"}])
    assert "[[data.sets]]" in (caught.value.hint or "")
    with pytest.raises(InputError, match=r"torn; 1 image skipped: a\.png is an empty file"):
        scan_of(sets=[{"path": tmp_path / "torn"}])
    with pytest.raises(InputError, match="nowhere is not a folder"):
        scan_of(sets=[{"path": tmp_path / "nowhere"}])
    with pytest.raises(InputError, match=r"no usable image in .*empty") as caught:
        scan_of(train, regularisation_folders=[tmp_path / "empty"])
    assert "data.regularisation_folders" in (caught.value.hint or "")


def test_a_caption_file_has_priority_over_the_sidecar(tmp_path: Path) -> None:
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

    scan = scan_of(tmp_path)

    assert [image.caption for image in scan.images] == ["from its file", "sidecar b", "x"]
    assert scan.warnings() == [
        "1 image skipped: torn.png is not an image that Pillow can read",
        "1 image without a caption file, captioned with the name of its folder: c.png",
        "2 captions in sidecars without an image: sub/c.png, z.png",
    ]
    without = scan_of(tmp_path, sidecar="")
    assert [image.caption for image in without.images] == ["from its file", "x", "x"]
    assert validation_of(folder).images[1].caption == "sidecar b"


def test_mask_files_are_never_images(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    for name in ("a.webp", "a.mask.png", "b.png", "z.mask.png"):
        draw(folder / name)

    for scan in (scan_of(tmp_path), validation_of(tmp_path)):
        assert [image.path.name for image in scan.images] == ["a.webp", "b.png"]
        assert [image.mask for image in scan.images] == [None, None]
        assert scan.warnings()[-1] == "2 mask files not used: a.mask.png, z.mask.png"
    masked = scan_of(tmp_path, mask="file")
    assert [image.mask for image in masked.images] == [folder / "a.mask.png", None]
    assert masked.warnings()[-2:] == [
        "1 image without a mask; the loss covers the complete image: b.png",
        "1 mask file not used: z.mask.png",
    ]
    other = scan_of(tmp_path, mask="file", mask_suffix="_m.png")
    assert len(other.images) == 4

    draw(folder / "b.mask.png", (40, 20))
    with pytest.raises(
        InputError, match=r"b\.mask\.png is 40x20, its image \d+x\d+: expected the same aspect"
    ):
        scan_of(tmp_path, mask="file")


def test_images_without_an_alpha_channel_are_counted(tmp_path: Path) -> None:
    draw(tmp_path / "1_x" / "a.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "1_x" / "b.png")
    scan = scan_of(tmp_path, mask="alpha")
    assert scan.warnings()[-1] == "1 image without a mask; the loss covers the complete image: a.png"
    assert not any("mask" in line for line in scan_of(tmp_path).warnings())


def test_unusual_files_are_read_or_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    draw(folder / "good.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (1, 40)).save(folder / "strip.png")
    Image.new("F", (4, 4), 0.5).save(folder / "float.tif")
    (folder / "none.png").write_bytes(b"")
    (folder / "text.png").write_text("a cat")
    (folder / "notes.md").write_text("ignored")

    scan = scan_of(tmp_path)

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


def paths_of(scan: Scan, parent: Path) -> dict[str, tuple[int, str]]:
    return {
        image.path.relative_to(parent).as_posix(): (image.repeats, image.caption) for image in scan.images
    }


def test_a_folder_of_images_is_used_itself(tmp_path: Path) -> None:
    draw(tmp_path / "cats" / "a.png")
    draw(tmp_path / "cats" / "more" / "b.png")
    draw(tmp_path / "3_dog" / "c.PNG")
    scan = scan_of(tmp_path / "cats", tmp_path / "3_dog")
    assert paths_of(scan, tmp_path) == {"cats/a.png": (1, ""), "3_dog/c.PNG": (3, "dog")}
    assert scan.below == (tmp_path / "cats" / "more" / "b.png",)
    assert scan.ignored_folders == (tmp_path / "cats" / "more",)


def test_images_beside_and_below_named_folders_are_counted(tmp_path: Path) -> None:
    for name in ("2_cat/a.png", "2_cat/deep/b.png", "other/c.jpg", "loose.webp", "0_off/d.png"):
        draw(tmp_path / name)
    scan = scan_of(tmp_path, sidecar="")
    assert paths_of(scan, tmp_path) == {"2_cat/a.png": (2, "cat")}
    assert scan.warnings()[1:3] == [
        "2 images in nested folders not used; data.recursive = true includes them: c.jpg, b.png",
        "1 image beside `N_name` folders not used; move them into one, or set data.recursive = true: "
        "loose.webp",
    ]


def test_recursive_includes_all_nested_folders(tmp_path: Path) -> None:
    for name in ("2_cat/a.png", "2_cat/deep/b.png", "x/y/c.jpg", "x/5_z/d.png", "loose.webp", "0_off/e.png"):
        draw(tmp_path / name)
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    scan = scan_of(tmp_path, recursive=True)
    assert paths_of(scan, tmp_path) == {
        "loose.webp": (1, ""),
        "2_cat/a.png": (2, "cat"),
        "2_cat/deep/b.png": (2, "cat"),
        "x/5_z/d.png": (5, "z"),
        "x/y/c.jpg": (1, ""),
    }
    assert scan.ignored_folders == (tmp_path / "0_off",)
    draw(tmp_path / "v" / "w" / "f.png")
    in_set = scan_of(recursive=True, sets=[{"path": tmp_path / "2_cat", "repeats": 7}])
    assert {repeats for repeats, _ in paths_of(in_set, tmp_path).values()} == {7}
    with pytest.raises(InputError, match=r"1 image in nested folders not used; data\.recursive"):
        scan_of(tmp_path / "v")


def test_too_many_repeats_are_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "99999999999_x" / "a.png")
    with pytest.raises(InputError, match="asks for 99,999,999,999 repeats: at most 10,000"):
        scan_of(tmp_path)


def test_files_that_cannot_be_read_here_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png", "b.jpg", "c.png", "c.webp"):
        draw(tmp_path / name)
    (tmp_path / "b.txt").write_text("both")
    (tmp_path / "z.jxl").write_bytes(b"x")
    (tmp_path / "y.HEIC").write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(formats, "_readable", lambda: {".png", ".jpg", ".webp", ".gif"})
    assert scan_of(tmp_path).warnings()[:5] == [
        '1 file skipped: reading HEIC needs pillow-heif; pip install "spectune[heif]": y.HEIC',
        "1 file skipped: the format is not read; convert to PNG or JPEG: z.jxl",
        "1 image skipped: gone.png cannot be read: No such file or directory",
        "1 image with several frames or pages, of which the first is used: film.gif",
        "2 images with the name of another image but for the suffix: they share one caption file and mask: "
        "b.jpg, b.png",
    ]


def test_each_usable_image_is_shown_once_and_upright(tmp_path: Path) -> None:
    seen: dict[str, tuple[str, tuple[int, int]]] = {}
    folder = tmp_path / "2_cat"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("L", (40, 24)).save(folder / "turned.jpg", exif=exif)
    (folder / "damaged.png").write_bytes(b"\x89PNG")
    scan = scan_training(
        DataSection(folders=(tmp_path,)),
        lambda path, image: seen.update({path.name: (image.mode, image.size)}),
    )
    assert seen == {"turned.jpg": ("RGB", (24, 40))}
    assert [path.name for path, _ in scan.skipped] == ["damaged.png"]


def test_long_and_multi_line_captions_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "1_x"
    texts = {
        "a": "tag1,\ntag2,\ntag3, tag4",
        "b": "\n\na real caption\n",
        "c": "a cat \u2028on a mat",
        "d": ", ".join(f"detail number {i}" for i in range(60)),
    }
    for name, text in texts.items():
        draw(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    scan = scan_of(tmp_path)

    captions = [image.caption for image in scan.images]
    assert captions == ["tag1,", "a real caption", "a cat \u2028on a mat", texts["d"]]
    assert scan.warnings() == [
        "2 captions with text beyond the first line: only the first line with text is used, set "
        'data.caption.lines to "all" or "random" to use all: a.txt, b.txt',
        "1 caption longer than 225 tokens, the rest is not used; longest: d.txt with 289 tokens",
    ]


def test_captions_that_cannot_be_read_are_one_error(tmp_path: Path) -> None:
    for name in ("1_x/a", "2_y/b"):
        draw(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(b"a\0b\0\0c")
    with pytest.raises(
        InputError, match=r"2 caption files cannot be read: .*a\.txt .*b\.txt contains"
    ) as caught:
        scan_of(tmp_path)
    assert "UTF-8" in (caught.value.hint or "")
