"""What the folder of a run records about an adapter in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.files.provenance import parse_json

_STEP = re.compile(r"-step\d{8}$")
_LARGEST_STATE = 16_000_000  # bytes of JSON
_PREVIEWS = 3
_MEAN_OF = 100  # training losses


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run. None and empty values are unknown."""

    recipe: Mapping[str, Any]
    step: int | None = None
    images: int | None = None
    losses: tuple[tuple[str, float], ...] = ()
    previews: tuple[Path, ...] = ()  # the newest last


def run_facts(adapter: Path, base_hash: str | None) -> RunFacts:
    """Return the facts in the folder of `adapter`, if a state there is of the same run and the same base."""
    folder, name = adapter.parent, _STEP.sub("", adapter.stem)
    own = folder / f"{adapter.stem}.state" / "state.json"
    states = sorted(folder.glob(f"{escape(name)}-step*.state/state.json"))
    if not states:
        return RunFacts({})
    state = _read(own if own.is_file() else states[-1])
    recipe = _mapping(state.get("recipe"))
    if (
        base_hash is None
        or state.get("base_hash") != base_hash
        or _mapping(recipe.get("run")).get("name") != name
    ):
        return RunFacts({})
    match = _STEP.search(adapter.stem)
    step = int(match[0].removeprefix("-step")) if match else _integer(state.get("step"))
    pictures = sorted((folder / "previews").glob(f"{escape(name)}-step*.png"))
    previews = tuple(path for path in pictures if step is None or _step_of(path) <= step)
    return RunFacts(
        recipe=recipe,
        step=step,
        images=_integer(state.get("images")),
        losses=_losses(folder / f"{name}-loss.csv", step),
        previews=previews[-_PREVIEWS:],
    )


def _read(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > _LARGEST_STATE:
        return {}
    return _mapping(parse_json(path.read_text(encoding="utf-8", errors="replace")))


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _step_of(preview: Path) -> int:
    match = _STEP.search(preview.stem)
    return int(match[0].removeprefix("-step")) if match else 0


def _losses(table: Path, step: int | None) -> tuple[tuple[str, float], ...]:
    """Return the first and last validation loss, and the mean of the last training losses, up to a step."""
    from spectune.training.callbacks.loss_table import read_table  # its package loads diffusers

    try:
        rows = [row for row in read_table(table) if step is None or row.step <= step]
    except InputError:  # it is another file: the losses are unknown
        return ()
    validation = [row.validation_loss for row in rows if row.validation_loss is not None]
    trained = [row.loss for row in rows if row.loss is not None][-_MEAN_OF:]
    losses: list[tuple[str, float]] = []
    if validation:
        losses += [("validation loss, first", validation[0]), ("validation loss, last", validation[-1])]
    if trained:
        losses.append((f"training loss, mean of the last {len(trained)} values", sum(trained) / len(trained)))
    return tuple(losses)
