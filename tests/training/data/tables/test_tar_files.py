from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from spectune.errors import InputError
from spectune.training.data.folders import scan_training
from spectune.training.data.images import open_image
from spectune.training.data.scan import Scan
from spectune.training.data.tables.images import ImageFolder
from spectune.training.data.tables.indexing import update_index
from spectune.training.data.tables.update import FileChanges
from spectune.training.recipe.sections.data import DataSection


def picture(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 1, 2)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    members = [
        ("a.jpg", picture((40, 30))),
        ("a.txt", b"a cat"),
        ("x/b.jpg", picture((30, 40))),
        ("x/b.json", b'{"caption": "a dog"}'),
        ("a.jpg", picture((9, 9))),
    ]
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return tmp_path


def scan_of(folder: Path) -> Scan:
    return scan_training(DataSection(folders=(folder,)))


def indexed(folder: Path) -> FileChanges:
    data = DataSection(folders=(folder,))
    return update_index(ImageFolder(folder, 1, "", caption_is_name=False), data).changes


def test_pictures_in_a_tar_file_are_read_by_their_place(folder: Path) -> None:
    with pytest.raises(InputError, match="1 tar file not used: `spectune dataset index FOLDER`"):
        scan_of(folder)
    assert len(indexed(folder).added) == 4
    for _ in range(2):
        scan = scan_of(folder)
        found = [(image.path.name, image.caption, open_image(image.path).size) for image in scan.images]
        assert found == [("a.jpg", "a cat", (40, 30)), ("b.jpg", "a dog", (30, 40))]
        assert scan.warnings() == [
            "2 images skipped: a.jpg repeats a name, c.jpg is a link or a special file",
        ]
        (folder / "other.txt").write_text("no picture")
    assert indexed(folder) == FileChanges()


def test_damaged_tar_files_are_counted(folder: Path) -> None:
    whole = (folder / "1.tar").read_bytes()
    (folder / "2.tar").write_bytes(whole[:700])
    (folder / "3.tar").write_bytes(b"\xff" * 3000)
    indexed(folder)
    scan = scan_of(folder)
    assert len(scan.images) == 2
    reasons = {path.as_posix().removeprefix(f"{folder.as_posix()}/"): why for path, why in scan.skipped}
    assert reasons["2.tar/a.jpg"] == "is cut short"
    assert reasons["3.tar"].startswith("is damaged: ")


def test_masks_in_tar_files_are_an_error(folder: Path) -> None:
    indexed(folder)
    with pytest.raises(InputError, match="has tar files, in which masks are not read"):
        scan_training(DataSection(folders=(folder,), mask="file"))
