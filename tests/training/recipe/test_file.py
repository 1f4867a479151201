"""Reading recipes as Windows and PowerShell write them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from spectune.errors import InputError
from spectune.training.recipe.file import load_recipe

TEXT = """\
[model]
base = 'base.safetensors'
rank = 4

[data]
folders = ["bilder/größe"]

[run]
name = "t"
output = "out"
steps = 3
"""
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8 with a byte order mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16 of PowerShell": codecs.BOM_UTF16_LE + TEXT.replace("\n", "\r\n").encode("utf-16-le"),
    "utf-16, big endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_same_recipe(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(ENCODINGS[encoding])
    recipe = load_recipe(path)
    assert recipe.data.folders == (tmp_path.resolve() / "bilder/größe",)
    assert recipe.run.steps == 3


def test_another_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(TEXT.encode("cp1252"))
    with pytest.raises(InputError, match=r"is not UTF-8 text: line 6 has the byte 0xf6") as caught:
        load_recipe(path)
    assert caught.value.hint == "save the recipe as UTF-8"


@pytest.mark.parametrize("written", [r'"C:\models\base.safetensors"', r'"D:\Users\x.safetensors"'])
def test_an_escape_that_is_an_error_has_a_hint(tmp_path: Path, written: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TEXT.replace("'base.safetensors'", written), encoding="utf-8")
    with pytest.raises(InputError, match="line 2") as caught:
        load_recipe(path)
    assert "in single quotes" in (caught.value.hint or "")


def test_an_escape_that_toml_accepts_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TEXT.replace("'base.safetensors'", r'"C:\new\tuned.safetensors"'), encoding="utf-8")
    with pytest.raises(InputError, match="contains a control character") as caught:
        load_recipe(path)
    assert "in single quotes" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["con", "NUL", "com1.v2", "lpt9", "style."])
def test_names_that_windows_reserves(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TEXT.replace('"t"', f'"{name}"'), encoding="utf-8")
    with pytest.raises(InputError, match="Windows reserves this name"):
        load_recipe(path)
