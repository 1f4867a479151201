from __future__ import annotations

from pathlib import Path

import pytest

from spectune.checkpoints.diffusers_folder.writer import FolderWriter
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.errors import InputError
from spectune.files.shards import ShardedWriter
from spectune.files.source import MemorySource
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import StreamWriter
from tests.pipelines import infos_of

FORMS = {
    "x.safetensors": StreamWriter,
    "x.safetensors.index.json": ShardedWriter,
    "sdxl-1.0": FolderWriter,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_name_chooses_the_format_and_the_weights_are_equal(
    name: str, source: MemorySource, tiny_folder: Path, tmp_path: Path
) -> None:
    writer = open_writer(
        tmp_path / name,
        infos_of(source),
        metadata=source.metadata,
        template=tiny_folder,
        max_shard_bytes=1_000_000,
    )
    assert type(writer) is FORMS[name]
    with writer:
        for tensor in source.tensors:
            writer.write(tensor, source.load(tensor))
    assert writer.hash == weights_hash(source)
    with open_checkpoint(tmp_path / name) as again:
        assert weights_hash(again) == writer.hash
        assert source.metadata.items() <= again.metadata.items()


@pytest.mark.parametrize("name", ["x.ckpt", "x.PT", "x.bin", "x.json", "x.gguf"])
def test_names_of_other_kinds_of_files_are_refused(name: str, source: MemorySource, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_writer(tmp_path / name, infos_of(source))
    assert caught.value.what == (
        f"cannot write {name}: expected a name like x.safetensors, x.safetensors.index.json, "
        "or the name of a folder"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMS)
def test_force_and_hold_apply_to_every_format(name: str, source: MemorySource, tmp_path: Path) -> None:
    def write(*, force: bool = False, hold: bool = False) -> None:
        with open_writer(
            tmp_path / name, infos_of(source), metadata=source.metadata, force=force, hold=hold
        ) as writer:
            for tensor in source.tensors:
                writer.write(tensor, source.load(tensor))
        if hold:
            assert not (tmp_path / name).exists()
            writer.commit()

    write(hold=True)
    with pytest.raises(InputError, match="exists"):
        write()
    write(force=True)
    with open_checkpoint(tmp_path / name) as again:
        assert weights_hash(again) == weights_hash(source)
