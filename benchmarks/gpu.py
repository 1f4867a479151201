"""Measure on one CUDA card, in at most 8 minutes, what a CPU can only count. Nothing is downloaded.

    python benchmarks/gpu.py                      a full-size SDXL with random weights, made on the card
    python benchmarks/gpu.py --tiny               the same stages with the embedded base, on any machine
    python benchmarks/gpu.py --only step,plan     stages whose names contain these words, and what they need

Stages run in the order of their importance, each in a process of its own. `--budget` ends the run: stages
that are left are listed as skipped. A stage that fails or runs out of memory is a row with its last lines.
Results are written to OUT/gpu.json after each row. The tables are printed last.

A machine without network needs Python, torch, and the other packages as wheels, about 60 MB. The first line
runs here. Then take the checkout with .gpu/ to the other machine, and run the other lines there:

    python benchmarks/gpu.py --pack .gpu/wheels --cuda 130
    python -m pip install --no-index --no-deps --target .gpu/site .gpu/wheels/*.whl
    PYTHONPATH=.gpu/site python benchmarks/gpu.py

`--cuda` is the CUDA version of the torch that is there; bitsandbytes needs it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

from benchmarks._gpu_pack import pack
from benchmarks._gpu_rows import Report, Row, emit_to
from benchmarks._gpu_settings import Settings
from benchmarks._gpu_stages import STAGES, Stage, chosen_stages, run_stage

OUT = Path(".gpu") / "results"
LEAST_S = 10.0  # a stage that has less time left is skipped


def run_all(stages: Sequence[Stage], settings: Settings, report: Report, budget_s: float) -> None:
    """Run each stage in a process of its own, until the time is over."""
    for stage in stages:
        left = budget_s - report.seconds
        if left < LEAST_S:
            report.add(Row(stage.table, stage.name, "skipped", note=f"the budget of {budget_s:g} s is over"))
            continue
        command = [sys.executable, __file__, "--stage", stage.name, "--work", str(settings.work)]
        run_stage(
            stage, [*command, *(["--tiny"] if settings.tiny else [])], min(left, stage.limit_s), report.add
        )


def run_here(stage: Stage, settings: Settings, add: Callable[[Row], None]) -> None:
    """Run a stage in this process."""
    module, _, function = stage.function.partition(":")
    emit = emit_to(stage.table, add)
    getattr(import_module(f"benchmarks.{module}"), function)(settings, emit, stage.argument)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder for gpu.json")
    parser.add_argument("--work", type=Path, help="folder for 25 GB of files, which are deleted at the end")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--only", default="", help="words of stages, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the stages and stop")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="download wheels and stop")
    parser.add_argument(
        "--cuda", default="130", help="with --pack: CUDA version of the other torch, as in 128"
    )
    parser.add_argument("--python", default="3.12", help="with --pack: Python version of the other machine")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.pack:
        pack(args.pack, cuda=args.cuda, python=args.python)
        return
    if args.stage:  # one stage, in the process that `run_all` started
        stage = next(stage for stage in STAGES if stage.name == args.stage)
        run_here(stage, Settings(args.work, args.tiny), lambda row: print(row.line(), flush=True))
        return
    stages = chosen_stages([word for word in args.only.split(",") if word])
    if args.list:
        print("\n".join(stage.name for stage in stages))
        return
    report = Report(args.out / "gpu.json", tiny=args.tiny, budget_s=args.budget)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.work, ignore_cleanup_errors=True) as work:
        run_all(stages, Settings(Path(work), args.tiny), report, args.budget)
    print(report.tables())


if __name__ == "__main__":
    main()
