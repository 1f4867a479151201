"""5. From EPS to flow, plainly and with a teacher, a warm start, the bridge. Flat pictures, shift 2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from experiments import figures
from experiments.experiment import (
    FRAMES,
    LENGTH,
    Experiment,
    best_of_each,
    finals,
    on_seeds,
    spread,
    steps_to,
    table,
    told_rate,
    told_steps,
)
from experiments.flow_pictures import as_flow, captions_of, distance, draw_own, reference, strip
from experiments.lab import BASE, Recorder, by_recipe, full, picture_folder, recipe_of
from experiments.trial import RESULTS, Outcome, Trial, load, save
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks
from spectune.training.denoiser import Denoiser
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.setup import assemble
from spectune.training.validation import held_out_loss

NAME = "to_flow"
PLAIN_STEPS = 200
FAST_STEPS = 40  # a fifth
LONGER_STEPS = 80
AIM = "plain LoRA r16"  # whose final loss is to be reached in a fifth of its steps
BEST = "warm + teacher"
BEST_LONGER = f"{BEST}, {LONGER_STEPS} steps"
SHOWN = ("plain full", AIM, "plain principal r16", "plain, all layers", "raw", "teacher", "warm", BEST)
REPEATED = (
    *("plain full", AIM, "plain principal r16", "plain, all layers"),
    *("raw", "teacher", "bridged + teacher", "warm", BEST, "no pictures", BEST_LONGER),
)  # three seeds; the courses of the rate stay with one
TOLD = {  # in the text
    "full": "plain full",
    "all": "plain, all layers",
    "raw": "raw",
    "teacher": "teacher",
    "warm": "warm",
    "bridged": "bridged + teacher",
    "longer": BEST_LONGER,
}
REPEATED_FRAMES = ("principal", "minor")
SHEET = (AIM, BEST, "no pictures")  # ways whose pictures the page shows
FAST_RATES = (3e-3, 6e-3)
LOWER, HIGHER = 1.5e-3, 1e-2  # where a way is best at an edge of these


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


def decaying(trial: Trial) -> Trial:
    """All layers, beside the plain frame, at a rate that falls as the root of the share of steps left."""
    model = {"frame": "plain", "layers": ("all",), **trial.overrides["model"]}
    course = {"schedule": "polynomial", "power": 0.5}
    return replace(trial, overrides={**trial.overrides, "model": model, "optimizer": course})


def fast(label: str, rate: float, objective: Mapping[str, Any], **model: Any) -> Trial:
    """A fifth of the steps, with what spectune adds."""
    trial = decaying(plain(label, rate, **model))
    told = {**trial.overrides["objective"], **objective}
    return replace(
        trial,
        steps=FAST_STEPS,
        validate_every=10,
        pictures="own" if label == "no pictures" else "flat",
        overrides={**trial.overrides, "objective": told},
    )


WARM = {"start": "warm"}
TEACHER = {"teacher": "eps"}
BOTH = {**WARM, **TEACHER}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "raw": {},
    "teacher": TEACHER,
    "bridged + teacher": {**TEACHER, "bridge_steps": 30},
    "warm": WARM,
    BEST: BOTH,
    "no pictures": BOTH,  # of other people: those that the EPS model draws of the captions
}


def plain_sweep() -> list[Trial]:
    return [
        *(plain("plain full", rate, full=True) for rate in (2e-4, 4e-4)),
        *(plain(AIM, rate, frame="plain") for rate in (1e-3, 3e-3, 6e-3)),
        *(plain("plain principal r16", rate, frame="principal") for rate in (5e-4, 1e-3)),
        *(decaying(plain("plain, all layers", rate)) for rate in (LOWER, *FAST_RATES)),
    ]


def schedules() -> list[Trial]:
    """The best way with other courses of the learning rate."""
    return [
        replace(trial, overrides={**trial.overrides, "optimizer": {"schedule": course}})
        for label, course in (("cosine", "cosine"), ("constant rate", "constant"))
        for trial in (fast(label, rate, BOTH) for rate in FAST_RATES)
    ]


def longer() -> list[Trial]:
    """Twice as many steps."""
    return [
        replace(fast(f"{label}, {LONGER_STEPS} steps", 3e-3, WAYS[label]), steps=LONGER_STEPS)
        for label in ("warm", BEST)
    ]


def best_way() -> list[Trial]:
    return [fast(BEST, rate, BOTH) for rate in (*FAST_RATES, 4.5e-3, HIGHER)]


def fast_sweep() -> list[Trial]:
    return [
        *(fast(label, rate, way) for label, way in WAYS.items() for rate in FAST_RATES),
        *best_way()[len(FAST_RATES) :],
        *(fast(label, LOWER, WAYS[label]) for label in ("raw", "teacher", "warm", "no pictures")),
        fast("bridged + teacher", HIGHER, WAYS["bridged + teacher"]),
        *schedules(),
        *longer(),
    ]


def frames_sweep() -> list[Trial]:
    """The best way beside other frames, every direction as long as those of the plain one."""
    return [
        fast(frame, rate, BOTH, frame=frame, frame_norm=LENGTH)
        for frame in FRAMES
        for rate in (1e-3, 3e-3, 6e-3 if frame == "minor" else 5e-4)
    ]


def sweep() -> list[Trial]:
    return [reference_trial(), *plain_sweep(), *fast_sweep(), *frames_sweep()]


def repeats() -> list[Trial]:
    chosen = best_of_each([*plain_sweep(), *fast_sweep()])
    frames = best_of_each(frames_sweep())
    return on_seeds([*(chosen[label] for label in REPEATED), *(frames[frame] for frame in REPEATED_FRAMES)])


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
        if self.trial.seed == 1 and self.trial.label in SHEET and step in (FAST_STEPS, PLAIN_STEPS):
            save_strip(self.trial, step, strip(model, drawn))

    def extra(self) -> dict[str, Any]:
        return {"picture_distance": self.distances}


def strip_file(trial: Trial, step: int) -> Path:
    return RESULTS / NAME / "pictures" / f"{trial.key}-{step}.png"


def save_strip(trial: Trial, step: int, drawn: Image.Image) -> None:
    file = strip_file(trial, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(file)


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
    captions = captions_of(picture_folder("flat", work) / "held_out")
    save_strip(trial, 0, strip(run.prepared.model, reference(BASE, captions, work)))
    return Outcome(((0, loss),), 0)


def run(trial: Trial, work: Path) -> Outcome:
    """As any trial, with pictures drawn every FAST_STEPS steps."""
    if trial.key == reference_trial().key:
        outcome = measure_reference(trial, work)
    elif trial.method == "full":
        outcome = full(trial, work, recorder=Watcher(trial, work))
    else:
        more = {**trial.overrides, "run": {"preview_every_steps": FAST_STEPS}}
        outcome = by_recipe(trial, work, more, recorder=Watcher(trial, work))
    save(trial, outcome)
    return outcome


def found() -> dict[str, str]:
    outcomes = finals(repeats())
    eps = load(reference_trial()).final
    plot = figures.curves(
        "evidence_to_flow.png",
        "From EPS to flow, each way at its best rate",
        {label: outcomes[label] for label in SHOWN},
        level=("the EPS model through the bridge", eps),
        top=0.5,
        y_label="flow loss on held-out pictures",
    )
    aim, best = outcomes[AIM], outcomes[BEST]
    steps = steps_to(best, (it.final for it in aim))
    return {
        "plot": plot,
        "sheet": sheet(),
        "table": table(["way", "rate", "steps", "before", *_headings()], rows(outcomes)),
        "eps": f"{eps:.3f}",
        "raw_before": f"{aim[0].before:.3f}",
        "warm_before": f"{spread(it.before for it in best):.3f}",
        "aim": f"{spread(it.final for it in aim):.3f}",
        "best": f"{spread(it.final for it in best):.3f}",
        "ratio": told_steps(steps, of=PLAIN_STEPS),
        "own": f"{spread(it.final for it in outcomes['no pictures']):.3f}",
        **{name: f"{spread(it.final for it in outcomes[label]):.3f}" for name, label in TOLD.items()},
        **{f"{name}_distance": told_distance(outcomes[TOLD[name]]) for name in ("all", "longer")},
        "longer_steps": str(LONGER_STEPS),
    }


def told_distance(outcomes: Sequence[Outcome]) -> str:
    """Of the pictures at the end."""
    return f"{spread(it.extra['picture_distance'][-1][1] for it in outcomes):.3f}"


def _headings() -> list[str]:
    return [f"after {FAST_STEPS}", "at the end", "pictures' distance"]


def rows(outcomes: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """A row for each way but the frames, which have a table of their own."""
    searched = [*plain_sweep(), *fast_sweep()]
    chosen = best_of_each(searched)
    found: list[list[str]] = []
    for label, trial in chosen.items():
        seeds = outcomes.get(label, [load(trial)])
        early = spread(dict(it.curve)[FAST_STEPS] for it in seeds)
        late = spread(it.final for it in seeds)
        found.append(
            [
                label,
                told_rate(trial, searched),
                str(trial.steps),
                f"{seeds[0].before:.3f}",
                f"{early:.3f}",
                f"{late:.3f}" if trial.steps > FAST_STEPS else "",
                told_distance(seeds),
            ]
        )
    return found


def sheet() -> str:
    """What the EPS model draws, and what the ways draw from the same noise."""
    chosen = best_of_each([*plain_sweep(), *fast_sweep()])
    strips = {"the EPS model, through the bridge": strip_file(reference_trial(), 0)}
    for label, step in (
        (AIM, FAST_STEPS),
        (AIM, PLAIN_STEPS),
        (BEST, FAST_STEPS),
        ("no pictures", FAST_STEPS),
    ):
        strips[f"{label}, {step} steps"] = strip_file(replace(chosen[label], seed=1), step)
    return figures.strips("evidence_to_flow_pictures.png", strips)


TO_FLOW = Experiment(NAME, (sweep, repeats), found, prepare=prepare, runner=run)
