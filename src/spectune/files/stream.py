"""Tensors on their way through a command: read and computed by several threads, written by one, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int, str], None]  # done, total, name of what is at hand

# Bytes of tensors, as they are stored, that may be on their way at once. What is computed from them takes up
# to five times as much.
IN_FLIGHT_BYTES = 1 << 27


def stream(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    consume: Callable[[Item, Result], None],
    *,
    size: Callable[[Item], int],
) -> None:
    """Call `work` on every item in threads and `consume` on the results in this one, in the items' order.

    There are as many threads as torch uses, and each computes with one: a matrix of SDXL is too small to be
    worth sharing, and reading, hashing and writing run beside it. `size` gives the bytes of an item; so many
    items are begun as fit into IN_FLIGHT_BYTES, at least one. The first exception stops everything and is
    raised.
    """
    threads = max(torch.get_num_threads(), 1)
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    in_flight = 0

    def finish_first() -> int:
        item, nbytes, future = waiting.popleft()
        consume(item, future.result())
        return nbytes

    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
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


def tell(progress: Progress | None, done: int, total: int, name: str) -> None:
    """Report progress to whoever listens."""
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
