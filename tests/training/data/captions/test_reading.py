from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.training.data.captions.findings import check_readable, finding_warnings
from spectune.training.data.captions.reading import FolderCaptions, read_captions
from spectune.training.recipe.sections.captions import CaptionSection


def read(folder: Path, *names: str, default: str = "none", **keys: Any) -> FolderCaptions:
    images = [folder / name for name in names]
    return read_captions(folder, images, CaptionSection(**keys), default=default, files=images)


def fixed(captions: FolderCaptions) -> list[str]:
    return [one.fixed for one in captions.captions]


def test_the_first_file_is_the_caption(tmp_path: Path) -> None:
    (tmp_path / "a.caption").write_text("other")
    assert fixed(read(tmp_path, "a.png")) == ["other"]
    (tmp_path / "a.txt").write_text(" a cat, sitting ")
    (tmp_path / "b.png.json").write_text('{"tags": ["red_hair"]}')
    (tmp_path / "c.txt").write_text("")
    captions = read(tmp_path, "a.png", "b.png", "c.png", "d.png", default="folder")
    assert fixed(captions) == ["a cat, sitting", "red hair", "", "folder"]
    assert [one.is_own for one in captions.captions] == [True, True, True, False]
    assert [one.is_empty for one in captions.captions] == [False, False, True, False]
    assert captions.findings == ()


def test_prefix_and_lines_apply_to_captions_from_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\none\ntwo")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "red\nround"}))
    names = ("a.png", "b.png", "c.png")
    assert fixed(read(tmp_path, *names, prefix="p", lines="all")) == ["p one, two", "p red, round", "p none"]
    drawn = read(tmp_path, *names, lines="random").captions
    assert [one.template for one in drawn] == ["one\ntwo", "red\nround", "none"]
    first = read(tmp_path, *names)
    assert fixed(first) == ["one", "red", "none"]
    assert finding_warnings(first.findings) == [
        "2 captions with text beyond the first line: only the first line with text is used, set "
        'data.caption.lines to "all" or "random" to use all: a.txt, b.png'
    ]


def test_all_unreadable_files_are_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("赤い猫が座っている".encode("shift-jis"))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.txt").write_bytes("café".encode("cp1252"))
    (tmp_path / "d.txt").write_bytes("cat".encode("utf-16"))
    (tmp_path / "e.json").write_text('{"nodes": []}')
    captions = read(tmp_path, *(f"{name}.png" for name in "abcde"))
    assert fixed(captions)[2:] == ["café", "cat", "none"]
    with pytest.raises(
        InputError, match=r"2 caption files cannot be read: .*a\.txt is .*b\.json is not JSON"
    ):
        check_readable(captions.findings)
    assert finding_warnings(captions.findings)[2:] == [
        "1 caption file read as cp1252: c.txt",
        "1 caption file read as UTF-16: d.txt",
        "1 JSON file without a caption, not used: e.json",
    ]


def test_what_is_cut_is_counted_and_the_longest_is_named(tmp_path: Path) -> None:
    for name, words in (("a", 75), ("b", 76), ("c", 200)):
        (tmp_path / f"{name}.txt").write_text("cat " * words)
    (tmp_path / "d.txt").write_text("cat\n" + "dog " * 151)
    names = ("a.png", "b.png", "c.png", "d.png")
    assert finding_warnings(read(tmp_path, *names, max_tokens=75, lines="random").findings) == [
        "3 captions longer than 75 tokens, the rest is not used; longest: c.txt with 200 tokens"
    ]
    assert read(tmp_path, *names, lines="random").findings == ()


def test_weights_and_wildcards_are_used_as_text_and_counted(tmp_path: Path) -> None:
    for name, text in (
        ("a", "a (red hat:1.2), (b:.5)"),
        ("b", "miku (vocaloid), (time 12:30), ((x))"),
        ("c", "{a|b} cat"),
        ("d", "{{a|b}} cat"),
    ):
        (tmp_path / f"{name}.txt").write_text(text)
    captions = read(tmp_path, *(f"{name}.png" for name in "abcd"))
    assert fixed(captions)[0] == "a (red hat:1.2), (b:.5)"
    assert finding_warnings(captions.findings) == [
        "1 caption with weights like (word:1.2), which are used as text: a.txt",
        "1 caption with wildcards like {a|b}, which are used as text unless data.caption.wildcards is on: "
        "c.txt",
    ]


def test_metadata_beside_several_folders(tmp_path: Path) -> None:
    (tmp_path / "1_x").mkdir()
    (tmp_path / "meta_cap.json").write_text(
        json.dumps({"1_x/a": {"caption": "x"}, "1_y/b": {"caption": "y"}})
    )
    captions = read(tmp_path / "1_x", "a.png", "b.png", sidecar="../meta_cap.json")
    assert fixed(captions) == ["x", "none"]
    assert captions.without_image == ()
    (tmp_path / "1_x" / "meta_cap.json").write_text(
        json.dumps({"a": {"caption": "x"}, "z": {"caption": "z"}})
    )
    assert read(tmp_path / "1_x", "a.png").without_image == ("z",)
