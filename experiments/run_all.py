"""Repeat one or all experiments and regenerate their page.

    python dev.py experiment                    run everything that has no result yet, then write the page
    python dev.py experiment near_full frames   run some of them
    python dev.py experiment --list             list the experiments and their progress
    python dev.py experiment --again near_full  delete the results of one and run it again

Every run writes a file to experiments/results/, so this program continues after an interruption. Each run is
a process with one thread. For a model of this size, this is faster than one process with several threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.lab import picture_folder
from experiments.registry import EXPERIMENTS, Experiment
from experiments.trial import RESULTS, Trial
from spectune.errors import InputError

HERE = Path(__file__).resolve().parent
MADE = {"own", "all_3d"}  # image sets that `prepare` of an experiment writes


def run_one(trial: Trial, work: Path) -> bool:
    """Run a trial in its own process with one thread; return whether it succeeded."""
    log = work / "logs" / f"{trial.experiment}-{trial.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # use the source of this checkout, not an installed package
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "src")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "experiments.one", trial.experiment, trial.key, str(work)]
    with log.open("w") as out:
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
    state = f"{time.monotonic() - started:.0f} s" if code == 0 else f"FAILED, see {log}"
    print(f"{trial.experiment}/{trial.key}: {state}", flush=True)
    return code == 0


def prepared(experiment: Experiment, work: Path) -> bool:
    """Write the files that an experiment needs; return False and print why if an input is missing."""
    if experiment.prepare is None or experiment.done:
        return True
    try:
        experiment.prepare(work)
    except InputError as error:
        print(f"{experiment.name}: not run: {error}; {error.hint}", flush=True)
        return False
    return True


def run_experiment(experiment: Experiment, work: Path, processes: int) -> bool:
    """Run the trials stage by stage, because a stage may use results of earlier ones."""
    succeeded = True
    for stage in experiment.stages:
        missing = [trial for trial in stage() if not trial.done]
        for pictures in sorted({trial.pictures for trial in missing} - MADE):
            picture_folder(pictures, work)  # unpack before the processes start
        with ThreadPoolExecutor(processes) as pool:
            succeeded &= all(list(pool.map(lambda trial: run_one(trial, work), missing)))
        if not succeeded:
            break
    return succeeded


def with_needed(chosen: Sequence[Experiment]) -> list[Experiment]:
    """Return the chosen experiments and those whose results they use, in the order of EXPERIMENTS."""
    names = {name for experiment in chosen for name in (*experiment.needs, experiment.name)}
    return [experiment for experiment in EXPERIMENTS.values() if experiment.name in names]


def state(experiment: Experiment) -> str:
    missing = [name for name in experiment.needs if not EXPERIMENTS[name].done]
    return f"{experiment.name:14} waits for {', '.join(missing)}" if missing else experiment.state()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true", help="delete existing results first")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for images, latents and logs"
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown experiment `{unknown[0]}`; expected one of {', '.join(EXPERIMENTS)}")
    chosen = [EXPERIMENTS[name] for name in args.names or EXPERIMENTS]
    if args.list:
        for experiment in chosen:
            print(state(experiment))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    succeeded = True
    if args.again:
        for experiment in chosen:
            shutil.rmtree(RESULTS / experiment.name, ignore_errors=True)
    for experiment in with_needed(chosen):
        if prepared(experiment, args.work):
            succeeded = succeeded and run_experiment(experiment, args.work, args.processes)
        else:
            succeeded = succeeded and experiment.name not in args.names
    if succeeded:
        from experiments import page

        page.write()
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
