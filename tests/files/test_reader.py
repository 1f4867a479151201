from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.source import MemorySource

TENSORS = {
    "a": torch.arange(6, dtype=torch.float16).view(2, 3),
    "b": torch.tensor([1.5, -2.25]).bfloat16(),
    "position_ids": torch.arange(77)[None],
    "scalar": torch.tensor(4.605),
    "empty": torch.empty(0, 3),
    "byte": torch.tensor([1, 2, 255], dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"key": "value"})
    return path


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def message(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return caught.value.what


def test_reads_files_of_the_safetensors_library(file: Path) -> None:
    with open_checkpoint(file) as source:
        assert source.tensors.keys() == TENSORS.keys()
        assert (source.label, source.path, dict(source.metadata)) == (
            "model.safetensors",
            file,
            {"key": "value"},
        )
        for name, tensor in TENSORS.items():
            loaded = source.load(name)
            assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(loaded, tensor)
            assert (source.tensors[name].dtype, source.tensors[name].shape) == (tensor.dtype, tensor.shape)


def test_tensors_outlive_the_file_and_do_not_change_it(file: Path) -> None:
    before = file.read_bytes()
    with open_checkpoint(file) as source:
        tensor = source.load("a")
    tensor += 1
    assert torch.equal(tensor, TENSORS["a"] + 1)
    assert file.read_bytes() == before


@pytest.mark.parametrize("dtype", SAFETENSORS_NAMES, ids=str)
def test_every_dtype_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as source:
        loaded = source.load("x")
    assert loaded.dtype == dtype
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_a_missing_file(tmp_path: Path) -> None:
    assert message(tmp_path / "none.safetensors") == f"no such file: {tmp_path / 'none.safetensors'}"


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".CKPT"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="never opens pickles") as caught:
        open_checkpoint(path)
    assert caught.value.hint is not None
    assert ".safetensors version" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1, -100])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    assert re.search(
        "not a safetensors file|is cut short: expected [0-9]+ bytes according to its header, got",
        message(file),
    )


def test_trailing_bytes_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    assert "is too long: expected" in message(file)


@pytest.mark.parametrize(
    ("head", "guess"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"PK\3\4........", "a zip archive or a pickle"),
    ],
)
def test_files_of_other_kinds_are_recognized(head: bytes, guess: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(head)
    assert guess in message(path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"{", "the header of x.safetensors is invalid"),
        (b"\xff\xfe{}", "the header of x.safetensors is invalid"),
        ([1], "it is not an object"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', "it contains a name twice"),
        ({"a": 1}, "has an invalid entry for tensor a"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "has an invalid entry for tensor a"),
        ({"a": entry(0, 4, [1], "F7")}, "the unsupported dtype F7"),
        ({"a": entry(0, 8, [1])}, "expected 4 bytes for F32 (1,), got 8"),
        ({"a": entry(0, 4, [-1])}, "expected -4 bytes"),
        ({"a": entry(4, 8, [1])}, "leaves a gap before a"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, "leaves a gap before b"),
        ({"__metadata__": {"a": 1}}, "not a table of strings"),
    ],
)
def test_damaged_headers_are_refused(header: object, expected: str, tmp_path: Path) -> None:
    assert expected in message(raw(tmp_path / "x.safetensors", header, bytes(8)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_of_the_header_is_an_input_error_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(save({"a": torch.zeros(2, 3), "b": torch.ones(4).half()}))
    start = data.draw(st.integers(0, 140))
    whole[start : start + 1] = data.draw(st.binary(max_size=2))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(whole))
    with suppress(InputError), open_checkpoint(path) as source:
        for name, info in source.tensors.items():
            assert tuple(source.load(name).shape) == info.shape


def test_a_file_that_shrinks_during_reading_is_an_error(file: Path) -> None:
    save_file({"x": torch.zeros(100_000)}, file)
    with open_checkpoint(file) as source:
        file.write_bytes(file.read_bytes()[:-700])
        expected = "model.safetensors ended inside tensor x: expected 400000 bytes, got 399300"
        with pytest.raises(InputError, match=re.escape(expected)):
            source.load("x")


def shards(folder: Path) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "m-1.safetensors", metadata={"x": "1"})
    save_file({"b": TENSORS["b"]}, folder / "m-2.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    return index


def test_shards_are_read(tmp_path: Path) -> None:
    index = shards(tmp_path)
    for path in (tmp_path, index):
        with open_checkpoint(path) as source:
            assert list(source.tensors) == ["a", "b"]
            assert dict(source.metadata) == {"x": "1"}
            assert all(torch.equal(source.load(name), TENSORS[name]) for name in "ab")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    assert message(index) == f"{index.name} lists 2 shards; 1 of them are not in its folder: m-2.safetensors"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "../m-1.safetensors"}}', "expected the name of a file in its folder"),
        ('{"weight_map": {"a": "m-2.safetensors"}}', "1 tensors are not in the shard that"),
    ],
)
def test_an_invalid_index_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    index = shards(tmp_path)
    index.write_text(text)
    assert expected in message(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "m-2.safetensors")
    assert message(index) == "1 tensors of m-2.safetensors are also in m-1.safetensors: a"


def test_ambiguous_and_incomplete_folders_are_refused(tmp_path: Path) -> None:
    assert "is a folder without a *.safetensors.index.json and without a model_index.json" in message(
        tmp_path
    )
    shards(tmp_path)
    (tmp_path / "n.safetensors.index.json").write_text("{}")
    assert "contains 2 sharded checkpoints" in message(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "has no unet/; its model_index.json declares no pipeline" in message(tmp_path)


def test_a_memory_source_returns_its_tensors() -> None:
    source = MemorySource(TENSORS, {})
    assert source.tensors["a"].shape == (2, 3)
    assert source.load("a") is TENSORS["a"]


def test_empty_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    """Markers such as `v_pred` have no bytes, so a header may list them before or after another tensor."""
    header = {"x": entry(0, 4, [1]), "v_pred": entry(0, 0, [0]), "end": entry(4, 4, [0])}
    with open_checkpoint(raw(tmp_path / "x.safetensors", header, b"\0" * 4)) as source:
        assert source.load("v_pred").shape == (0,)
        assert source.load("x").shape == (1,)


def test_a_dtype_that_is_not_a_string_is_refused(tmp_path: Path) -> None:
    header = {"x": {**entry(0, 4, [1]), "dtype": ["F32"]}}
    path = raw(tmp_path / "x.safetensors", header, b"\0" * 4)
    assert message(path) == "the header of x.safetensors has an invalid entry for tensor x"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"a":' * 5000, "the header of x.safetensors is invalid: it is nested too deeply"),
        (b'{"\\ud800": 1}', "is invalid: a text contains half of a surrogate pair"),
        ({"__metadata__": {"a": "\ud800"}}, "is invalid: a text contains half of a surrogate pair"),
        ({"a\0b": entry(0, 4, [1])}, "has an invalid entry for tensor a"),
        ({"a": entry(0, 0, [0, 10**30])}, "tensor a of x.safetensors has the impossible shape 0, 1000"),
        ({"a": entry(0, 0, [0, 2**62, 2**62])}, "impossible shape 0, 4611686018427387904"),
        ({"a": entry(0, 4, [1] * 17)}, "impossible shape 1, 1, 1, 1, 1, 1, 1, 1 (9 more)"),
        ({"a": entry(0, 4, [10**90] * 16)}, "impossible shape"),
        (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", "is invalid: a number has too many digits"),
        ({f"t{n}": 0 for n in range(30_001)}, "x.safetensors lists 30,001 tensors: expected at most"),
        (b"[" + b"0," * 300_001 + b"0]", "is invalid: it lists more than 30,000 tensors"),
    ],
)
def test_headers_that_would_crash_or_fill_the_memory_are_refused(
    header: object, expected: str, tmp_path: Path
) -> None:
    assert expected in message(raw(tmp_path / "x.safetensors", header, b"\0" * 4))


def test_sixteen_axes_and_large_empty_tensors_are_read(tmp_path: Path) -> None:
    header = {"a": entry(0, 4, [1] * 16), "b": entry(4, 4, [0, 2**30, 2**20])}
    with open_checkpoint(raw(tmp_path / "x.safetensors", header, b"\0" * 4)) as source:
        assert source.load("a").shape == (1,) * 16
        assert source.load("b").shape == (0, 2**30, 2**20)


@pytest.mark.parametrize("cut", [0, 1], ids=["overwritten", "cut"])
def test_a_file_that_changes_while_it_is_read_is_an_error(file: Path, cut: int) -> None:
    with open_checkpoint(file) as source:
        source.load("a")
        data = file.read_bytes()
        with file.open("rb+") as changed:
            changed.seek(-1, 2)
            changed.write(b"x")
            changed.truncate(len(data) - cut)
        os.utime(file, ns=(1, 1))  # a clock of low resolution may show no change
        with pytest.raises(InputError, match=r"^model.safetensors was changed by another program while"):
            source.load("a")
