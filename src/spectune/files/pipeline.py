"""Process tensors in a pipeline: several threads read and compute, one writes, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from spectune.core.linalg import recycled_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int, str], None]  # done, total, name of the current item

# Limit of the stored bytes of all items in flight. Intermediate results take up to five times as much.
IN_FLIGHT_BYTES = 1 << 27


def run_pipeline(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    consume: Callable[[Item, Result], None],
    *,
    size: Callable[[Item], int],
    waiting_workers: int = 0,
) -> None:
    """Call `work` on every item in worker threads, and `consume` on the results in this thread, in order.

    The number of workers is torch's number of threads, and torch uses one thread in each worker: SDXL's
    matrices are too small to share, and reading, hashing and writing run concurrently. `waiting_workers` come
    on top for work that waits for a GPU: while they wait, other workers read, subtract and hash, and the GPU
    always has the next matrix. `size` returns the bytes of an item. Items start while they fit into
    IN_FLIGHT_BYTES, but at least one. The first exception ends all work and is raised.
    """
    threads = max(torch.get_num_threads(), 1) + waiting_workers
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    in_flight = 0

    def finish_first() -> int:
        item, nbytes, future = waiting.popleft()
        consume(item, future.result())
        return nbytes

    with _one_thread_each(), recycled_memory(), ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                nbytes = size(item)
                while waiting and (in_flight + nbytes > IN_FLIGHT_BYTES or len(waiting) > 8 * threads):
                    in_flight -= finish_first()
                waiting.append((item, nbytes, pool.submit(work, item)))
                in_flight += nbytes
            while waiting:
                finish_first()
        except BaseException:
            for _, _, future in waiting:
                future.cancel()
            raise


def report_progress(progress: Progress | None, done: int, total: int, name: str) -> None:
    """Call `progress` unless it is None."""
    if progress is not None:
        progress(done, total, name)


@contextmanager
def _one_thread_each() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
