"""The stages of benchmarks/gpu.py in the order of their importance, and how one runs in its own process."""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks._gpu_rows import TAIL_CHARACTERS, Row, parse_line

# The names of benchmarks/_gpu_memory.py, which imports torch: a test compares them.
MEMORY_RUNS = (
    "plan, 6 GB",
    "streamed",
    "nf4",
    "plan, 8 GB",
    "int8",
    "bf16",
    "plan, 12 GB",
    "streamed nf4",
    "plan, 16 GB",
)


@dataclass(frozen=True)
class Stage:
    """A function (settings, emit, argument) of a module in benchmarks/, whose rows belong to one table."""

    name: str
    table: str
    function: str  # module:function
    argument: str = ""
    limit_s: float = 120
    needs: tuple[str, ...] = ("make", "split")


def _memory_run(name: str) -> Stage:
    return Stage(f"memory: {name}", "memory", "_gpu_memory:run_within", name, 60, ("make", "split", "plan"))


STAGES = (
    Stage("machine", "machine", "_gpu_machine:describe", limit_s=60, needs=()),
    Stage("make", "make", "_gpu_files:make", needs=()),
    Stage("split", "split", "_gpu_files:measure_split", "auto", needs=("make",)),
    Stage(
        "step 0",
        "step 0: the delta form and the UNet alone",
        "_gpu_steps:measure_step_0",
        limit_s=60,
        needs=(),
    ),
    Stage("step, checkpointing", "step", "_gpu_steps:measure_steps", "checkpointing", 150, needs=()),
    Stage("losses, cpu", "losses in float32", "_gpu_runs:measure_losses", "cpu", 60),
    Stage(
        "losses, cuda", "losses in float32", "_gpu_runs:measure_losses", "cuda", 60, ("make", "losses, cpu")
    ),
    Stage("train", "spectune train", "_gpu_runs:train_command", "start"),
    Stage("resume", "spectune train", "_gpu_runs:train_command", "resume", 60, ("make", "split", "train")),
    Stage("autocast bf16", "autocast", "_gpu_runs:train_with_autocast", "bf16", 60, ("make",)),
    Stage("autocast fp16", "autocast", "_gpu_runs:train_with_autocast", "fp16", 60, ("make",)),
    Stage("synchronizations", "synchronizations", "_gpu_runs:measure_synchronizations", "", 90, ("make",)),
    Stage("fp16", "fp16", "_gpu_runs:measure_fp16", limit_s=60, needs=("make",)),
    Stage("plan", "plan", "_gpu_memory:plan", needs=("make",)),
    *(_memory_run(name) for name in MEMORY_RUNS[:4]),
    Stage("sample", "spectune sample", "_gpu_runs:sample_command", limit_s=60, needs=("make",)),
    *(_memory_run(name) for name in MEMORY_RUNS[4:]),
    Stage("step, plain", "step", "_gpu_steps:measure_steps", "plain", 120, needs=()),
    Stage("split, cpu", "split", "_gpu_files:measure_split", "cpu", needs=("make",)),
)


def chosen_stages(words: Sequence[str]) -> list[Stage]:
    """Return the stages whose names contain a word, and the stages that these need; without words, all."""
    if not words:
        return list(STAGES)
    chosen = {stage.name for stage in STAGES if any(word in stage.name for word in words)}
    for stage in reversed(STAGES):  # what a stage needs comes before it
        if stage.name in chosen:
            chosen.update(stage.needs)
    return [stage for stage in STAGES if stage.name in chosen]


def run_stage(stage: Stage, command: Sequence[str], limit_s: float, add: Callable[[Row], None]) -> None:
    """Run a stage in a process and pass on its rows; a failure is a row with the last lines."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, stop)
    timer.start()
    tail: deque[str] = deque(maxlen=40)
    assert process.stdout is not None
    for line in process.stdout:
        row = parse_line(line)
        if row is None:
            tail.append(line)
        else:
            add(row)
    code = process.wait()
    timer.cancel()
    last = "".join(tail)[-TAIL_CHARACTERS:]
    if late.is_set():
        add(Row(stage.table, stage.name, "out of time", note=f"stopped after {limit_s:.0f} s\n{last}"))
    elif code != 0:
        add(Row(stage.table, stage.name, "failed", note=f"exit code {code}\n{last}"))
