"""5. From EPS to flow, plainly and with a teacher, a warm start, the bridge. Flat pictures, shift 2.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn

from experiments import figures
from experiments.experiment import Experiment, best_of_each, table
from experiments.flow_pictures import as_flow, captions_of, distance, draw_own, reference, strip
from experiments.lab import BASE, Recorder, by_recipe, picture_folder, recipe_of, run_trial
from experiments.trial import RESULTS, Outcome, Trial, load, save
from spectune.model.bridge import Bridge
from spectune.model.sdxl import Sdxl
from spectune.training.callbacks import Callbacks
from spectune.training.denoiser import Denoiser
from spectune.training.run import assemble
from spectune.training.validation import held_out_loss

NAME = "to_flow"
PLAIN_STEPS = 200
FAST_STEPS = 40  # a fifth
SHOWN = ("plain full", "plain LoRA r16", "plain principal r16", "warm", "teacher", "bridged + teacher")


def plain(label: str, rate: float, *, full: bool = False, **model: Any) -> Trial:
    """Conversion as the guide does it: the flow objective and nothing else."""
    return Trial(
        NAME,
        label,
        rate,
        method="full" if full else "recipe",
        pictures="flat",
        steps=PLAIN_STEPS,
        validate_every=20,
        overrides={"model": model, "objective": {"kind": "flow", "flow_shift": 2.5}},
    )


def fast(label: str, rate: float, objective: Mapping[str, Any], **model: Any) -> Trial:
    """A fifth of the steps, with what spectune adds."""
    return Trial(
        NAME,
        label,
        rate,
        pictures="flat",
        steps=FAST_STEPS,
        validate_every=5,
        overrides={"model": model, "objective": {"kind": "flow", "flow_shift": 2.5, **objective}},
    )


WARM = {"start": "warm"}
TEACHER = {"teacher": "eps"}
ALL = ("all",)


def plain_sweep() -> list[Trial]:
    return [
        *(plain("plain full", rate, full=True) for rate in (2e-4, 4e-4)),
        *(plain("plain LoRA r16", rate, frame="plain") for rate in (1e-3, 3e-3)),
        *(plain("plain principal r16", rate, frame="principal") for rate in (5e-4, 1e-3)),
    ]


def fast_sweep() -> list[Trial]:
    found: list[Trial] = []
    for rate in (1e-3, 3e-3):
        found += [
            fast("warm", rate, WARM, frame="plain", layers=ALL),
            fast("warm + teacher", rate, {**WARM, **TEACHER}, frame="plain", layers=ALL),
            fast("warm + teacher, gradient", rate, {**WARM, **TEACHER}, frame="gradient", layers=ALL),
            fast("teacher", rate, TEACHER, frame="plain", layers=ALL),
            fast("bridged + teacher", rate, {**TEACHER, "bridge_steps": 30}, frame="plain", layers=ALL),
        ]
    found += [fast("warm + teacher, principal", 1e-3, {**WARM, **TEACHER}, frame="principal", layers=ALL)]
    return found


def sweep() -> list[Trial]:
    return [reference_trial(), *plain_sweep(), *fast_sweep()]


def prepare(work: Path) -> None:
    """Pictures that the base draws itself, for training without any."""
    draw_own(BASE, picture_folder("flat", work), work / "own")


class Watcher(Recorder):
    """Draws with what has been trained so far, and measures how far that is from the EPS model's pictures."""

    def __init__(self, trial: Trial, work: Path) -> None:
        super().__init__()
        self.trial, self.work = trial, work
        self.captions = captions_of(picture_folder("flat", work) / "held_out")
        self.distances: list[tuple[int, float]] = []

    def on_preview(self, step: int, model: Sdxl) -> None:
        drawn = as_flow(model, self.captions)
        self.distances.append((step, distance(drawn, reference(BASE, self.captions, self.work))))
        if self.trial.seed == 1 and step in (FAST_STEPS, PLAIN_STEPS):
            folder = RESULTS / NAME / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            strip(model, drawn).save(folder / f"{self.trial.key}-{step}.png")

    def extra(self) -> dict[str, Any]:
        return {"picture_distance": self.distances}


class Bridged(nn.Module):
    """The EPS model read through the bridge, in place of the denoiser of a flow run."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.model = denoiser, denoiser.model

    def forward(self, noised: Tensor, timestep: Tensor, captions: Any, time_ids: Tensor) -> Tensor:
        reading = Bridge().at(timestep / 1000)
        output = self.denoiser(reading.feed(noised), reading.timestep, captions, time_ids)
        return reading.velocity(output, noised)


def reference_trial() -> Trial:
    """No training: the EPS model's own loss on the flow objective, through the bridge."""
    return plain("EPS model", 1e-3, frame="plain")


def measure_reference(trial: Trial, work: Path) -> Outcome:
    run = assemble(recipe_of(trial, work), Accelerator(), Callbacks(), None)
    settings = run.recipe.run
    loss = held_out_loss(
        cast("Any", Bridged(run.denoiser)),
        run.held_out,
        run.prediction,
        times=settings.validation_times,
        batch=settings.batch,
    )
    return Outcome(((0, loss),), 0)


def run(trial: Trial, work: Path) -> Outcome:
    """As any trial, with pictures drawn every FAST_STEPS steps."""
    if trial.key == reference_trial().key:
        save(trial, outcome := measure_reference(trial, work))
        return outcome
    if trial.method == "full":
        return run_trial(trial, work)
    more = {**trial.overrides, "run": {"preview_every_steps": FAST_STEPS}}
    outcome = by_recipe(trial, work, more, recorder=Watcher(trial, work))
    save(trial, outcome)
    return outcome


def found() -> dict[str, str]:
    chosen = best_of_each([*plain_sweep(), *fast_sweep()])
    outcomes = {label: load(trial) for label, trial in chosen.items()}
    eps = load(reference_trial()).final
    plot = figures.curves(
        "evidence_to_flow.png",
        "From EPS to flow, each way at its best rate, one seed",
        {label: [outcome] for label, outcome in outcomes.items() if label in SHOWN},
        level=("the EPS model through the bridge", eps),
        top=0.6,
        y_label="flow loss on held-out pictures",
    )
    rows = [
        [
            label,
            f"{chosen[label].rate:g}",
            f"{outcome.curve[0][1]:.3f}",
            f"{dict(outcome.curve)[FAST_STEPS]:.3f}",
            f"{outcome.final:.3f}" if chosen[label].steps == PLAIN_STEPS else "",
        ]
        for label, outcome in outcomes.items()
    ]
    header = ["way", "rate", "before", f"after {FAST_STEPS} steps", f"after {PLAIN_STEPS}"]
    teacher, plain_lora = outcomes["teacher"].final, outcomes["plain LoRA r16"].final
    return {
        "plot": plot,
        "table": table(header, rows),
        "eps": f"{eps:.3f}",
        "teacher": f"{teacher:.3f}",
        "plain": f"{plain_lora:.3f}",
        "principal": f"{outcomes['plain principal r16'].final:.3f}",
        "warm_before": f"{outcomes['warm'].before:.3f}",
        "raw_before": f"{outcomes['teacher'].before:.3f}",
        "missing": f"{100 * (teacher / plain_lora - 1):.0f}",
    }


TO_FLOW = Experiment(NAME, (sweep,), found, prepare=prepare, runner=run)
