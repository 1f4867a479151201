"""Saved states, as safetensors and JSON. A run resumes from them bit for bit.

A state is a folder `{name}-step{:08d}.state`:

    trained.safetensors     the trainable tensors in their training dtype
    optimizer.safetensors   the tensors of the optimizer's state
    frames.safetensors      the frames, if the run computed them: another machine would round differently
    extras.safetensors      moving average, learned weighting with its optimizer, replaced tensors, if any
    state.json              everything else: step, position in the data, recipe, structure of the optimizer

The states of random generators are not saved: every random choice is derived from the seed and the position.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.low_rank import LowRank
from spectune.errors import InputError, counted
from spectune.files.rename import rename
from spectune.pairs.rules import short_hash
from spectune.training.optim.kinds import OPTIMIZERS

FORMAT = 4  # 2: a group for each part, frames; 3: extras; 4: kinds of frames, conversions to flow
TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"
FRAMES, EXTRAS = "frames.safetensors", "extras.safetensors"


@dataclass(frozen=True)
class StateHeader:
    """The identity and the position of a run, as state.json stores them."""

    step: int  # finished optimizer steps
    steps: int  # in total
    position: int  # batches taken from the plan, by all processes
    recipe: Mapping[str, Any]
    base_hash: str | None
    frame_hash: str  # of the frames that the trained tensors belong to
    data_hash: str  # of the images, captions and sizes
    validation_before: float | None
    optimizer_package: str
    format: int = FORMAT


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
    assert kind == "$map", kind
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
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
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
        (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
        for file in partial.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
            InputError: The run trains tensors of other names or shapes.
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
                hint=_NEW_RUN_HINT,
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.trained[name])
        optimizer.load_state_dict(cast("dict[str, Any]", self.optimizer))
        _restore_dtypes(optimizer, self.optimizer["state"])


_NEW_RUN_HINT = "undo the change, or start a new run: set run.resume = false and another run.output"


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
    """Read a state; raise InputError if a file is missing or damaged, or its format is not FORMAT."""
    try:
        document = cast("dict[str, Any]", json.loads((folder / STATE).read_text(encoding="utf-8")))
        if document.get("format") != FORMAT:
            raise InputError(
                f"{folder} has state format {document.get('format')}, but this version reads {FORMAT}",
                hint=_NEW_RUN_HINT,
            )
        trained = _load(folder / TRAINED)
        tensors = _load(folder / OPTIMIZER)
        structure = unflatten(document.pop("optimizer"), tensors)
        extras = unflatten(document.pop("extras"), _load(folder / EXTRAS))
        order = document.pop("trained")
        layers = dict.fromkeys(name.rpartition(".")[0] for name in order)
        frames = _frames_of(_load(folder / FRAMES), layers) if (folder / FRAMES).exists() else None
        return SavedState(
            folder,
            StateHeader(**document),
            {name: trained[name] for name in order},
            structure,
            frames,
            extras,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} is not a complete training state: {error}",
            hint="remove the folder: the run then resumes from the previous state",
        ) from error


def check_recipe(state: SavedState, recipe: Mapping[str, Any]) -> None:
    """Raise InputError if a key that must not change differs from the recipe of `state`."""
    _refuse(
        state,
        [
            f"{key} was {before!r} and is now {after!r}"
            for key, before, after in _differences(state.header.recipe, recipe)
            if key not in FREE
        ],
    )


def check_continues(state: SavedState, now: StateHeader) -> list[str]:
    """Return warnings about changes since `state` was saved.

    Raises:
        InputError: The base, the frames, the optimizer package or a recipe key that must not change differs.
    """
    check_recipe(state, now.recipe)
    saved = state.header
    changed: list[str] = []
    if saved.base_hash != now.base_hash:
        changed.append(f"base was {short_hash(saved.base_hash)} and is now {short_hash(now.base_hash)}")
    if saved.frame_hash != now.frame_hash:
        changed.append(f"frames were {saved.frame_hash[:12]} and are now {now.frame_hash[:12]}")
    if saved.optimizer_package != now.optimizer_package:
        changed.append(f"optimizer was {saved.optimizer_package} and is now {now.optimizer_package}")
    _refuse(state, changed)
    warnings: list[str] = []
    schedule = now.recipe.get("optimizer", {}).get("schedule", "constant")
    if saved.steps != now.steps and schedule != "constant":
        warnings.append(
            f"the run had {counted(saved.steps, 'step')} and now has {now.steps}: its {schedule} schedule "
            "covers the new length, so the learning rate jumps"
        )
    if saved.data_hash != now.data_hash:
        warnings.append(
            f"images or captions changed since {state.folder.name}: their order changes from here on"
        )
    return warnings


def _refuse(state: SavedState, changed: Sequence[str]) -> None:
    if changed:
        raise InputError(
            f"{state.folder.name} belongs to another run: {'; '.join(changed[:3])}", hint=_NEW_RUN_HINT
        )


# Recipe keys that may change when a run resumes.
FREE = frozenset(
    {
        "model.base",  # files may move: their hashes identify them
        "model.residual",
        "model.principal",
        "data.folders",
        "data.cache_folder",
        "data.workers",
        "data.validation_folder",
        "run.output",
        "run.steps",
        "run.epochs",
        "run.save_every_steps",
        "run.save_every_epochs",
        "run.save_every_minutes",
        "run.keep_last",
        "run.keep_last_adapters",
        "run.validate_every_steps",
        "run.validate_every_epochs",
        "run.validation_times",
        "run.preview",
        "run.preview_sampler",
        "run.preview_every_steps",
        "run.preview_every_epochs",
        "run.preview_at_start",
        "run.log_every_steps",
        "run.device",
        "run.gradient_checkpointing",
        "run.compile",
        "run.offload",
        "run.stream",
        "run.tensorboard",
        "run.trackers",
        "run.resume",
    }
)


Difference = tuple[str, Any, Any]  # key, before, after


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    differences: list[Difference] = []
    for key in sorted(was.keys() | now.keys()):
        before, after = was.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += _differences(
                cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", after), f"{prefix}{key}."
            )
        elif before != after:
            differences.append((prefix + key, before, after))
    return differences


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
