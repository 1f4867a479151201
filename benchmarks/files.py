"""Compare verify, rebuild and merge with a plain copy of the checkpoint, in seconds of wall, user and kernel.

    python dev.py bench files                       on the embedded base
    python dev.py bench files model.safetensors     on your own checkpoint, at rank 64

The script splits the checkpoint once. Then copy, verify, rebuild and merge run in turn, several times, each
in a new process and into new files. The times do not include the start of Python. A copy reads the model and
writes it with fsync, in one thread. Private memory is that of the whole process, without the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from split import EMBEDDED, Timing, default_rank, move, watched

from spectune.cli.allocators import set_allocators
from spectune.ops.merge import merge
from spectune.ops.options.values import Summand
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.ops.verify import verify
from spectune.pairs.strength import ModelWeights

MERGED = "merged.safetensors"
STAGES = ("copy", "verify", "rebuild", "merge")


@dataclass(frozen=True)
class Cost:
    """What one run of a stage costs."""

    seconds: float
    user: float  # seconds of all cores
    kernel: float  # seconds of all cores
    faults: int  # page faults that need no disk; 0 where the system does not count them
    peak_bytes: int  # private memory


def page_faults() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def cost_of(stage: Callable[[], object]) -> Cost:
    """Run a stage in this process."""
    timing, before, faults = Timing(), os.times(), page_faults()
    with watched(timing):
        stage()
    after = os.times()
    return Cost(
        seconds=timing.median,
        user=after.user - before.user,
        kernel=after.system - before.system,
        faults=page_faults() - faults,
        peak_bytes=timing.peak_bytes,
    )


def stage_named(name: str, model: Path, folder: Path, rank: int) -> Callable[[], object]:
    """Return a stage; `verify` and `rebuild` read the files of `split`, which are in `folder`."""
    principal = folder / f"{model.stem}.principal-r{rank}.safetensors"
    residual = folder / f"{model.stem}.residual.safetensors"
    return {
        "split": lambda: split(model, folder, rank=rank, svd="auto"),
        "copy": lambda: move(model, folder, [model.stat().st_size]),
        "verify": lambda: verify(model, residual, principal),
        "rebuild": lambda: rebuild(residual, principal, folder / "rebuilt.safetensors"),
        "merge": lambda: merge(
            (Summand(model, ModelWeights(0.5)), Summand(second_name(model, folder), ModelWeights(0.5))),
            folder / MERGED,
        ),
    }[name]


def second_name(model: Path, folder: Path) -> Path:
    """Return another name of the model; `merge` takes it for another file, which it reads too."""
    second = folder / "second.safetensors"
    if not second.exists():
        os.link(model, second)
    return second


def in_new_process(name: str, model: Path, folder: Path, rank: int) -> Cost:
    """Run a stage in a new process, when the disk has written everything."""
    if hasattr(os, "sync"):
        os.sync()
    words = [str(model), "--rank", str(rank), "--stage", name, "--in", str(folder)]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    for written in ("moved0", "rebuilt.safetensors", MERGED):
        (folder / written).unlink(missing_ok=True)
    return Cost(**json.loads(done.stdout))


def measure(model: Path, rank: int, runs: int) -> dict[str, list[Cost]]:
    """Return the costs of all runs by stage; `split` runs once."""
    inside = None if model == EMBEDDED else model.parent
    with tempfile.TemporaryDirectory(dir=inside) as name:
        folder = Path(name)
        costs = {"split": [in_new_process("split", model, folder, rank)]}
        for _ in range(runs):
            for stage in STAGES:
                costs.setdefault(stage, []).append(in_new_process(stage, model, folder, rank))
    return costs


def table(costs: dict[str, list[Cost]]) -> str:
    """Return the medians of each stage as a table, with the ratios to the copy of the same run."""
    lines = [
        "| stage | seconds | user | kernel | vs. copy | lowest to highest | page faults | private memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    copies = [cost.seconds for cost in costs["copy"]]
    for name, runs in costs.items():
        if len(runs) == len(copies):
            ratios = [cost.seconds / copied for cost, copied in zip(runs, copies, strict=True)]
        else:
            ratios = [cost.seconds / statistics.median(copies) for cost in runs]
        median = Cost(*(statistics.median(values) for values in zip(*map(_values, runs), strict=True)))
        lines.append(
            f"| {name} | {median.seconds:.1f} | {median.user:.1f} | {median.kernel:.1f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {median.faults:,.0f} | {max(cost.peak_bytes for cost in runs) / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _values(cost: Cost) -> tuple[float, ...]:
    return tuple(asdict(cost).values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--rank", type=int, help="default: 16 for the embedded base, 64 for others")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rank = args.rank or default_rank(args.model)
    if args.stage:
        set_allocators()  # as in the commands
        print(json.dumps(asdict(cost_of(stage_named(args.stage, args.model, args.folder, rank)))))
        return
    started = time.perf_counter()
    costs = measure(args.model, rank, args.runs)
    size, threads = args.model.stat().st_size / 1e9, torch.get_num_threads()
    seconds = time.perf_counter() - started
    print(f"{args.model.name}, {size:.2f} GB, rank {rank}, {threads} threads, {seconds:.0f} s in all")
    print(f"medians of {args.runs}, split once\n\n{table(costs)}")


if __name__ == "__main__":
    main()
