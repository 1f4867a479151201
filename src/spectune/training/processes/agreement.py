"""All processes of a run have the same input, or all of them stop with the same message.

An error on one process alone would leave the others waiting for it until the timeout, and a host with other
pictures, or without the saved state, would train something else without any error.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from spectune.errors import InputError, SpectuneError, Stopped
from spectune.training.processes.stopping import own_work

T = TypeVar("T")


def on_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Return on all processes what `make` returns on the main one; it is called there only.

    The result is sent to the other processes, which need not see the same files.

    Raises:
        SpectuneError: `make` raised it.
        Stopped: A signal arrived there meanwhile.
    """
    if accelerator.num_processes == 1:
        return make()
    sent: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            with own_work():
                sent[0] = make()
        except (SpectuneError, Stopped) as error:
            sent[1] = error
    broadcast_object_list(sent)
    result, failure = sent
    if failure is not None:
        raise _reported_by_main(accelerator, failure)
    return cast("T", result)


def on_all(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Return what `make` returns on this process, unless it raises an error on any process.

    `make` must not communicate.

    Raises:
        SpectuneError: `make` raised it on this process or on another one, which the message then names.
        Stopped: A signal arrived on any process, meanwhile or before.
    """
    if accelerator.num_processes == 1:
        return make()
    result: T | None = None
    failure: SpectuneError | Stopped | None = None
    try:
        with own_work():
            result = make()
    except (SpectuneError, Stopped) as error:
        failure = error
    gathered = gather_object([(process_name(accelerator), failure)])
    failures = cast("list[tuple[str, SpectuneError | Stopped | None]]", gathered)
    failed = [(name, error) for name, error in failures if error is not None]
    if not failed:
        return cast("T", result)
    name, error = failed[0]
    if len(failed) < len(failures):
        error.what = f"{name}: {error.what}"
        if isinstance(error, SpectuneError):
            error.args = (error.what,)
    raise _reported_by_main(accelerator, error)


def check_equal(accelerator: Accelerator, inputs: Callable[[], Mapping[str, Any]]) -> None:
    """Raise InputError on all processes if a value of `inputs` differs between them.

    Args:
        accelerator: The connection of all processes.
        inputs: Returns values by their names in the message, such as "the base".
    """
    if accelerator.num_processes == 1:
        return
    gathered = cast(
        "list[tuple[str, dict[str, Any]]]", gather_object([(process_name(accelerator), dict(inputs()))])
    )
    first_name, first = gathered[0]
    for key in first:
        others = [name for name, values in gathered if values[key] != first[key]]
        if others:
            error = InputError(
                f"{key} of {first_name} and of {', '.join(others)} differ: all processes must have the same",
                hint="copy the same files to all hosts, or use a folder that all of them share",
            )
            raise _reported_by_main(accelerator, error)


def without_paths(value: Any) -> Any:
    """Return nested values with paths replaced by their last names."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key: without_paths(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in cast("Sequence[Any]", value)]
    return value


def process_name(accelerator: Accelerator) -> str:
    """Return how messages name this process, such as `process 2 on node17`."""
    return f"process {accelerator.process_index} on {platform.node()}"


def _reported_by_main(accelerator: Accelerator, error: SpectuneError | Stopped) -> SpectuneError | Stopped:
    """Return the error; only the main process prints it."""
    error.is_reported = not accelerator.is_main_process
    return error
