"""New tensors take the memory of dead tensors, and never that of living ones."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectune.core import linalg
from spectune.core.linalg import empty, new_copy, recycled_memory
from spectune.files.pipeline import run_pipeline
from spectune.files.reader import open_file
from spectune.files.writer import write_tensors

LARGE = (1 << 17,)  # elements


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of all blocks that torch allocates for `empty`, in bytes."""
    sizes: list[int] = []
    allocate = torch.empty

    def counted(*args: object, **kwargs: object) -> Tensor:
        made = allocate(*args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(linalg.torch, "empty", counted)
    return sizes


def test_a_dead_tensor_gives_its_memory_to_the_next_one(blocks: list[int]) -> None:
    with recycled_memory():
        addresses: set[int] = set()
        for dtype in (torch.float32, torch.float16, torch.float32, torch.float64):
            tensor = empty(LARGE, dtype)
            addresses.add(tensor.data_ptr())
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, LARGE)
            del tensor
    # float16 takes the block of float32, which is twice as large; only float64 needs a larger one
    assert len(addresses) == 2
    assert blocks == [LARGE[0] * 4, LARGE[0] * 8]


def test_a_view_keeps_the_memory_of_its_tensor() -> None:
    with recycled_memory():
        view = empty(LARGE, torch.float32).fill_(1)[5:9].view(2, 2)
        array = new_copy(torch.full(LARGE, 2.0), torch.float32).numpy()
        gc.collect()
        others = [empty(LARGE, torch.float32).fill_(3) for _ in range(4)]
        assert view.tolist() == [[1, 1], [1, 1]]
        assert array.min() == array.max() == 2
        assert len({other.data_ptr() for other in others}) == 4


def test_threads_never_share_memory() -> None:
    wrong: list[float] = []

    def work(value: float) -> None:
        for _ in range(200):
            tensor = empty(LARGE, torch.float32).fill_(value)
            if float(tensor.min()) != value or float(tensor.max()) != value:
                wrong.append(value)

    with recycled_memory():
        threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_free_memory_is_bounded_and_returned_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg._Recycler, "KEPT", 3 * LARGE[0] * 4)
    recycler = linalg._recycler
    with recycled_memory():
        tensors = [empty(LARGE, torch.float32) for _ in range(8)]
        tensors.clear()
        large = empty((LARGE[0] * 16,), torch.float32)  # nothing fits: the oldest free blocks go
        assert len(recycler._free) == 3
        outlives = empty(LARGE, torch.float32)
    assert recycler._free == []
    del outlives, large
    assert list(recycler._returned) == []
    assert empty(LARGE, torch.float32).numel() == LARGE[0]


def test_a_pipeline_reads_every_tensor_into_the_same_memory(tmp_path: Path, blocks: list[int]) -> None:
    tensors = {f"t{i:02}": torch.full(LARGE, i, dtype=torch.float16) for i in range(64)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    blocks.clear()
    seen: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with open_file(tmp_path / "x.safetensors") as file:
            run_pipeline(
                list(tensors),
                file.load,
                lambda name, tensor: seen.append(float(tensor.max())),
                size=lambda name: 1 << 27,  # one item at a time
            )
    finally:
        torch.set_num_threads(threads)
    assert seen == [float(i) for i in range(64)]
    assert len(blocks) <= 4
