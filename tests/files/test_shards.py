from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.rename import partial_path
from spectune.files.shards import ShardedWriter, shared_out
from spectune.files.source import MemorySource, TensorInfo, WeightSource
from spectune.files.weights_hash import weights_hash
from tests.pipelines import infos_of, same_bits

TENSORS = {
    "a": torch.arange(50.0),
    "b": torch.arange(100, dtype=torch.float16),
    "c": torch.arange(77)[None],
    "d": torch.tensor(4.605),
    "e": torch.arange(300.0).bfloat16(),
}
SMALL = MemorySource(TENSORS, {"key": "value"}, "small")
INDEX = "m.safetensors.index.json"


def write(source: WeightSource, path: Path, **options: object) -> str:
    with ShardedWriter(path, infos_of(source), metadata=source.metadata, **options) as writer:  # type: ignore[arg-type]
        for name in reversed(list(source.tensors)):
            writer.write(name, source.load(name))
    return writer.hash


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard(n: int, count: int) -> str:
    return f"m-{n:05}-of-{count:05}.safetensors"


def test_shards_of_limited_size_with_the_usual_names(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    written = write(SMALL, index, max_shard_bytes=400)
    assert names(tmp_path) == [*(shard(n, 4) for n in range(1, 5)), INDEX]
    with open_checkpoint(index) as source:
        assert source.tensors.keys() == TENSORS.keys()
        assert all(same_bits(source.load(name), tensor) for name, tensor in TENSORS.items())
        assert dict(source.metadata) == {"key": "value"}
        assert weights_hash(source) == written == weights_hash(SMALL)
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": 200 + 200 + 616 + 4 + 600}
    assert content["weight_map"] == {
        "a": shard(1, 4), "b": shard(1, 4), "c": shard(2, 4), "d": shard(3, 4), "e": shard(4, 4),
    }  # fmt: skip
    with safe_open(tmp_path / shard(1, 4), "pt") as first:
        assert set(first.keys()) == {"a", "b"}
        assert first.metadata() == {"key": "value"}


def test_a_complete_model_round_trips(source: MemorySource, tmp_path: Path) -> None:
    index = tmp_path / INDEX
    written = write(source, index, max_shard_bytes=500_000)
    assert len(names(tmp_path)) > 5
    for path in (index, tmp_path):
        with open_checkpoint(path) as again:
            assert again.tensors.keys() == source.tensors.keys()
            assert all(same_bits(again.load(name), source.load(name)) for name in source.tensors)
            assert weights_hash(again) == written == weights_hash(source)
    changed = {name: tensor.clone() for name, tensor in source.values.items()}
    changed["model.diffusion_model.out.2.bias"] += 1
    assert weights_hash(MemorySource(changed, {})) != written


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_distribution_to_shards_keeps_order_and_limits(sizes: list[int], limit: int) -> None:
    infos = [TensorInfo(str(n), torch.uint8, (size,)) for n, size in enumerate(sizes)]
    shards = shared_out(infos, limit)
    assert [info for part in shards for info in part] == infos
    assert len(shards) == 1 or all(shards)
    assert all(len(part) == 1 or sum(info.nbytes for info in part) <= limit for part in shards)
    for left, right in pairwise(shards):
        assert sum(info.nbytes for info in left) + right[0].nbytes > limit  # none is cut too early


def test_metadata_added_later_is_written(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path / INDEX, infos_of(SMALL), max_shard_bytes=400) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.metadata["late"] = "1" * 5000
    with open_checkpoint(tmp_path / INDEX) as source:
        assert dict(source.metadata) == {"late": "1" * 5000}


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path / INDEX, infos_of(SMALL))
    writer.write("a", TENSORS["a"])
    assert not (tmp_path / INDEX).exists()
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_tensor_that_was_not_written_fails_an_assertion(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=rf"4 tensors of {INDEX} were never written: b, c, d \(1 more\)"),
        ShardedWriter(tmp_path / INDEX, infos_of(SMALL)) as writer,
    ):
        writer.write("a", TENSORS["a"])
    assert names(tmp_path) == []


def test_existing_shards_need_force(tmp_path: Path) -> None:
    write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    with pytest.raises(InputError, match=re.escape(f"{INDEX} exists")):
        write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    (tmp_path / INDEX).unlink()
    with pytest.raises(InputError, match=rf"4 shards exist in .*: {shard(1, 4)}, {shard(2, 4)}, ") as caught:
        write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    assert caught.value.hint == "pass `force` to overwrite them, or choose another `out`"
    write(SMALL, tmp_path / INDEX, max_shard_bytes=400, force=True)


def test_force_deletes_the_previous_shards(tmp_path: Path) -> None:
    write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    (tmp_path / "other.safetensors").write_text("precious")
    write(SMALL, tmp_path / INDEX, force=True)
    assert names(tmp_path) == [shard(1, 1), INDEX, "other.safetensors"]
    (tmp_path / INDEX).write_text("no index")
    write(SMALL, tmp_path / INDEX, force=True)
    with open_checkpoint(tmp_path / INDEX) as source:
        assert weights_hash(source) == weights_hash(SMALL)


def test_a_crash_keeps_the_previous_shards(tmp_path: Path) -> None:
    write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), ShardedWriter(tmp_path / INDEX, infos_of(SMALL), force=True):
        raise ZeroDivisionError
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_finished_shards_are_kept_if_they_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target.name == INDEX:
            raise PermissionError(13, "Permission denied", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(
        InputError, match=r"cannot rename the finished shards of .*: Permission denied"
    ) as caught:
        write(SMALL, tmp_path / INDEX)
    monkeypatch.undo()
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert caught.value.hint == f"move the files in {left} there yourself; they are complete"
    for path in left.iterdir():
        path.rename(tmp_path / path.name)
    with open_checkpoint(tmp_path / INDEX) as source:
        assert weights_hash(source) == weights_hash(SMALL)


def test_a_full_disk_is_detected_before_any_work(tmp_path: Path) -> None:
    huge = [TensorInfo("x", torch.float32, (1 << 60,))]
    with pytest.raises(InputError, match=r"needs [\d.,]+ MB: .* MB free"):
        ShardedWriter(tmp_path / INDEX, huge)
    assert names(tmp_path) == []


def test_shards_without_an_index_of_a_killed_run_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renames: list[Path] = []

    def killed(source: Path, target: Path) -> None:
        if len(renames) == 2:
            raise SystemExit  # not an OSError: nothing is renamed back, as after a kill
        source.replace(target)
        renames.append(target)

    with monkeypatch.context() as patch:
        patch.setattr("spectune.files.shards.rename", killed)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # the journal stays
        with pytest.raises(SystemExit):
            write(SMALL, tmp_path / INDEX, max_shard_bytes=400)
    assert set(renames) <= set(tmp_path.iterdir())
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    write(SMALL, tmp_path / INDEX, max_shard_bytes=2**20)
    assert names(tmp_path) == [shard(1, 1), INDEX]


def test_complete_shards_stay_although_a_journal_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SMALL, tmp_path / INDEX)
    journal = partial_path(tmp_path / INDEX, ".journal")
    journal.write_text(json.dumps([shard(1, 1)]))
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    with pytest.raises(InputError, match=r"1 shards exist|exists"):
        write(SMALL, tmp_path / INDEX)
    write(SMALL, tmp_path / INDEX, force=True)
    assert names(tmp_path) == [shard(1, 1), INDEX]
