"""torch's out-of-memory errors, as errors that name what helps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch

from spectune.errors import SpectuneError, printable

# torch has a class for CUDA and ROCm only. These parts of messages are of a Mac, of the CPU, and of cuBLAS.
_MESSAGES = ("MPS backend out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CPU = "can't allocate memory"
CARD_REMEDIES = ("close other programs that use the card", "pass cpu as `device`")


@contextmanager
def explained_memory_errors(remedies: Callable[[], Sequence[str]]) -> Generator[None]:
    """Raise SpectuneError for an error of torch about too little memory.

    `remedies` is then called for what helps, in order of cost.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, remedies()) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not allocate memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _MESSAGES)


def out_of_memory(error: RuntimeError, remedies: Sequence[str]) -> SpectuneError:
    """Return the error for users. It has the first line of torch's message, which names the sizes."""
    where = "main memory is full" if _CPU in str(error) else "the GPU ran out of memory"
    lines = str(error).splitlines() or [type(error).__name__]
    return SpectuneError(
        f"{where}: {printable(lines[0], 400)}", hint=f"what helps, the cheapest first: {'; '.join(remedies)}"
    )
