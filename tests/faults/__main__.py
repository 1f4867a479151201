"""Injects faults into all commands that write, and checks what spectune promises about them.

python dev.py faults            340 faults
python dev.py faults 20         20 faults
python dev.py faults 20 --seed 3 --only train
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from random import Random

import torch

from tests.faults.children import Ended, run, warm_up
from tests.faults.jobs import JOBS, Job, make_inputs
from tests.faults.kinds import KINDS, Scene
from tests.faults.place import Files, Place, files_of, make_place, remove_place
from tests.faults.promises import (
    Result,
    check_changed_input,
    check_end,
    check_files,
    check_inputs,
    check_next_run,
    expected_files,
)

COUNT = 340
_NO_FORCE = ("inspect --plot", "train")


class Faults:
    """Injects faults into jobs in one place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.pristine = files_of(place.pristine)
        self._usual: dict[str, tuple[Ended, Files]] = {}

    def usual(self, job: Job) -> tuple[Ended, Files]:
        """Run a job without a fault; return how it ended, and its files."""
        if job.name not in self._usual:
            self.place.renew()
            warm_up(job.arguments(self.place.inputs, self.place.out))
            self.place.renew()
            ended = run(job.arguments(self.place.inputs, self.place.out), self.place.root)
            if ended.code != 0:
                raise SystemExit(f"error: {job.name} fails without a fault: {ended.said}")
            self._usual[job.name] = ended, files_of(self.place.out)
        return self._usual[job.name]

    def inject(self, kind: str, job: Job, chance: Random) -> Result:
        """Run a job with a fault, then without one, and return what was seen."""
        usual, files = self.usual(job)
        expected = expected_files(job, files)
        self.place.renew()
        force = kind != "changed input" and job.name not in _NO_FORCE and chance.random() < 0.3
        if force:
            for name in expected:
                (self.place.out / name).parent.mkdir(parents=True, exist_ok=True)
                (self.place.out / name).write_bytes(b"old")
        old = files_of(self.place.out)
        scene, result = Scene(job, self.place, chance, usual, force), Result()
        runs = KINDS[kind](scene)
        self.place.heal()
        check_end(kind, runs, result)
        if kind == "changed input":
            check_changed_input(scene, runs, result, expected=expected)
            self.place.restore_inputs()
        else:
            check_files(scene, runs, result, expected=expected, old=old)
            check_inputs(self.place, self.pristine, result)
        check_next_run(scene, runs, result, expected=expected)
        check_inputs(self.place, self.pristine, result)
        return result


def draw(number: int, chance: Random, jobs: list[Job], kinds: list[str]) -> tuple[str, Job]:
    """Return the kind and the job of a fault: all kinds in turn, and some faults more in trainings."""
    kind = kinds[number % len(kinds)]
    usable = [job for job in jobs if kind != "changed input" or (job.inputs and job.name != "train")]
    trainings = [job for job in usable if job.name == "train"]
    return kind, chance.choice(trainings if trainings and chance.random() < 0.15 else usable or jobs)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="stop earlier, after this time")
    parser.add_argument(
        "--only",
        action="append",
        choices=[job.name for job in JOBS],
        help="this command only; again for more",
    )
    parser.add_argument("--kind", choices=list(KINDS), help="faults of this kind only")
    args = parser.parse_args(words)
    if not hasattr(os, "fork"):
        print("error: faults needs processes that fork: run it on Linux or macOS", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    jobs = [job for job in JOBS if args.only is None or job.name in args.only]
    kinds = [kind for kind in KINDS if args.kind in (None, kind)]
    root = Path(tempfile.mkdtemp(prefix="spectune-faults-"))
    began = time.monotonic()
    place = make_place(root / "place", make_inputs)
    table: dict[tuple[str, str], list[Result]] = defaultdict(list)
    try:
        faults = Faults(place)
        for number in range(args.count):
            if time.monotonic() - began > 60 * args.minutes:
                break
            chance = Random(f"{args.seed} {number}")
            kind, job = draw(number, chance, jobs, kinds)
            print(f"{number + 1}/{args.count} {kind}, {job.name}", file=sys.stderr, flush=True)
            result = faults.inject(kind, job, chance)
            table[kind, job.name].append(result)
            for problem in result.problems:
                print(f"fault {number}: {kind}, {job.name}: {problem}", file=sys.stderr, flush=True)
    finally:
        place.heal()
        remove_place(place)
        root.rmdir()
    return report(table, time.monotonic() - began, args.seed)


_COLUMNS = ("faults", "hit", "damaged inputs", "incomplete files", "failed next runs", "most steps lost")


def report(table: dict[tuple[str, str], list[Result]], seconds: float, seed: int) -> int:
    """Print the counts by kind and by command; return 1 if a promise is broken."""
    everything = [result for results in table.values() for result in results]
    print(f"\n{'':22}" + "".join(f"{name:>18}" for name in _COLUMNS))
    for side in (0, 1):
        for name in dict.fromkeys(key[side] for key in sorted(table)):
            results = [result for key in table if key[side] == name for result in table[key]]
            print(f"{name:22}" + "".join(f"{value:>18}" for value in _numbers(results)))
        print()
    print(f"{'all':22}" + "".join(f"{value:>18}" for value in _numbers(everything)))
    broken = sum(bool(result.problems) for result in everything)
    print(f"\nseed {seed}, {seconds:.0f} s; {broken} of {len(everything)} faults broke a promise")
    return 1 if broken else 0


def _numbers(results: list[Result]) -> tuple[int, ...]:
    return (
        len(results),
        sum(result.was_hit for result in results),
        sum(result.damaged_inputs for result in results),
        sum(result.incomplete_files for result in results),
        sum(result.failed_next_runs for result in results),
        max((result.lost_steps for result in results), default=0),
    )


if __name__ == "__main__":
    sys.exit(main())
