"""12. Large data: all 1,812 other images of the 3D style. Does capacity separate the methods?"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

from experiments import figures, near_full
from experiments.experiment import Experiment, finals, spread, table
from experiments.lab import picture_folder
from experiments.pick_pictures import read, small
from experiments.trial import Trial
from spectune.errors import InputError

NAME = "large_data"
STEPS = 240
ARCHIVE = "fluent_3d.tar"  # of demo/pick_images.py, in the work folder
FULL_RATE = 2e-4
RATES: dict[str, tuple[dict[str, Any], float]] = {  # the best rates of `near_full` and `half_steps`
    "LoRA r16": ({"frame": "plain", "rank": 16}, 2e-3),
    "LoRA r4": ({"frame": "plain", "rank": 4}, 4e-3),
    "principal r16": ({"rank": 16}, 4e-4),
    "LoRA r64": ({"frame": "plain", "rank": 64}, 5e-4),
}


def trial(label: str, rate: float, **changes: Any) -> Trial:
    return Trial(NAME, label, rate, pictures="all_3d", steps=STEPS, validate_every=60, **changes)


def once() -> list[Trial]:
    tuned = [trial(label, rate, overrides={"model": model}) for label, (model, rate) in RATES.items()]
    return [trial("full", FULL_RATE, method="full"), *tuned]


def prepare(work: Path) -> None:
    """Write all images of the archive except those of the validation set, at 64 px."""
    target = work / "all_3d"
    if target.exists():
        return
    archive = work / ARCHIVE
    if not archive.is_file():
        raise InputError(
            f"{archive} is missing: it has all images of the 3D style", hint="see demo/README.md"
        )
    partial = work / "all_3d.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(picture_folder("three_d", work) / "held_out", partial / "held_out")
    (partial / "train").mkdir()
    held_out = {path.stem for path in (partial / "held_out").glob("*.webp")}
    with tarfile.open(archive) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith(".webp")):
            subject = Path(name).stem
            if subject not in held_out:
                (partial / "train" / f"{subject}.webp").write_bytes(small(read(tar, name)))
                caption = read(tar, name.removesuffix(".webp") + ".txt")
                (partial / "train" / f"{subject}.txt").write_bytes(caption)
    partial.rename(target)


def page_values() -> dict[str, str]:
    outcomes = finals(once())
    rows = [
        [
            label,
            f"{FULL_RATE if label == 'full' else RATES[label][1]:g}",
            f"{spread(outcome.final for outcome in found)}",
            f"{100 * near_full.share_of_gain(found, outcomes['full'])[0]:.1f} %",
        ]
        for label, found in outcomes.items()
    ]
    plot = figures.curves("evidence_large_data.png", "3D style, 1,812 images, one seed", outcomes, top=0.066)
    header = ["method", "rate", "validation loss", "share of full's gain"]
    return {"plot": plot, "table": table(header, rows), "steps": str(STEPS)}


LARGE_DATA = Experiment(NAME, (once,), page_values, prepare=prepare)
