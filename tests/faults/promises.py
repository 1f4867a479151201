"""What must be true after a fault."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import SpectuneError
from spectune.training.state import load_state
from tests.faults.children import SIGNALS, Ended, run
from tests.faults.jobs import SAVE_STEPS, STEPS, Job
from tests.faults.kinds import Scene
from tests.faults.place import Files, Place, files_of, visible

# Exit codes by kind of fault, beside 0 and 2: 130 is a command that was asked to stop.
_CODES = {
    "kill": {-signal.SIGKILL},
    "signal": {sign * (number + more) for number in SIGNALS for sign, more in ((1, 128), (-1, 0))},
}


@dataclass
class Result:
    """What a fault did."""

    problems: list[str] = field(default_factory=list[str])
    damaged_inputs: int = 0
    incomplete_files: int = 0
    failed_next_runs: int = 0
    lost_steps: int = 0
    was_hit: bool = False  # the command did not end as it does without a fault


def check_end(kind: str, runs: list[Ended], result: Result) -> None:
    """Check exit codes and messages."""
    for ended in runs:
        result.was_hit |= ended.code != 0
        if ended.code not in {0, 2} | _CODES.get(kind, set()) or (kind == "clock" and ended.code):
            result.problems.append(f"exit code {ended.code}: {ended.said[-400:]}")
        if "Traceback" in ended.said:
            result.problems.append(f"traceback: {ended.said[-1500:]}")
        elif ended.code == 2 and len(re.findall("^error: ", ended.said, flags=re.MULTILINE)) != 1:
            result.problems.append(f"not one error message: {ended.said[-400:]}")
    if kind == "two at once" and all(ended.code for ended in runs):
        result.problems.append(f"both runs failed: {runs[0].said[-300:]} | {runs[1].said[-300:]}")


def check_files(scene: Scene, runs: list[Ended], result: Result, *, expected: Files, old: Files) -> None:
    """Check that each visible output is complete: the new one, or the one from before the command."""
    found = visible(files_of(scene.place.out))
    incomplete = [name for name, value in found.items() if value not in (expected.get(name), old.get(name))]
    if scene.job.name == "train":
        incomplete = list(_broken_saves(scene.place.out))
    for folder in scene.job.whole:
        states = [
            {n: v for n, v in files.items() if n.startswith(folder)} for files in (found, expected, old)
        ]
        if states[0] and states[0] not in states[1:]:
            incomplete.append(f"{folder}/ is neither the new nor the old folder")
    indices = [name for name in found if name.endswith(".index.json") and found[name] == expected.get(name)]
    if indices and found != expected:
        incomplete.append(f"{indices[0]} without its shards")
    if runs[-1].code == 0 and len(runs) == 1 and scene.job.name != "train" and found != expected:
        result.problems.append(f"exit code 0, but {sorted(expected.items() ^ found.items())}")
    result.incomplete_files += len(incomplete)
    result.problems += [f"incomplete: {name}" for name in incomplete]


def _broken_saves(out: Path) -> Iterator[str]:
    """Yield the files and states of a training that cannot be read."""
    for path in sorted(out.glob("[!.]*")):
        try:
            if path.suffix == ".state":
                load_state(path)
            elif path.suffix == ".safetensors":
                open_checkpoint(path).close()
            elif path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()
        except (SpectuneError, OSError) as error:
            yield f"{path.name}: {error}"


def check_changed_input(scene: Scene, runs: list[Ended], result: Result, *, expected: Files) -> None:
    """Check that the output is that of the old input, that of the new one, or missing; never a mixture."""
    found = visible(files_of(scene.place.out))
    if runs[0].code:
        # A complete model whose card failed may stay.
        if not found.items() <= expected.items():
            result.incomplete_files += len(found)
            result.problems.append(f"exit code {runs[0].code}, but it wrote {sorted(found)}")
        return
    if found == expected:
        return
    shutil.rmtree(scene.place.out)
    scene.place.out.mkdir()
    run(scene.arguments, scene.place.root)
    if found != visible(files_of(scene.place.out)):
        result.incomplete_files += 1
        result.problems.append("exit code 0, but the output is a mixture of two versions of an input")


def check_inputs(place: Place, pristine: Files, result: Result) -> None:
    """Check that no input was changed."""
    found = files_of(place.inputs)
    result.damaged_inputs += len(found.items() ^ pristine.items())
    if found != pristine:
        result.problems.append(f"inputs changed: {sorted(found.items() ^ pristine.items())}")


def check_next_run(scene: Scene, runs: list[Ended], result: Result, *, expected: Files) -> None:
    """Run the command again, with --force if complete outputs are there, and compare its files."""
    place, job = scene.place, scene.job
    ended = run(job.arguments(place.inputs, place.out), place.root)
    if ended.code == 2 and "exists" in ended.said:
        ended = run(job.arguments(place.inputs, place.out, force=True), place.root)
    if ended.code != 0:
        result.failed_next_runs += 1
        result.problems.append(f"the next run ended with {ended.code}: {ended.said[-600:]}")
        return
    found = files_of(place.out)
    if job.name == "train":
        result.lost_steps = max(0, runs[0].last_step - ended.first_step)
        if result.lost_steps > SAVE_STEPS:
            result.problems.append(f"{result.lost_steps} steps were lost")
        found = {name: value for name, value in found.items() if is_final(name) or name.startswith(".")}
    if found != expected:
        result.failed_next_runs += 1
        result.problems.append(f"the next run wrote other files: {sorted(found.items() ^ expected.items())}")


def is_final(name: str) -> bool:
    """Return whether a file of a training belongs to its last step."""
    return name in ("t.safetensors", "t-loss.csv") or name.startswith(f"t-step{STEPS:08d}.state/")


def expected_files(job: Job, files: Files) -> dict[str, str]:
    """Return the files of a job that must be the same after every fault."""
    return {name: value for name, value in files.items() if job.name != "train" or is_final(name)}
