from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectune.errors import InputError
from spectune.training.data.captions.sidecars import read_sidecar


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '\ufeff{"file_name": "a.png", "text": " caf\\u00e9, \u2028 red ", "width": 3}\n\n'
        '{"text": "", "file_name": "b.png"}\r\n',
        encoding="utf-8",
    )
    sidecar = read_sidecar(path)
    assert sidecar.captions == {"a.png": "café, \u2028 red", "b.png": ""}
    assert sidecar.find(tmp_path / "a.png") == "café, \u2028 red"
    assert sidecar.find(tmp_path / "a.jpg") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b.png", "text": "b"', r"metadata\.jsonl line 3 is not JSON"),
        ('["b.png", "b"]', r"metadata\.jsonl line 3 is not an object"),
        ('{"file_name": "b.png"}', r"metadata\.jsonl line 3 has no string `text`"),
        ('{"file_name": 7, "text": "b"}', r"metadata\.jsonl line 3 has no string `file_name`"),
        ('{"file_name": "a.png", "text": "b"}', r"metadata\.jsonl line 3 repeats a\.png"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "a"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_sidecar(path)


def test_metadata_of_sd_scripts(tmp_path: Path) -> None:
    path = tmp_path / "meta_lat.json"
    entries = {
        "a": {"caption": "a cat", "tags": "red", "train_resolution": [64, 64]},
        "D:\\data\\10_x\\b.png": {"tags": "blue"},
        "10_x/c": {"caption": "in x"},
        "10_y/c": {"caption": "in y"},
        "d": {"train_resolution": [64, 64]},
    }
    path.write_text(json.dumps(entries))
    own, shared = read_sidecar(path), read_sidecar(path, is_shared=True)

    assert own.find(tmp_path / "10_x" / "a.webp") == "a cat, red"
    assert own.find(tmp_path / "10_x" / "b.png") == "blue"
    assert [own.find(tmp_path / folder / "c.png") for folder in ("10_x", "10_y")] == ["in x", "in y"]
    assert own.find(tmp_path / "10_x" / "d.png") is None
    assert shared.find(tmp_path / "10_z" / "b.png") is None  # an image of another folder
    assert shared.find(tmp_path / "10_x" / "b.png") == "blue"

    path.write_text("[]")
    with pytest.raises(InputError, match=r"meta_lat\.json is not an object"):
        read_sidecar(path)
