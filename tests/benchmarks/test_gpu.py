"""The benchmark for a GPU runs on the CPU with a tiny model, and each failure is a row."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _gpu_memory, _gpu_pack, _gpu_runs, _gpu_settings, _gpu_steps, gpu, train
from benchmarks._gpu_rows import NeedsCuda, Report, Row, emit_to, guarded, parse_line
from benchmarks._gpu_settings import Settings
from benchmarks._gpu_stages import MEMORY_RUNS, STAGES, Stage, chosen_stages, run_stage
from spectune.training.callbacks import StepInfo
from spectune.training.memory.account import CONTEXT_BYTES


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    """Use the smallest model of the tests instead of the embedded base."""
    monkeypatch.setattr(_gpu_settings, "EMBEDDED", tiny_checkpoint)
    monkeypatch.setattr(train, "EMBEDDED", tiny_checkpoint)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def rows_of(stage_name: str, work: Path) -> dict[str, Row]:
    """Run a stage in this process and return its rows by name; of each name the last."""
    rows: list[Row] = []
    stage = next(stage for stage in STAGES if stage.name == stage_name)
    gpu.run_here(stage, Settings(work, tiny=True), rows.append)
    return {row.name: row for row in rows}


# ---------------------------------------------------------------- rows and processes


def test_a_failure_is_a_row_and_a_line_of_a_process_is_one_too(tmp_path: Path) -> None:
    def fails(error: Exception) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            raise error

        return measure

    report = Report(tmp_path / "gpu.json", tiny=True)
    emit = emit_to("steps", report.add)
    guarded(emit, "good", lambda: {"s/step": 0.12347, "batch": 4}, {"limit": 6})
    guarded(emit, "large", fails(torch.OutOfMemoryError("CUDA out of memory. Tried to")), {"limit": 6})
    caused = ValueError("the GPU ran out of memory")
    caused.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    guarded(emit, "caused", fails(caused))
    guarded(emit, "no package", fails(ModuleNotFoundError("No module named 'peft'")))
    guarded(emit, "no card", fails(NeedsCuda()))
    guarded(emit, "wrong", fails(ValueError("no such thing")))
    assert {row.name: row.status for row in report.rows} == {
        "good": "ok",
        "large": "out of memory",
        "caused": "out of memory",
        "no package": "not installed",
        "no card": "needs CUDA",
        "wrong": "failed",
    }
    assert report.rows[1].values == {"limit": 6}
    assert report.rows[-1].note.endswith("ValueError: no such thing\n")
    assert parse_line(report.rows[0].line()) == report.rows[0]
    assert parse_line("a warning") is None
    assert json.loads(report.path.read_text())["rows"][0]["values"]["s/step"] == 0.12347
    assert "| good | 6 | 0.1235 | 4 | ok |" in report.tables()
    assert "no package: No module named 'peft'" in report.tables()


@pytest.mark.parametrize(
    ("end", "limit_s", "status", "note"),
    [
        ("pass", 60, None, ""),
        ("raise SystemExit('no such card')", 60, "failed", "no such card"),
        ("import os; os._exit(9)", 60, "failed", "exit code 9"),
        ("import time; time.sleep(60)", 0.5, "out of time", "stopped after"),
    ],
)
def test_rows_of_a_process_stay_when_it_ends_early(
    end: str, limit_s: float, status: str | None, note: str
) -> None:
    line = Row("t", "first", values={"x": 1}).line()
    rows: list[Row] = []
    code = f"print({line!r}, flush=True); {end}"
    stage = Stage("s", "t", "module:function")
    run_stage(stage, [sys.executable, "-S", "-c", code], limit_s, rows.append)
    # a process that is stopped may not have printed its first row yet
    assert rows[:1] == [Row("t", "first", values={"x": 1})] or status == "out of time"
    last = rows[-1]
    assert (last.status, note in last.note) == (status or "ok", True)


def test_stages_after_the_budget_are_skipped(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json")
    gpu.run_all(STAGES[:2], Settings(tmp_path, tiny=True), report, budget_s=5)
    assert [(row.name, row.status) for row in report.rows] == [("machine", "skipped"), ("make", "skipped")]
    assert report.rows[0].note == "the budget of 5 s is over"


def test_the_script_writes_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, "--tiny", "--only", "machine", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert (content["tiny"], content["budget_s"]) == (True, 480)
    assert [row["table"] for row in content["rows"]] == ["machine"]
    assert content["rows"][0]["values"]["torch"] == torch.__version__
    assert "### machine" in done.stdout


def test_words_choose_stages_with_what_they_need() -> None:
    names = [stage.name for stage in chosen_stages(["int8", "resume"])]
    assert names == ["make", "split", "train", "resume", "plan", "memory: int8"]
    assert chosen_stages([]) == list(STAGES)


def test_every_stage_has_its_function_and_what_it_needs_comes_first() -> None:
    for index, stage in enumerate(STAGES):
        module, _, function = stage.function.partition(":")
        assert callable(getattr(import_module(f"benchmarks.{module}"), function))
        assert set(stage.needs) <= {earlier.name for earlier in STAGES[:index]}
    assert sorted(MEMORY_RUNS) == sorted(_gpu_memory.NAMES)


# ---------------------------------------------------------------- the stages, in this process


@pytest.mark.slow
def test_step_0_and_steps(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> _gpu_steps.Trained:
        raise ModuleNotFoundError("No module named 'lycoris'")

    rows = rows_of("step 0", work)
    assert [row.values["bit-identical in training"] for row in rows.values()] == [True, True, True]

    delta = _gpu_steps.VARIANTS["delta form"]
    variants = {"delta form": delta, "LyCORIS LoCon": _gpu_steps.Variant(missing)}
    monkeypatch.setattr(_gpu_steps, "VARIANTS", variants)
    rows = rows_of("step, checkpointing", work)
    values = rows["delta form"].values
    assert (values["batch"], values["checkpointing"], values["of delta form"]) == (2, True, 1)
    assert (values["busy"], values["kernels"]) == ("needs CUDA", "needs CUDA")
    assert values["trained M"] > 0
    assert rows["LyCORIS LoCon"].status == "not installed"
    assert rows["LyCORIS LoCon"].values == {"batch": 2, "checkpointing": True}


@pytest.mark.slow
def test_the_stages_from_the_files_to_a_resumed_training(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of("make", work)["tiny.safetensors"].status == "ok"
    assert rows_of("split", work)["on cpu"].values["weights restored"] > 0.5
    cpu = rows_of("losses, cpu", work)["cpu"]
    assert cpu.values["largest relative difference from the CPU"] == 0
    assert rows_of("losses, cuda", work)["cuda"].status == "needs CUDA"
    started = rows_of("train", work)["start"]
    assert started.values["steps"] == "0 to 2"
    assert started.values["previews"] == 1
    assert rows_of("resume", work)["resume"].values["steps"] == "2 to 3"
    assert rows_of("autocast bf16", work)["ACCELERATE_MIXED_PRECISION=bf16"].values["steps"] == 2
    monkeypatch.setattr(_gpu_runs, "SYNCHRONIZED", ("adamw",))
    assert rows_of("synchronizations", work)["adamw"].status == "needs CUDA"
    assert {row.status for row in rows_of("fp16", work).values()} <= {"skipped", "needs CUDA"}
    assert rows_of("sample", work)["64 px"].values["pictures"] == 1


@pytest.mark.slow
def test_plan_and_runs_within_memory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_memory, "NAMES", ("plan, 6 GB", "plan, 8 GB", "streamed"))
    settings = Settings(work, tiny=True)
    if not settings.principal.exists():
        rows_of("make", work)
        rows_of("split", work)
    planned = rows_of("plan", work)
    assert {row.status for row in planned.values()} == {"ok"}
    assert planned["streamed"].values["predicted GB"] < planned["plan, 6 GB"].values["predicted GB"]
    assert rows_of("memory: streamed", work)["streamed"].status == "ok"
    within = rows_of("memory: plan, 6 GB", work)["plan, 6 GB"]
    assert (within.status, within.values["peak tensors GB"]) == ("ok", "needs CUDA")
    assert rows_of("memory: plan, 8 GB", work)["plan, 8 GB"].note == "same setup as plan, 6 GB"
    assert "failed" in rows_of("memory: int8", work)["int8"].note


# ---------------------------------------------------------------- what needs a card, imitated


def test_the_memory_limit_leaves_room_for_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    card = type("Card", (), {"total_memory": 80_000_000_000})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    _gpu_memory._limit_memory(6e9)
    assert shares == [pytest.approx((6e9 - CONTEXT_BYTES) / 80e9)]
    with pytest.raises(ValueError, match=r"this card has 80\.0 GB only"):
        _gpu_memory._limit_memory(96e9)


def test_synchronizations_are_counted_between_two_steps() -> None:
    def step(number: int) -> None:
        counter.on_step(StepInfo(number, 0.0, {}, 0.0, {}, 0.0, 0, {}))

    def warn(count: int) -> None:
        for _ in range(count):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counter = _gpu_runs.Synchronizations(caught)
        for number in range(1, 5):
            warnings.warn("something else", stacklevel=1)
            warn(3 * number)
            step(number)
    assert counter.per_step == (9 + 12) / 2
    assert list(counter.places) == [f"{Path(__file__).name}:{warn.__code__.co_firstlineno + 2}"]


def test_overlapping_kernels_count_once() -> None:
    assert _gpu_steps.covered([(4, 5), (0, 2), (1, 3), (1.5, 1.6)]) == 4
    assert _gpu_steps.kernel_intervals(lambda: torch.ones(2).add_(1)) == []


# ---------------------------------------------------------------- wheels


def test_the_wheels_are_those_of_the_locks_without_torch() -> None:
    names = {line.partition("==")[0] for line in _gpu_pack.pinned()}
    assert names >= {"diffusers", "transformers", "pydantic-core", "peft", "bitsandbytes", "lycoris-lora"}
    assert not names & {"torch", "tensorboard", "matplotlib", "pytest"}
    assert _gpu_pack.pinned().count("numpy==" + version_of("numpy")) == 1


def version_of(package: str) -> str:
    lock = (_gpu_pack.ROOT / "requirements.lock").read_text(encoding="utf-8")
    return next(line.partition("==")[2] for line in lock.splitlines() if line.startswith(f"{package}=="))


def test_bitsandbytes_keeps_the_library_of_one_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    files = [
        "__init__.py",
        *(f"libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda128", "cuda130", "rocm70")),
    ]
    with zipfile.ZipFile(wheel, "w") as whole:
        for file in files:
            whole.writestr(f"bitsandbytes/{file}", b"code")
    _gpu_pack.keep_library(wheel, "130")
    left = [Path(name).name for name in zipfile.ZipFile(wheel).namelist()]
    assert left == ["__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]


@pytest.mark.slow
def test_a_tiny_run_in_processes_has_no_failure(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu.json", tiny=True)
    gpu.run_all(STAGES, Settings(tmp_path / "work", tiny=True), report, budget_s=3600)
    assert {row.status for row in report.rows} <= {"ok", "skipped", "needs CUDA"}
    assert {row.table for row in report.rows} == {stage.table for stage in STAGES}
