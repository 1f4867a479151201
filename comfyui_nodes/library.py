"""Call the library from nodes: normal tensors, errors with hints, progress, interrupts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import torch

from spectune.errors import SpectuneError


def error_text(error: SpectuneError) -> str:
    """Return an error with its hint."""
    return error.what if error.hint is None else f"{error.what}\nhint: {error.hint}"


@contextmanager
def library() -> Iterator[None]:
    """Run library calls with gradients off; convert a SpectuneError to a RuntimeError with its hint.

    ComfyUI runs nodes in inference mode. Threads of the library cannot write to inference tensors.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except SpectuneError as error:
        raise RuntimeError(error_text(error)) from error


def log_warning(text: str) -> None:
    """Write a warning of an operation to the log of ComfyUI."""
    logging.warning("spectune: %s", text)


def progress_bar() -> Callable[[int, int, str], None]:
    """Return a callback that updates the progress bar of the running node and checks for interrupts."""
    bar = comfy.utils.ProgressBar(1)

    def step(done: int, total: int, name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return step
