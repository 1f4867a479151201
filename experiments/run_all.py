"""Repeat the experiments, one or all, and make their page again.

    python dev.py experiment                    everything that has no result yet, then the page
    python dev.py experiment near_full frames   some of them
    python dev.py experiment --list             what there is, and how much of it is done
    python dev.py experiment --again near_full  forget the results of one and run it anew

Every run leaves a file in experiments/results/, so that a stopped repetition goes on where it was. Runs are
dealt out to processes of one thread, which is faster than one process of several for a model of this size.
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

HERE = Path(__file__).resolve().parent


def run_one(trial: Trial, work: Path) -> bool:
    """A trial in a process of its own, with one thread."""
    log = work / "logs" / f"{trial.experiment}-{trial.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    # this tree's own source, whatever is installed
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "src")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "experiments.one", trial.experiment, trial.key, str(work)]
    with log.open("w") as out:
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
    state = f"{time.monotonic() - began:.0f} s" if code == 0 else f"FAILED, see {log}"
    print(f"{trial.experiment}/{trial.key}: {state}", flush=True)
    return code == 0


def run_experiment(experiment: Experiment, work: Path, processes: int) -> bool:
    """Its trials stage by stage: a stage may depend on what the one before found."""
    if experiment.prepare is not None:
        experiment.prepare(work)
    good = True
    for stage in experiment.stages:
        missing = [trial for trial in stage() if not trial.done]
        for pictures in sorted({trial.pictures for trial in missing} - {"own"}):
            picture_folder(pictures, work)  # before the processes, which would unpack it at once
        with ThreadPoolExecutor(processes) as pool:
            good &= all(list(pool.map(lambda trial: run_one(trial, work), missing)))
        if not good:
            break
    return good


def with_needed(chosen: Sequence[Experiment]) -> list[Experiment]:
    """The chosen ones, and before them those whose results they take up."""
    names = {name for experiment in chosen for name in (*experiment.needs, experiment.name)}
    return [experiment for experiment in EXPERIMENTS.values() if experiment.name in names]


def state(experiment: Experiment) -> str:
    missing = [name for name in experiment.needs if not EXPERIMENTS[name].done]
    return f"{experiment.name:14} waits for {', '.join(missing)}" if missing else experiment.state()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--again", action="store_true", help="forget what is there first")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="unpacked pictures, latents, logs")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {unknown[0]}: expected {', '.join(EXPERIMENTS)}")
    chosen = [EXPERIMENTS[name] for name in args.names or EXPERIMENTS]
    if args.list:
        for experiment in chosen:
            print(state(experiment))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    good = True
    if args.again:
        for experiment in chosen:
            shutil.rmtree(RESULTS / experiment.name, ignore_errors=True)
    for experiment in with_needed(chosen):
        good = good and run_experiment(experiment, args.work, args.processes)
    if good:
        from experiments import page

        page.write()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
