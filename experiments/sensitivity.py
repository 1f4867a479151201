"""2. Without tuning: rates over two decades, and ProdigyPlus, which estimates its rate. 3D style."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from experiments import figures, near_full
from experiments.experiment import (
    Experiment,
    Spread,
    finals,
    on_seeds,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.trial import Outcome, Trial, load

NAME = "sensitivity"
RATES = {  # two decades each, with the rates of near_full
    "plain": (5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "principal": (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 5e-3),
}
KEPT = 0.9  # a rate is good if it keeps this share of the gain of the best rate


def rates() -> list[Trial]:
    """Return trials with rates over two decades. Those of near_full are reused."""
    finished = {trial.key for trial in near_full.sweep()}
    trials: list[Trial] = []
    for frame, rates in RATES.items():
        for rate in rates:
            trial = near_full.framed(frame, 16, rate)
            reused = trial.key in finished
            trials.append(trial if reused else replace(trial, experiment=NAME, validate_every=120))
    return trials


def prodigy() -> list[Trial]:
    trials = [
        Trial(
            NAME,
            f"prodigy {frame}",
            None,
            validate_every=40,
            overrides={
                "model": {"frame": frame},
                "optimizer": {
                    "name": "prodigy_plus_schedule_free",
                    "learning_rate": None,
                    "warmup_steps": 0,
                },
            },
        )
        for frame in RATES
    ]
    return on_seeds(trials)


def own() -> list[Trial]:
    return [trial for trial in [*rates(), *prodigy()] if trial.experiment == NAME]


def points() -> dict[str, list[tuple[float, float]]]:
    """Return the pairs (rate, final loss) of each frame."""
    points: dict[str, list[tuple[float, float]]] = {frame: [] for frame in RATES}
    for trial in rates():
        assert trial.rate is not None
        points[trial.label.split()[0]].append((trial.rate, load(trial).final))
    return points


def width(points: list[tuple[float, float]], before: float) -> tuple[float, float]:
    """Return the lowest and the highest good rate, interpolated linearly in log(rate)."""
    points = sorted(points)
    lowest = min(loss for _, loss in points)
    most = before - KEPT * (before - lowest)
    best = next(at for at, (_, loss) in enumerate(points) if loss == lowest)
    return _crossing(points[best::-1], most), _crossing(points[best:], most)


def _crossing(points: list[tuple[float, float]], most: float) -> float:
    """Return the rate at which a loss rises from below to `most`; the last rate if it never does."""
    for (rate, loss), (other, higher) in pairwise(points):
        if higher > most:
            return rate * (other / rate) ** ((most - loss) / (higher - loss))
    return points[-1][0]


def page_values() -> dict[str, str]:
    names = {"plain": "LoRA r16", "principal": "principal r16"}
    curves = points()
    before = load(rates()[0]).before
    plot = figures.rates(
        "evidence_sensitivity.png",
        "3D style after 120 steps at constant rates, one seed",
        {names[frame]: rows for frame, rows in curves.items()},
    )
    automatic = finals(prodigy())
    tuned = finals(near_full.repeats())
    rows: list[list[str]] = []
    for frame, name in names.items():
        low, high = width(curves[frame], before)
        best = min(curves[frame], key=lambda point: point[1])
        rows.append(
            [
                name,
                f"{best[0]:g}",
                f"{low:.1e} to {high:.1e}",
                f"{high / low:.0f}",
                f"{spread(outcome.final for outcome in tuned[f'{frame} r16'])}",
                f"{spread(outcome.final for outcome in automatic[f'prodigy {frame}'])}",
            ]
        )
    every = sorted({rate for rates in RATES.values() for rate in rates})
    steps = steps_to(
        automatic["prodigy principal"], (outcome.final for outcome in automatic["prodigy plain"])
    )
    by_rate = [[f"{rate:g}", *(_at(dict(curves[frame]), rate) for frame in RATES)] for rate in every]
    return {
        "plot": plot,
        "ratio": steps_text(steps),
        "early": f"{_early(automatic['prodigy principal']):.4f}",
        "plain_early": f"{_early(automatic['prodigy plain']):.4f}",
        "kept": f"{100 * KEPT:.0f}",
        "table": table(["", "best rate", "good rates", "factor", "at the best rate", "ProdigyPlus"], rows),
        "rates": table(["rate", *names.values()], by_rate),
    }


def _early(outcomes: list[Outcome]) -> Spread:
    """Return the first loss after the start."""
    return spread(outcome.curve[1][1] for outcome in outcomes)


def _at(losses: dict[float, float], rate: float) -> str:
    return f"{losses[rate]:.4f}" if rate in losses else ""


SENSITIVITY = Experiment(NAME, (own,), page_values, needs=("near_full",))
