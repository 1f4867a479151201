"""The pipeline of tensors: order, and how many items are computed at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from spectune.files.pipeline import run_pipeline


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_other_workers_go_on_while_some_wait_for_a_gpu() -> None:
    together = threading.Barrier(3)  # passes only when three items are computed at once
    seen: list[int] = []
    run_pipeline(
        range(6),
        lambda item: together.wait(timeout=10) * 0 + item,
        lambda item, result: seen.append(item + result),
        size=lambda _: 1,
        waiting_workers=2,
    )
    assert seen == [0, 2, 4, 6, 8, 10]


@pytest.mark.usefixtures("one_thread")
def test_one_thread_computes_one_item_at_a_time() -> None:
    running = most = 0

    def work(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.01)
        running -= 1
        return item

    run_pipeline(range(6), work, lambda item, result: None, size=lambda _: 1)
    assert most == 1
