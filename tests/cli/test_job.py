"""The event file and the flag files of `--job`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spectune.cli.app import run
from spectune.cli.job import EVENTS, Job
from spectune.cli.training_events import TrainingEvents
from spectune.training import state
from spectune.training.callbacks import StepInfo
from spectune.training.callbacks.loss_curve import LossCurve
from spectune.training.output import saved_states
from tests.training.conftest import draw

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "events.md"


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text(encoding="utf-8").splitlines()]


def names_of(folder: Path, *, without: tuple[str, ...] = ("progress", "message")) -> list[str]:
    return [event["event"] for event in events_of(folder) if event["event"] not in without]


def documented() -> dict[str, set[str]]:
    """Return the fields of each event, from the examples of the page."""
    lines = re.findall(r"^\| `(\{.*\})` \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {event["event"]: set(event) for event in map(json.loads, lines)}


def check_fields(folder: Path) -> None:
    """Compare the fields of all events with the page."""
    page = documented()
    for event in events_of(folder):
        assert set(event) == page[event["event"]], event


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job_pictures")
    for index in range(3):
        draw(folder / f"{index}.png", (32, 32), seed=index)
        (folder / f"{index}.txt").write_text(f"shape {index}")
    return folder


@pytest.fixture
def train(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Return a function that trains the tiny SDXL for three steps with `--job`, and returns the exit code."""
    monkeypatch.setattr(LossCurve, "_draw", lambda self: None)  # the plot takes longer than the steps
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"[model]\nbase = '{tiny_checkpoint}'\nrank = 2\nparts = ['unet']\nlayers = ['unet.*attn2.to_k']\n"
        f"[data]\nfolders = ['{pictures}']\nresolution_px = 32\n"
        "[run]\nname = 't'\noutput = 'out'\nsteps = 3\ntensorboard = false\n",
        encoding="utf-8",
    )
    return lambda *options: run(["train", str(recipe), "--job", str(tmp_path / "job"), *options])


@pytest.fixture
def flag_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Return a function that lets another program create a flag file after a step."""

    def create(step: int, flag: str) -> None:
        def on_step(self: TrainingEvents, info: StepInfo) -> None:
            plain(self, info)
            if info.step == step:
                (tmp_path / "job" / flag).touch()

        plain = TrainingEvents.on_step
        monkeypatch.setattr(TrainingEvents, "on_step", on_step)

    return create


# ---------------------------------------------------------------- any command


def test_split_writes_the_documented_events(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    arguments = [
        "split",
        str(tiny_checkpoint),
        "-o",
        str(tmp_path),
        "--rank",
        "2",
        "--job",
        str(job),
        "--json",
    ]
    assert run(arguments) == 0
    check_fields(job)
    assert names_of(job) == ["start", "result", "end"]
    start, *_, result, end = events_of(job)
    assert (start["command"], start["argv"], start["pid"]) == ("split", arguments, os.getpid())
    assert start["cwd"] == str(Path.cwd())
    assert result["report"] == json.loads(capfd.readouterr().out)
    assert end["exit_code"] == 0
    steps = [event for event in events_of(job) if event["event"] == "progress"]
    assert steps[0]["done"] == 0
    assert steps[-1]["done"] == steps[-1]["total"] > 100
    assert len(steps) < 50  # not one for each tensor


def test_stop_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "stop").touch()
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path / "parts"), "--job", str(job)]) == 130
    assert names_of(job) == ["start", "end"]
    assert events_of(job)[-1]["exit_code"] == 130
    assert not (job / "stop").exists()
    assert [path for path in (tmp_path / "parts").rglob("*") if path.is_file()] == []


def test_an_error_is_an_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job"
    assert run(["split", str(tmp_path / "no.safetensors"), "-o", str(tmp_path), "--job", str(job)]) == 2
    check_fields(job)
    _, error, end = events_of(job)
    assert error["what"] in " ".join(capfd.readouterr().err.split())
    assert "no.safetensors" in error["what"]
    assert (error["event"], end["exit_code"]) == ("error", 2)


def test_a_bug_is_an_event_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("spectune.cli.command.run_operation", lambda function, options: broken(options))
    with pytest.raises(ValueError, match="no such thing"):
        run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--job", str(tmp_path / "job")])
    _, error, end = events_of(tmp_path / "job")
    assert (error["what"], error["hint"], end["exit_code"]) == ("ValueError: no such thing", None, 1)


def test_a_folder_that_cannot_be_written_is_one_error(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["split", str(tiny_checkpoint), "-o", str(tmp_path / "parts"), "--job"]
    assert run([*arguments, str(tmp_path / "file" / "job")]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert error.startswith("error: cannot write to the job folder")
    assert "hint: pass another folder to --job" in error
    assert not (tmp_path / "parts").exists()


def test_notes_and_warnings_are_messages_with_a_level(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.message("warning: low on disk")
    job.message("two bases", "note")
    job.message("reading\x1b[31m a.safetensors")
    job.close()
    messages = [(event["level"], event["text"]) for event in events_of(tmp_path)[:-1]]
    assert messages == [
        ("warning", "low on disk"),
        ("note", "two bases"),
        ("info", "reading\N{REPLACEMENT CHARACTER}[31m a.safetensors"),
    ]


def test_progress_is_written_four_times_per_second(tmp_path: Path) -> None:
    now = [0.0]
    job = Job(tmp_path, now=lambda: now[0])
    for done in range(101):
        job.progress(done, 100, f"item {done}")
        now[0] += 0.1
    job.progress(0, 7, "next", stage="next")
    job.close()
    events = [event["done"] for event in events_of(tmp_path)[:-1]]
    assert events == [*range(0, 100, 3), 100, 0]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.write("step", loss=float("nan"), learning_rates={"unet": float("inf")}, files=(Path("a"), 1.5))
    job.close()
    step = events_of(tmp_path)[0]
    assert (step["loss"], step["learning_rates"], step["files"]) == (None, {"unet": None}, ["a", 1.5])


def test_a_second_command_appends_after_an_incomplete_line(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"time": 1, "event": "start"}\n{"time": 2, "eve')
    Job(tmp_path).close()
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert lines[1] == '{"time": 2, "eve'
    assert json.loads(lines[2])["event"] == "end"


def test_only_the_first_of_several_processes_writes_and_prints(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(["inspect", str(tiny_checkpoint), "--job", str(tmp_path / "job")]) == 0
    assert not (tmp_path / "job").exists()
    assert "".join(capfd.readouterr()) == ""
    monkeypatch.setenv("RANK", "0")
    assert run(["inspect", str(tiny_checkpoint)]) == 0
    assert "parameters" in "".join(capfd.readouterr())


def test_a_full_disk_does_not_end_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Full:
        def write(self, line: bytes) -> int:
            raise OSError(28, "No space left on device")

    job = Job(tmp_path)
    job._file = Full()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    job.message("one")
    job.message("two")
    job.close()
    assert capfd.readouterr().err.count("No space left on device; no more events are written") == 1


# ---------------------------------------------------------------- training


def test_a_training_writes_the_documented_events(train: Callable[..., int], tmp_path: Path) -> None:
    job, out = tmp_path / "job", tmp_path / "out"
    assert train("--set", "run.save_every_steps=2") == 0
    check_fields(job)
    expected = ["start", "run", "step", "step", "save", "save", "step", "save", "save", "result", "end"]
    assert names_of(job) == expected
    events = events_of(job)
    run_event = next(event for event in events if event["event"] == "run")
    assert (run_event["name"], run_event["steps"], run_event["output"]) == ("t", 3, str(out))
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    files = [(event["step"], *event["files"]) for event in events if event["event"] == "save"]
    assert files == [
        (2, str(out / "t-step00000002.state")),
        (2, str(out / "t-step00000002.safetensors")),
        (3, str(out / "t-step00000003.state")),
        (3, str(out / "t.safetensors")),
    ]
    stages = [event["name"] for event in events if event["event"] == "progress"]
    assert stages.count("saving the state") == 4  # begin and end, twice


def test_stop_saves_and_the_same_command_continues(
    train: Callable[..., int], flag_after: Callable[[int, str], None], tmp_path: Path
) -> None:
    flag_after(2, "stop")
    assert train() == 130
    assert names_of(tmp_path / "job")[-4:] == ["save", "save", "result", "end"]
    assert events_of(tmp_path / "job")[-1]["exit_code"] == 130
    assert not (tmp_path / "job" / "stop").exists()
    assert [path.name for path in saved_states(tmp_path / "out", "t")] == ["t-step00000002.state"]
    assert train() == 0
    runs = [event for event in events_of(tmp_path / "job") if event["event"] == "run"]
    assert [event["first_step"] for event in runs] == [0, 2]


def test_stop_before_the_first_step_ends_at_once(train: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "stop").touch()
    assert train() == 130
    assert names_of(tmp_path / "job") == ["start", "end"]
    assert not (tmp_path / "out" / "t.safetensors").exists()


def test_save_and_preview_now_although_none_is_due(
    train: Callable[..., int], flag_after: Callable[[int, str], None], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox --s 1\na blue fox --s 1\n")
    flag_after(1, "save")
    flag_after(2, "preview")
    prompts = f"run.preview={tmp_path / 'prompts.txt'}"
    assert train("--set", prompts, "--set", "run.preview_every_steps=100") == 0
    job, out = tmp_path / "job", tmp_path / "out"
    check_fields(job)
    events = events_of(job)
    saves = [(event["step"], Path(event["files"][0]).name) for event in events if event["event"] == "save"]
    assert saves[:2] == [(1, "t-step00000001.state"), (1, "t-step00000001.safetensors")]
    assert len(saves) == 4  # once, and at the end
    assert (out / "t-step00000001.state" / state.STATE).is_file()
    assert load_file(out / "t-step00000001.safetensors").keys() == load_file(out / "t.safetensors").keys()
    (preview,) = [event for event in events if event["event"] == "preview"]
    assert (preview["step"], preview["prompts"]) == (2, ["a red fox", "a blue fox"])
    names = ["t-step00000002-01.png", "t-step00000002-02.png"]
    assert [Path(file).name for file in preview["files"]] == names
    assert all(Path(file).is_file() for file in preview["files"])
    assert not (job / "save").exists()
    assert not (job / "preview").exists()
