"""One training run of an experiment: what it trains, and what it found, cached as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).resolve().parent / "results"

Method = Literal["recipe", "full"]  # "full": all weights of the UNet, which is no recipe of spectune


@dataclass(frozen=True)
class Trial:
    """A run of a recipe on one of the picture sets, or full fine-tuning with the same data and noise."""

    experiment: str
    label: str  # of the method, such as "principal r16"
    rate: float | None  # learning rate; None: the optimiser's own
    seed: int = 1
    method: Method = "recipe"
    pictures: Literal["flat", "three_d", "own"] = "three_d"  # own: drawn by the base itself
    steps: int = 120
    validate_every: int = 20
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # sections of the recipe
    keep: bool = False  # the adapters that it saves
    base: str = "base"  # a file that an earlier stage made, or the embedded base

    @property
    def key(self) -> str:
        """The name of its file: readable, and another one when anything about the trial is another."""
        rate = "own" if self.rate is None else f"{self.rate:g}"
        # only what is said, so that a new field leaves the names of old results as they are
        said = {
            it.name: getattr(self, it.name) for it in fields(self) if getattr(self, it.name) != it.default
        }
        told = json.dumps(said, sort_keys=True, default=str)
        short = hashlib.sha256(told.encode()).hexdigest()[:8]
        return f"{self.label.replace(' ', '_').replace('/', '-')}-{rate}-s{self.seed}-{short}"

    @property
    def file(self) -> Path:
        return RESULTS / self.experiment / f"{self.key}.json"

    @property
    def done(self) -> bool:
        return self.file.is_file()


@dataclass(frozen=True)
class Outcome:
    """What a trial found: the loss on held-out pictures after each number of steps."""

    curve: tuple[tuple[int, float], ...]  # (steps, loss)
    trained_numbers: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> float:
        return self.curve[0][1]

    @property
    def final(self) -> float:
        return self.curve[-1][1]

    def steps_until(self, loss: float) -> float | None:
        """Steps until the curve, straight between its points, first falls to `loss`; None if never."""
        (at, here), *rest = self.curve
        if here <= loss:
            return float(at)
        for step, value in rest:
            if value <= loss:
                return at + (step - at) * (here - loss) / (here - value)
            at, here = step, value
        return None


def save(trial: Trial, outcome: Outcome) -> None:
    trial.file.parent.mkdir(parents=True, exist_ok=True)
    partial = trial.file.with_suffix(".partial")
    told = {"trial": asdict(trial), "outcome": asdict(outcome)}
    partial.write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(trial.file)


def load(trial: Trial) -> Outcome:
    told = json.loads(trial.file.read_text(encoding="utf-8"))["outcome"]
    curve = tuple((int(step), float(loss)) for step, loss in told["curve"])
    return Outcome(curve=curve, trained_numbers=told["trained_numbers"], extra=told["extra"])
