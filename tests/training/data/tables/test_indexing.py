from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from spectune.errors import InputError
from spectune.training.data import facts
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.data.scan import Scan
from spectune.training.data.tables.images import ImageFolder, digest
from spectune.training.data.tables.index_file import INDEX_NAME
from spectune.training.data.tables.indexing import Indexed, update_index
from spectune.training.recipe.sections.data import DataSection
from tests.training.conftest import draw

SETTINGS: list[dict[str, Any]] = [
    {},
    {"caption": {"prefix": "p", "suffix": "s", "lines": "all"}},
    {"caption": {"lines": "random", "wildcards": True, "shuffle": True}},
    {"caption": {"sidecar": "", "extensions": (".caption", ".txt"), "max_tokens": 75}},
    {"caption": {"keep_tokens_separator": "|||"}, "mask": "alpha"},
    {"mask": "file"},
    {"mask": "file", "mask_suffix": "_m.png"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of many kinds, with captions of all kinds."""
    folder = tmp_path / "data" / "3_red cat"
    for index, name in enumerate(("a.png", "b.jpg", "b.png", "c.webp", "e.bmp", "f.png", "g.png", "h.png")):
        draw(folder / name, (30 + index, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 24)).save(folder / "turned.jpg", exif=exif)
    late = PngImagePlugin.PngInfo()
    late.add(b"eXIf", exif.tobytes()[6:], after_idat=True)
    Image.new("L", (40, 20)).save(folder / "turned.png", pnginfo=late)
    Image.new("RGBA", (40, 40)).save(folder / "clear.png")
    Image.new("RGB", (1, 40)).save(folder / "strip.png")
    Image.new("RGB", (30, 40)).save(folder / "a_m.png")
    Image.new("L", (15, 20)).save(folder / "a.mask.png")
    Image.new("L", (15, 20)).save(folder / "z.mask.png")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 255)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "y.jxl").write_bytes(b"")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    texts = {
        "a.txt": "first ||| {red|green}\nsecond (word:1.2)",
        "b.txt": "both " * 100,
        "c.webp.txt": "\n",
        "e.json": '{"tags": ["red_hair"]}',
        "f.json": '{"nodes": []}',
        "f.caption": "other",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "g.txt").write_bytes("caf\xe9".encode("cp1252"))
    rows = [{"file_name": name, "text": f"side {name}"} for name in ("h.png", "gone2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def scan_of(folder: Path, settings: dict[str, Any]) -> Scan:
    return scan_training(DataSection(folders=(folder.parent,), **settings))


def index_of(folder: Path, *, check: bool = False, settings: dict[str, Any] | None = None) -> Indexed:
    data = DataSection(folders=(folder.parent,), **settings or {})
    return update_index(ImageFolder(folder, 3, "red cat"), data, check=check)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_scan_with_an_index_is_the_scan_without(folder: Path, settings: dict[str, Any]) -> None:
    plain = scan_of(folder, settings)
    index_of(folder)
    for _ in range(2):  # the index is updated for other settings, then used
        indexed = scan_of(folder, settings)
        assert list(indexed.images) == list(plain.images)
        assert indexed.warnings() == plain.warnings()
        assert digest(indexed.images) == digest(plain.images)
    assert len(plain.images) >= 12
    assert not index_of(folder, settings=settings).changes.changed


def test_only_what_changed_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index_of(folder)
    assert len(first.changes.added) == 16
    assert not index_of(folder).changes.added
    read: list[str] = []
    header = facts.read_header
    monkeypatch.setattr(facts, "read_header", lambda path: read.append(path.name) or header(path))
    draw(folder / "new.png")
    draw(folder / "a.png", (99, 40))
    (folder / "c.webp.txt").write_text("a dog")
    (folder / "e.bmp").unlink()
    (folder / "e.json").unlink()
    changes = index_of(folder).changes
    assert sorted(read) == ["a.png", "gone.png", "new.png"]
    assert changes.added == ["new.png"]
    assert sorted(changes.changed) == ["a.png", "c.webp", "gone.png"]
    assert changes.removed == ["e.bmp"]
    images = {image.path.name: image for image in scan_of(folder, {}).images}
    assert images["a.png"].size.width == 99
    assert images["c.webp"].caption == "a dog"
    shutil.copy(folder / "b.jpg", folder / "b.webp")
    (folder / INDEX_NAME).unlink()
    plain = scan_of(folder, {})
    index_of(folder)
    assert list(scan_of(folder, {}).images) == list(plain.images)


def test_a_changed_sidecar_is_read_again(folder: Path) -> None:
    index_of(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "h.png", "text": "new"}')
    images = {image.path.name: image.caption for image in scan_of(folder, {}).images}
    assert images["h.png"] == "new"


def test_damaged_pictures_are_found_by_a_check(folder: Path) -> None:
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[:-30])
    names = [image.path.name for image in scan_of(folder, {}).images]
    assert "b.jpg" not in names
    index_of(folder)
    assert "b.jpg" in [image.path.name for image in scan_of(folder, {}).images]
    checked = index_of(folder, check=True)
    assert "b.jpg" in list(checked.index.skipped)
    assert [image.path.name for image in scan_of(folder, {}).images] == names
    assert not index_of(folder, check=True).changes.changed


def test_captions_that_cannot_be_read_are_an_error_with_an_index(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"a\0b\0\0c")
    index_of(folder)
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 caption file cannot be read: .*a\.txt contains"):
            scan_of(folder, {})


def test_a_worker_maps_the_file_instead_of_a_copy(folder: Path) -> None:
    index_of(folder)
    images = scan_of(folder, {}).images
    sent = pickle.dumps(images)
    assert b"second" not in sent
    assert list(pickle.loads(sent)) == list(images)
    draw(folder / "new.png")
    index_of(folder)
    with pytest.raises(InputError, match="was replaced while it was in use"):
        pickle.loads(sent)


def test_a_damaged_index_is_an_error(folder: Path) -> None:
    index_of(folder)
    path = folder / INDEX_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="is cut short"):
        scan_of(folder, {})
    path.write_bytes(whole.replace(b"names.data", b"names.date"))
    with pytest.raises(InputError, match=r"is not an index of this version, or is damaged"):
        scan_of(folder, {})
    path.write_bytes(whole.replace(b"turned.jpg", b"/../up.jpg"))
    with pytest.raises(InputError, match="names a file outside of it"):
        list(scan_of(folder, {}).images)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_index_in_a_folder_without_write_access_is_used(folder: Path) -> None:
    index_of(folder)
    draw(folder / "new.png")
    folder.chmod(0o555)
    scan = scan_of(folder, {})
    folder.chmod(0o755)
    assert "new.png" in [image.path.name for image in scan.images]
    assert "1 index that cannot be updated" in scan.warnings()[-1]


def test_validation_folders_may_have_an_index(folder: Path) -> None:
    data = DataSection(folders=(folder,), validation_folder=folder.parent)
    plain = scan_validation(data)
    index_of(folder)
    indexed = scan_validation(data)
    assert plain is not None
    assert indexed is not None
    assert list(plain.images) == list(indexed.images)
