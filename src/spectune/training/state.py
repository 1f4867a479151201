"""Saved states, as safetensors and JSON. A run resumes from them bit for bit.

A state is a folder `{name}-step{:08d}.state`:

    trained.safetensors     the trainable tensors in their training dtype
    optimizer.safetensors   the tensors of the optimizer's state
    frames.safetensors      the frames, if the run computed them: another machine would round differently
    extras.safetensors      moving average, learned weighting with its optimizer, replaced tensors, if any
    state.json              everything else: step, position in the data, recipe, structure of the optimizer,
                            and the SHA-256 of the files above and of itself

The states of random generators are not saved: every random choice is derived from the seed and the position.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.low_rank import LowRank
from spectune.errors import InputError, SpectuneError, counted
from spectune.files.rename import old_path, partial_path, rename
from spectune.files.text import load_json
from spectune.training.optim.kinds import OPTIMIZERS

FORMAT = 5  # 3: extras; 4: kinds of frames, conversions to flow; 5: checksums, changes of the recipe
TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
FRAMES, EXTRAS = "frames.safetensors", "extras.safetensors"
_CHECKSUM = "sha256"  # key of state.json: the hash of the rest of it
Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class StateHeader:
    """The identity and the position of a run, as state.json stores them."""

    step: Count  # finished optimizer steps
    steps: Count  # in total
    position: Count  # batches taken from the plan, by all processes
    recipe: Mapping[str, Any]
    base_hash: str | None
    frame_hash: str  # of the frames that the trained tensors belong to
    data_hash: str  # of the images, captions and sizes
    validation_before: float | None
    optimizer_package: str
    images: int | None = None  # number of images that are trained on
    batches_per_step: int | None = None  # on all processes
    changes: tuple[Mapping[str, Any], ...] = ()  # of the recipe, at each resume: step, key, before, after
    format: int = FORMAT


class DamagedState(InputError):
    """A file of a state is missing or is not the one that was saved. An older state may be complete."""


# ---------------------------------------------------------------- nested values as JSON and tensors


def flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return `value` as JSON data and add its tensors to `tensors`, under names that start with `name`.

    Inverse: unflatten.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {"$map": [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in items]}
    if isinstance(value, tuple):
        return {
            "$tuple": [
                flatten(item, tensors, f"{name}.{i}") for i, item in enumerate(cast("tuple[Any]", value))
            ]
        }
    if isinstance(value, list):
        return [flatten(item, tensors, f"{name}.{i}") for i, item in enumerate(cast("list[Any]", value))]
    assert value is None or isinstance(value, bool | int | float | str), (
        f"{name}: {type(value)} is not plain data"
    )
    return value


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested value that `flatten` converted to `value` and `tensors`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = cast("dict[str, Any]", value).items()
    if kind == "$tensor":
        return tensors[content].clone()
    if kind == "$tuple":
        return tuple(unflatten(item, tensors) for item in content)
    if kind != "$map":
        raise ValueError(f"`{kind}` is not a kind of value")
    return {key: unflatten(item, tensors) for key, item in content}


# ---------------------------------------------------------------- writing


def save_state(
    folder: Path,
    header: StateHeader,
    trained: Mapping[str, Tensor],
    optimizer: Optimizer,
    *,
    frames: Mapping[str, LowRank] | None = None,
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Write a state to a temporary folder, then rename it: a crash leaves no incomplete state.

    `extras` may hold plain data and tensors, such as state dictionaries.
    """
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        structure = flatten(optimizer.state_dict(), tensors, "optimizer")
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}, partial / TRAINED
        )
        save_file(tensors, partial / OPTIMIZER)
        if frames is not None:
            save_file(_frame_tensors(frames), partial / FRAMES)
        extra_tensors: dict[str, Tensor] = {}
        extra_structure = flatten(dict(extras or {}), extra_tensors, "extras")
        save_file(extra_tensors, partial / EXTRAS)
        document = {
            **asdict(header),
            "trained": list(trained),
            "optimizer": structure,
            "extras": extra_structure,
        }
        document["files"] = {file.name: _file_hash(file) for file in sorted(partial.iterdir())}
        document[_CHECKSUM] = _text_hash(json.dumps(document))
        (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        _replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise SpectuneError(
            f"cannot write {folder}: {_reason(error, folder)}",
            hint="make room on the disk and run the same command again: it resumes from the last state",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, folder: Path) -> None:
    """Rename a finished state. A state of this name is restored if the program is killed in between."""
    if not folder.exists():
        rename(partial, folder)
        return
    old = old_path(folder)
    shutil.rmtree(old, ignore_errors=True)
    rename(folder, old)
    rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception, folder: Path) -> str:
    """Return why a state was not saved. The error of the safetensors library has no number of the system."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{reason}; the disk has {shutil.disk_usage(folder.parent).free / 1e6:,.1f} MB free"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _frame_tensors(frames: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Return the tensors of frames by name. Inverse: _frames_of."""
    tensors: dict[str, Tensor] = {}
    for name, frame in frames.items():
        tensors[f"{name}.down"] = frame.down.detach().cpu().contiguous()
        tensors[f"{name}.up"] = frame.up.detach().cpu().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(frame.alpha, dtype=torch.float64)
    return tensors


def _frames_of(tensors: Mapping[str, Tensor], order: Iterable[str]) -> dict[str, LowRank]:
    return {
        name: LowRank(tensors[f"{name}.down"], tensors[f"{name}.up"], float(tensors[f"{name}.alpha"]))
        for name in order
    }


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class SavedState:
    """A state in memory."""

    folder: Path
    header: StateHeader
    trained: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]  # a torch optimizer's state_dict
    frames: Mapping[str, LowRank] | None = None  # by layer, if the run computed them
    extras: Mapping[str, Any] = field(default_factory=dict)

    def restore(self, trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Restore the trained tensors and the optimizer state, bit for bit.

        Raises:
            InputError: The run trains tensors of other names or shapes, or with another optimizer.
        """
        differing = sorted(
            name
            for name in trained.keys() | self.trained.keys()
            if name not in trained
            or name not in self.trained
            or trained[name].shape != self.trained[name].shape
        )
        if differing:
            count = counted(len(differing), "trained tensor")
            raise InputError(
                f"{self.folder.name} and this run differ in {count}, first {differing[0]}",
                hint=NEW_RUN_HINT,
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.trained[name])
        try:
            optimizer.load_state_dict(cast("dict[str, Any]", self.optimizer))
            _restore_dtypes(optimizer, self.optimizer["state"])
        except _WRONG_VALUES as error:
            raise InputError(
                f"the optimizer in {self.folder.name} is not that of this run: {error}", hint=NEW_RUN_HINT
            ) from error


# What torch and this module raise for data of another structure.
_WRONG_VALUES = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
NEW_RUN_HINT = "undo the change, or start a new run: set run.resume = false and another run.output"


def _restore_dtypes(optimizer: Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    # load_state_dict casts state to the dtype of its parameter, but Prodigy keeps some of its state in bf16
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, saved in state.items():
        current = optimizer.state[parameters[index]]
        for key, value in saved.items():
            if isinstance(value, Tensor):
                current[key] = value.to(current[key].device)
            else:
                current[key] = value


def _load(path: Path) -> dict[str, Tensor]:
    """Read tensors into memory. Mapped ones would keep the file open, and Windows could not delete it."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def load_state(folder: Path) -> SavedState:
    """Read a state.

    Raises:
        DamagedState: A file is missing, unreadable, or differs from its checksum.
        InputError: The format is not FORMAT, or state.json was edited.
    """
    document = _load_document(folder)
    try:
        for name, expected in document.pop("files").items():
            if _file_hash(folder / name) != expected:
                raise DamagedState(f"{folder} is damaged: {name} differs from its checksum")
        trained = _load(folder / TRAINED)
        tensors = _load(folder / OPTIMIZER)
        structure = unflatten(document.pop("optimizer"), tensors)
        extras = unflatten(document.pop("extras"), _load(folder / EXTRAS))
        order = document.pop("trained")
        layers = dict.fromkeys(name.rpartition(".")[0] for name in order)
        frames = _frames_of(_load(folder / FRAMES), layers) if (folder / FRAMES).exists() else None
        document["changes"] = tuple(document["changes"])
        return SavedState(
            folder,
            TypeAdapter(StateHeader).validate_python(asdict(StateHeader(**document))),
            {name: trained[name] for name in order},
            structure,
            frames,
            extras,
        )
    except (OSError, SafetensorError, *_WRONG_VALUES) as error:
        raise _damaged(folder, error) from error


def _load_document(folder: Path) -> dict[str, Any]:
    """Return the content of state.json without its checksum, which must be right."""
    try:
        document = load_json((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"{STATE} is not an object")
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    content = cast("dict[str, Any]", document)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{folder} has state format {content.get('format')!r}, but this version reads {FORMAT}",
            hint="continue the run with the version of spectune that saved it, or start a new run: "
            "set run.resume = false and another run.output",
        )
    expected = content.pop(_CHECKSUM, None)
    if _text_hash(json.dumps(content)) != expected:
        raise InputError(
            f"{folder / STATE} was changed after it was saved: it differs from its checksum",
            hint=f"undo the change, or remove the folder {folder.name}: "
            "the run then resumes from the previous state",
        )
    return content


def _damaged(folder: Path, error: Exception) -> DamagedState:
    return DamagedState(f"{folder} is not a complete training state: {error}")


def package_of(optimizer: str) -> str:
    """Return the name and version of an optimizer's package. A saved state may not fit another version."""
    distribution = OPTIMIZERS[optimizer].distribution
    if distribution == "torch":
        return distribution  # its state is stable across versions, and builds change often
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return distribution


def trained_tensors(deltas: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Return the trainable tensors by name, in the order of the optimizer."""
    return {
        f"{layer}.{kind}": tensor
        for layer, pair in deltas.items()
        for kind, tensor in zip(("down", "up"), pair, strict=True)
    }
