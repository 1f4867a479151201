"""5. From EPS to flow: plain, with a teacher, a warm start or the bridge. Flat images, shift 2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    rate_text,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.flow_pictures import as_flow, captions_of, distance, draw_own, reference, strip
from experiments.lab import (
    BASE,
    Recorder,
    picture_folder,
    recipe_of,
    train_full,
    train_recipe,
    validation_loss,
)
from experiments.trial import RESULTS, Outcome, Trial, load, save
from spectune.model.offload import StagedModel
from spectune.training.callbacks import Callbacks
from spectune.training.denoiser import Denoiser
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.setup import assemble

NAME = "to_flow"
PLAIN_STEPS = 200
FAST_STEPS = 40  # a fifth
LONGER_STEPS = 80
TARGET = "plain LoRA r16"  # its final loss is the target for a fifth of its steps
BEST = "warm + teacher"
BEST_LONGER = f"{BEST}, {LONGER_STEPS} steps"
SHOWN = ("plain full", TARGET, "plain principal r16", "plain, all layers", "raw", "teacher", "warm", BEST)
REPEATED = (
    *("plain full", TARGET, "plain principal r16", "plain, all layers"),
    *("raw", "teacher", "bridged + teacher", "warm", BEST, "no pictures", BEST_LONGER),
)  # methods with three seeds; the others have one
TEXT_LABELS = {  # names of values in the text, and their labels
    "full": "plain full",
    "all": "plain, all layers",
    "raw": "raw",
    "teacher": "teacher",
    "warm": "warm",
    "bridged": "bridged + teacher",
    "longer": BEST_LONGER,
}
REPEATED_FRAMES = ("principal", "minor")
SHEET = (TARGET, BEST, "no pictures")  # methods whose images the page shows
FAST_RATES = (3e-3, 6e-3)
LOWER, HIGHER = 1.5e-3, 1e-2  # more rates for methods whose best rate is at an edge of FAST_RATES


def plain(label: str, rate: float, *, full: bool = False, **model: Any) -> Trial:
    """Return a conversion as in the guide: the flow objective and nothing else."""
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
    """Return the trial with all layers, the plain frame, and a rate that decays with power 0.5."""
    model = {"frame": "plain", "layers": ("all",), **trial.overrides["model"]}
    schedule = {"schedule": "polynomial", "power": 0.5}
    return replace(trial, overrides={**trial.overrides, "model": model, "optimizer": schedule})


def fast(label: str, rate: float, objective: Mapping[str, Any], **model: Any) -> Trial:
    """Return a conversion in a fifth of the steps, with the options of spectune."""
    trial = decaying(plain(label, rate, **model))
    objective = {**trial.overrides["objective"], **objective}
    return replace(
        trial,
        steps=FAST_STEPS,
        validate_every=10,
        pictures="own" if label == "no pictures" else "flat",
        overrides={**trial.overrides, "objective": objective},
    )


WARM = {"start": "warm"}
TEACHER = {"teacher": "eps"}
BOTH = {**WARM, **TEACHER}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "raw": {},
    "teacher": TEACHER,
    "bridged + teacher": {**TEACHER, "bridge_steps": 30},
    "warm": WARM,
    BEST: BOTH,
    "no pictures": BOTH,  # no external images: the EPS model generates them from the captions
}


def plain_sweep() -> list[Trial]:
    return [
        *(plain("plain full", rate, full=True) for rate in (2e-4, 4e-4)),
        *(plain(TARGET, rate, frame="plain") for rate in (1e-3, 3e-3, 6e-3)),
        *(plain("plain principal r16", rate, frame="principal") for rate in (5e-4, 1e-3)),
        *(decaying(plain("plain, all layers", rate)) for rate in (LOWER, *FAST_RATES)),
    ]


def schedules() -> list[Trial]:
    """Return the best method with other learning rate schedules."""
    return [
        replace(trial, overrides={**trial.overrides, "optimizer": {"schedule": schedule}})
        for label, schedule in (("cosine", "cosine"), ("constant rate", "constant"))
        for trial in (fast(label, rate, BOTH) for rate in FAST_RATES)
    ]


def longer() -> list[Trial]:
    """Return two methods with twice as many steps."""
    return [
        replace(fast(f"{label}, {LONGER_STEPS} steps", 3e-3, METHODS[label]), steps=LONGER_STEPS)
        for label in ("warm", BEST)
    ]


def best_method() -> list[Trial]:
    return [fast(BEST, rate, BOTH) for rate in (*FAST_RATES, 4.5e-3, HIGHER)]


def fast_sweep() -> list[Trial]:
    return [
        *(fast(label, rate, objective) for label, objective in METHODS.items() for rate in FAST_RATES),
        *best_method()[len(FAST_RATES) :],
        *(fast(label, LOWER, METHODS[label]) for label in ("raw", "teacher", "warm", "no pictures")),
        fast("bridged + teacher", HIGHER, METHODS["bridged + teacher"]),
        *schedules(),
        *longer(),
    ]


def frames_sweep() -> list[Trial]:
    """Return the best method with other frames. Their directions have the length of the plain frame's."""
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
    """Generate images with the base, for training without external images."""
    draw_own(BASE, picture_folder("flat", work), work / "own")


class DistanceRecorder(Recorder):
    """A recorder that also measures the distance between generated images and those of the EPS model."""

    def __init__(self, trial: Trial, work: Path) -> None:
        super().__init__()
        self.trial, self.work = trial, work
        self.captions = captions_of(picture_folder("flat", work) / "held_out")
        self.distances: list[tuple[int, float]] = []

    def on_preview(self, step: int, model: StagedModel) -> None:
        latents = as_flow(model.sdxl, self.captions)
        self.distances.append((step, distance(latents, reference(BASE, self.captions, self.work))))
        if self.trial.seed == 1 and self.trial.label in SHEET and step in (FAST_STEPS, PLAIN_STEPS):
            save_strip(self.trial, step, strip(model.sdxl, latents))

    def extra(self) -> dict[str, Any]:
        return {"picture_distance": self.distances}


def strip_file(trial: Trial, step: int) -> Path:
    return RESULTS / trial.experiment / "pictures" / f"{trial.key}-{step}.png"


def save_strip(trial: Trial, step: int, image: Image.Image) -> None:
    file = strip_file(trial, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


class Bridged(nn.Module):
    """The EPS model behind the bridge, as the denoiser of a flow run."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.model = denoiser, denoiser.model

    def forward(self, noised: Tensor, timestep: Tensor, captions: Any, time_ids: Tensor) -> Tensor:
        bridge = Bridge().at(timestep / 1000)
        output = self.denoiser(bridge.network_input(noised), bridge.timestep, captions, time_ids)
        return bridge.velocity(output, noised)


def reference_trial() -> Trial:
    """Return the trial that only measures the flow loss of the EPS model through the bridge."""
    return plain("EPS model", 1e-3, frame="plain")


def measure_reference(trial: Trial, work: Path) -> Outcome:
    run = assemble(recipe_of(trial, work), Accelerator(), Callbacks())
    loss = validation_loss(run, Bridged(run.model.denoiser))
    captions = captions_of(picture_folder("flat", work) / "held_out")
    save_strip(trial, 0, strip(run.model.sdxl, reference(BASE, captions, work)))
    return Outcome(((0, loss),), 0)


def run(trial: Trial, work: Path) -> Outcome:
    """Run a trial that generates images every FAST_STEPS steps."""
    if trial.key == reference_trial().key:
        outcome = measure_reference(trial, work)
    elif trial.method == "full":
        outcome = train_full(trial, work, recorder=DistanceRecorder(trial, work))
    else:
        more = {**trial.overrides, "run": {"preview_every_steps": FAST_STEPS}}
        outcome = train_recipe(trial, work, more, recorder=DistanceRecorder(trial, work))
    save(trial, outcome)
    return outcome


def page_values() -> dict[str, str]:
    outcomes = finals(repeats())
    eps = load(reference_trial()).final
    plot = figures.curves(
        "evidence_to_flow.png",
        "From EPS to flow, each method at its best rate",
        {label: outcomes[label] for label in SHOWN},
        level=("the EPS model through the bridge", eps),
        top=0.5,
        y_label="flow validation loss",
    )
    aim, best = outcomes[TARGET], outcomes[BEST]
    steps = steps_to(best, (outcome.final for outcome in aim))
    return {
        "plot": plot,
        "sheet": sheet(),
        "table": table(["method", "rate", "steps", "before", *_headings()], rows(outcomes)),
        "eps": f"{eps:.3f}",
        "raw_before": f"{aim[0].before:.3f}",
        "warm_before": f"{spread(outcome.before for outcome in best):.3f}",
        "aim": f"{spread(outcome.final for outcome in aim):.3f}",
        "best": f"{spread(outcome.final for outcome in best):.3f}",
        "ratio": steps_text(steps, of=PLAIN_STEPS),
        "own": f"{spread(outcome.final for outcome in outcomes['no pictures']):.3f}",
        **{
            name: f"{spread(outcome.final for outcome in outcomes[label]):.3f}"
            for name, label in TEXT_LABELS.items()
        },
        **{f"{name}_distance": distance_text(outcomes[TEXT_LABELS[name]]) for name in ("all", "longer")},
        "longer_steps": str(LONGER_STEPS),
    }


def distance_text(outcomes: Sequence[Outcome]) -> str:
    """Return the distance of the final images."""
    return f"{spread(outcome.extra['picture_distance'][-1][1] for outcome in outcomes):.3f}"


def _headings() -> list[str]:
    return [f"after {FAST_STEPS}", "at the end", "image distance"]


def rows(outcomes: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Return a row for each method. The frames are in another table."""
    searched = [*plain_sweep(), *fast_sweep()]
    chosen = best_of_each(searched)
    table_rows: list[list[str]] = []
    for label, trial in chosen.items():
        seeds = outcomes.get(label, [load(trial)])
        early = spread(dict(outcome.curve)[FAST_STEPS] for outcome in seeds)
        late = spread(outcome.final for outcome in seeds)
        table_rows.append(
            [
                label,
                rate_text(trial, searched),
                str(trial.steps),
                f"{seeds[0].before:.3f}",
                f"{early:.3f}",
                f"{late:.3f}" if trial.steps > FAST_STEPS else "",
                distance_text(seeds),
            ]
        )
    return table_rows


def sheet() -> str:
    """Draw images of the EPS model and of the methods from the same noise; return the path of the figure."""
    chosen = best_of_each([*plain_sweep(), *fast_sweep()])
    strips = {"the EPS model, through the bridge": strip_file(reference_trial(), 0)}
    for label, step in (
        (TARGET, FAST_STEPS),
        (TARGET, PLAIN_STEPS),
        (BEST, FAST_STEPS),
        ("no pictures", FAST_STEPS),
    ):
        strips[f"{label}, {step} steps"] = strip_file(replace(chosen[label], seed=1), step)
    return figures.strips("evidence_to_flow_pictures.png", strips)


TO_FLOW = Experiment(NAME, (sweep, repeats), page_values, prepare=prepare, runner=run)
