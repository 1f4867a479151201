from __future__ import annotations

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files import writer as writer_module
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.source import TensorInfo
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import StreamWriter, refuse_inputs, write_tensors

TENSORS = {
    "byte": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "half": torch.arange(6, dtype=torch.float16).view(2, 3),
    "ids": torch.arange(5),
    "scalar": torch.tensor(4.605),
    "empty": torch.empty(0, 3),
    "brain": torch.tensor([1.5, -2.25]).bfloat16(),
}


def infos(tensors: dict[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, metadata={"key": "wert ü"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "wert ü"}
        assert set(file.keys()) == set(TENSORS)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_tensors_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % 64 == 0
    with open_checkpoint(path) as source:
        sizes = [info.dtype.itemsize for info in source.tensors.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_tensors_in_any_order_and_metadata_added_later(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with StreamWriter(path, infos(TENSORS), metadata={"early": "1"}) as writer:
        assert not path.exists()
        for name in reversed(list(TENSORS)):
            writer.write(name, TENSORS[name])
        writer.metadata["late"] = "2" * 10_000
    with open_checkpoint(path) as source:
        assert dict(source.metadata) == {"early": "1", "late": "2" * 10_000}
        assert all(torch.equal(source.load(name), tensor) for name, tensor in TENSORS.items())
        assert weights_hash(source) == writer.hash


def test_views_are_written_with_their_visible_values(tmp_path: Path) -> None:
    square = torch.arange(16.0).view(4, 4)
    write_tensors(tmp_path / "x.safetensors", {"t": square.T, "rows": square[1:3]})
    with open_checkpoint(tmp_path / "x.safetensors") as source:
        assert torch.equal(source.load("t"), square.T)
        assert torch.equal(source.load("rows"), square[1:3])


def test_the_hash_depends_on_tensors_and_not_on_files(tmp_path: Path) -> None:
    one = write_tensors(tmp_path / "1.safetensors", TENSORS, metadata={"a": "b"})
    assert one == write_tensors(tmp_path / "2.safetensors", dict(reversed(TENSORS.items())))
    changed = {**TENSORS, "scalar": torch.tensor(4.606)}
    assert one != write_tensors(tmp_path / "3.safetensors", changed)


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StreamWriter(tmp_path / "x.safetensors", infos(TENSORS)) as writer:
        writer.write("half", TENSORS["half"] * (1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_a_crash_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), StreamWriter(path, infos(TENSORS), force=True):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_tensor_that_was_not_written_fails_an_assertion(tmp_path: Path) -> None:
    with (
        pytest.raises(
            AssertionError, match=r"5 tensors of x\.safetensors were never written: brain, byte, empty"
        ),
        StreamWriter(tmp_path / "x.safetensors", infos(TENSORS)) as writer,
    ):
        writer.write("half", TENSORS["half"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3), torch.zeros(3, 2).half()])
def test_dtype_and_shape_must_match_the_announced_ones(tensor: Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=re.escape("half: expected torch.float16 (2, 3), got")),
        StreamWriter(tmp_path / "x.safetensors", infos(TENSORS)) as writer,
    ):
        writer.write("half", tensor)


def test_writing_a_tensor_twice_fails_an_assertion(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / "x.safetensors", infos({"half": TENSORS["half"]})) as writer:
        writer.write("half", TENSORS["half"])
        with pytest.raises(AssertionError, match="half is written twice"):
            writer.write("half", TENSORS["half"])


def test_metadata_larger_than_the_reserve_fails_an_assertion(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="metadata grew by more than the reserve"),
        StreamWriter(tmp_path / "x.safetensors", [], reserve_bytes=10) as writer,
    ):
        writer.metadata["a"] = "b" * 200
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(InputError, match=re.escape(f"{path} exists")) as caught:
        StreamWriter(path, infos(TENSORS))
    assert caught.value.hint == "pass `force` to overwrite it, or choose another `out`"
    assert path.read_bytes() == b"precious"
    write_tensors(path, TENSORS, force=True)
    with open_checkpoint(path) as source:
        assert len(source.tensors) == len(TENSORS)


def test_impossible_targets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        StreamWriter(tmp_path / "none" / "x.safetensors", [])
    with pytest.raises(InputError, match="is a folder: expected a file name"):
        StreamWriter(tmp_path, [], force=True)
    huge = [TensorInfo("x", torch.float32, (1 << 60,))]
    with pytest.raises(InputError, match=r"x.safetensors needs [\d.,]+ MB: .* has [\d.,]+ MB free"):
        StreamWriter(tmp_path / "x.safetensors", huge)
    assert list(tmp_path.iterdir()) == []


def test_hashes_of_model_databases(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"x": torch.randn(600, 1000), "y": torch.randn(3)}
    with StreamWriter(path, infos(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        whole, legacy = writer.payload_sha256(), writer.legacy_sha256()
        writer.metadata["sshs_model_hash"] = whole
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert whole == hashlib.sha256(data[start:]).hexdigest()
    assert legacy == hashlib.sha256(data[0x100000:0x110000]).hexdigest()


def test_the_chunks_of_the_hash_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_CHUNK_BYTES", 7)
    with StreamWriter(tmp_path / "x.safetensors", infos({"x": torch.ones(20)})) as writer:
        writer.write("x", torch.ones(20))
        assert writer.payload_sha256() == hashlib.sha256(torch.ones(20).numpy().tobytes()).hexdigest()


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and "\0" not in name),
        st.tuples(st.sampled_from(list(SAFETENSORS_NAMES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    )
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    written = write_tensors(path, tensors, force=True)
    with open_checkpoint(path) as source:
        assert source.tensors.keys() == tensors.keys()
        assert weights_hash(source) == written
        for name, tensor in tensors.items():
            assert source.load(name).dtype == tensor.dtype
            assert torch.equal(source.load(name).double(), tensor.double())


def test_a_finished_file_is_kept_if_it_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match=r"cannot rename the finished file to .*: Permission") as caught:
        write_tensors(tmp_path / "x.safetensors", TENSORS, force=True)
    (left,) = tmp_path.iterdir()
    assert caught.value.hint == f"rename {left} yourself; it is complete"
    left.rename(tmp_path / "y.safetensors")
    with open_checkpoint(tmp_path / "y.safetensors") as source:
        assert torch.equal(source.load("half"), TENSORS["half"])


def test_a_file_that_is_being_read_cannot_be_a_target(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    (tmp_path / "link.safetensors").hardlink_to(path)
    refuse_inputs(tmp_path / "new.safetensors", [path])
    for target in (path, tmp_path / "link.safetensors"):
        with pytest.raises(InputError, match="is one of the input files"):
            refuse_inputs(target, [path])


def test_metadata_that_is_not_unicode_can_be_read_again(tmp_path: Path) -> None:
    """A file name on Linux is bytes; the name of a base is metadata of what is made from it."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, metadata={"spectune.base_name": "caf\udce9.safetensors"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"spectune.base_name": "caf?.safetensors"}


def test_a_file_that_another_run_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    writer = StreamWriter(path, [TensorInfo("a", torch.float32, (2,))])
    writer.write("a", torch.ones(2))
    path.write_bytes(b"of another run")
    with pytest.raises(InputError, match=r"x.safetensors exists: another program wrote it while"):
        writer.__exit__(None, None, None)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"of another run"]


def test_a_full_disk_leaves_no_file_and_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the file writes its last bytes, which fails too."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.safetensors"
    writer = StreamWriter(path, [TensorInfo("a", torch.float32, (2,))])
    monkeypatch.setattr(writer, "_file", SimpleNamespace(write=full, seek=full, close=full))
    with pytest.raises(OSError, match=r"No space left on device: '.*x.safetensors'"), writer:
        writer.write("a", torch.ones(2))
    assert list(tmp_path.iterdir()) == []
