"""Run one trial: python -m experiments.one EXPERIMENT KEY WORK (called by run_all.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from experiments.lab import run_trial
from experiments.registry import EXPERIMENTS


def main() -> None:
    name, key, work = sys.argv[1:]
    torch.set_num_threads(1)
    experiment = EXPERIMENTS[name]
    trial = next(trial for trial in experiment.trials() if trial.key == key)
    (experiment.runner or run_trial)(trial, Path(work))


if __name__ == "__main__":
    main()
