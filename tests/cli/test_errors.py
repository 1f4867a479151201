"""What a user and a program see of an error: one message, an exit code, JSON with `--json`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spectune.cli import app
from spectune.cli.app import run
from spectune.cli.commands import COMMANDS
from spectune.cli.reports import train as train_report
from spectune.model.memory_errors import MAIN_REMEDIES
from spectune.operation import option_fields

HOSTILE = "--x\x1b[2J\u202eabc\nhint: forged"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "exit-codes.md"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["split"], "missing argument 'MODEL'", "see spectune split --help"),
        (["split", "m", "--rank", "x"], "invalid value for '--rank': ", "see spectune split --help"),
        (["split", "m", "--rank", "99999"], "invalid value for '--rank': ", "see spectune split --help"),
        (["nope"], "no such command 'nope'", "see spectune --help"),
        (["null", "m", HOSTILE[2:], "-o", "x"], "got unexpected extra argument(s) (", None),
        (["split", HOSTILE], "no such option: --x", None),
        (["inspect", "a\0b"], "invalid value for 'MODEL': ", None),
        (["slice", "a\0.safetensors:te", "-o", "b"], "cannot read a\ufffd.safetensors", None),
        (["slice", "\ud800.safetensors:te", "-o", "b"], "cannot read \ufffd.safetensors", None),
        (["sample", "m", "--size", "9" * 5000], "cannot parse --size", None),
        (["sample", "m", "-c", "caf\udce9"], "a caption is not Unicode text", None),
        (["sample", "m", "--size", "1x1"], "--size is 1x1: expected sides of 8 to 16,384 pixels", None),
    ],
)
def test_a_wrong_command_line_is_one_visible_message(
    words: list[str], message: str, hint: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--json"] if words[0] == "inspect" else words) == 2
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert lines[0].startswith(f"error: {message}")
    assert [line.split(":")[0] for line in lines[1:]] in ([], ["hint"])
    assert hint is None or lines[1] == f"hint: {hint}"
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", shown.err)


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["inspect", "no.safetensors"], "no such file: no.safetensors", None),
        (["inspect"], "missing argument 'MODEL'", "see spectune inspect --help"),
        (["export", "a", "b", "-o", "c", "--keys", "koya"], "unknown --keys 'koya': ", None),
    ],
)
def test_an_error_is_json_for_programs(
    words: list[str], what: str, hint: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--json"]) == 2
    shown = capfd.readouterr()
    error = json.loads(shown.out)["error"]
    assert error.keys() == {"what", "hint"}
    assert error["what"].startswith(what)
    assert error["hint"] == hint
    assert shown.err.startswith(f"error: {error['what']}")  # people see it too


def test_without_json_stdout_stays_empty(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "no.safetensors"]) == 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "main memory is full: no more could be allocated"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nframe #0"),
            "main memory is full: DefaultCPUAllocator: can't allocate memory: you tried",
        ),
        (RuntimeError("can't start new thread"), "main memory is full: can't start new thread"),
        (
            ImportError("lib.so: failed to map segment from shared object"),
            "main memory is full: lib.so: failed to map segment from shared object",
        ),
        (OSError(5, "Input/output error", "x.png"), "x.png: Input/output error"),
    ],
)
def test_a_failure_of_the_machine_is_one_message(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    assert run(["inspect", "m", "--json"]) == 2
    shown = capfd.readouterr()
    lines = shown.err.splitlines()
    assert lines[0] == f"error: {message}"
    if not isinstance(error, OSError):
        assert lines[1] == f"hint: what helps, the cheapest first: {'; '.join(MAIN_REMEDIES)}"
    assert json.loads(shown.out)["error"]["what"] == message


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(["inspect"])


def test_the_page_lists_every_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed = re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == ["0", "1", "2", str(train_report.INTERRUPTED)]
    assert run(["--version"]) == 0
    command = "sdxl_train.py --pretrained_model_name_or_path=a --train_data_dir=b --nope=1"
    assert run(["recipe", "import", command, "-o", str(tmp_path / "r.toml")]) == 1
    assert run([]) == 2  # prints the help


def test_every_number_of_a_command_has_limits() -> None:
    unbounded = [
        f"{command.name} {field.name}"
        for command in COMMANDS
        for field in option_fields(command.options)
        if field.kind in (int, float) and (field.minimum is None or field.maximum is None)
    ]
    assert unbounded == []
