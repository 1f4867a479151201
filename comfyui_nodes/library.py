"""How nodes call the library: ordinary tensors, errors with their hints, progress, interrupts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch

from spectune.errors import SpectuneError


def told(error: SpectuneError) -> str:
    """An error and its hint as ComfyUI shows them."""
    return error.what if error.hint is None else f"{error.what}\nhint: {error.hint}"


@contextmanager
def library() -> Iterator[None]:
    """A stretch of library calls; raises RuntimeError with what and hint for any SpectuneError.

    ComfyUI runs nodes in inference mode, whose tensors the library's threads could not write to.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except SpectuneError as error:
        raise RuntimeError(told(error)) from error


def progress_bar() -> Callable[[int, int, str], None]:
    """The bar on the node that is running; each step is where ComfyUI's interrupt takes hold."""
    bar = comfy.utils.ProgressBar(1)

    def step(done: int, total: int, name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return step
