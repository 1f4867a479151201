"""Errors about too little memory, of a card or of the machine, as errors that name what helps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from spectune.errors import SpectuneError, printable

# torch has a class for CUDA and ROCm only. These parts of messages are of a Mac and of cuBLAS.
_CARD_MESSAGES = ("MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Of torch on the CPU, of Python's threads, and of a library that does not fit.
_MAIN_MESSAGES = ("can't allocate memory", "can't start new thread", "failed to map segment")
_ERRORS = (RuntimeError, MemoryError, ImportError)
CARD_REMEDIES = ("close other programs that use the card", "pass cpu as `device`")
MAIN_REMEDIES = (
    "close other programs",
    "enlarge the page file (Windows) or the swap space (Linux)",
    "set the environment variable OMP_NUM_THREADS=1: fewer tensors are then in memory at once",
)


@contextmanager
def explained_memory_errors(remedies: Callable[[], Sequence[str]]) -> Generator[None]:
    """Raise SpectuneError for an error about too little memory.

    `remedies` is then called for what helps, in order of cost.
    """
    try:
        yield
    except _ERRORS as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, remedies()) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the card or of the machine was too small."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, _ERRORS) and any(part in text for part in _CARD_MESSAGES + _MAIN_MESSAGES)


def out_of_memory(error: BaseException, remedies: Sequence[str] = CARD_REMEDIES) -> SpectuneError:
    """Return the error for users. It has the first line of the original message, which may name sizes."""
    where = "the GPU ran out of memory"
    if isinstance(error, MemoryError) or any(part in str(error) for part in _MAIN_MESSAGES):
        where = "main memory is full"
        remedies = (*MAIN_REMEDIES, *(remedy for remedy in remedies if remedy not in CARD_REMEDIES))
    lines = str(error).splitlines() or ["no more could be allocated"]
    return SpectuneError(
        f"{where}: {printable(lines[0], 400)}", hint=f"what helps, the cheapest first: {'; '.join(remedies)}"
    )
