"""Test that damaged and hostile commands and settings give one short error, in time that grows linearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectune.cli.app import run
from spectune.errors import InputError
from spectune.interop.kohya.command_line import LONGEST_TEXT, MOST_WORDS, parse_command
from spectune.interop.kohya.gui import parse_gui_json
from spectune.interop.kohya.importer import import_command
from spectune.interop.kohya.rules import literal
from tests.interop.kohya_commands import SHORT, result_of

DOUBLING = "set V=0123456789\n" + "set V=%V%%V%\n" * 40 + f"{SHORT} --output_name=%V%"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train" * 60_000, "no training command"),
        ("x" * (LONGEST_TEXT + 1), f"expected at most {LONGEST_TEXT:,} characters"),
        (SHORT + " --seed=1" * 9_000, f"expected at most {MOST_WORDS} flags and values, found 18,006"),
        (SHORT + " --seed=1" * 30_000, "expected at most 20,000 words, found 30,"),
        (f"{SHORT} --network_args" + " a=1" * 15_000, f"expected at most {MOST_WORDS} flags and values"),
        (DOUBLING, "the variable V makes a line longer than 32,767 characters"),
        (SHORT + "\n--seed=1" * 9_000, f"expected at most {MOST_WORDS} flags and values"),
        (SHORT + "\n--seed=1" * 30_000, "expected at most 10,000 lines, found 30,"),
        ("a && " * 9_000, "no training command"),
        (f"set A={' ' * 200_000}x\n{SHORT} --no=\x07", "--no contains the control character U+0007"),
        (f"{SHORT} --output_name=a\x00b", "--output_name contains the control character U+0000"),
        (f"{SHORT} --training_comment=\x1b[2J", "--training_comment contains the control character U+001B"),
    ],
    ids=[
        *("one word", "long", "flags", "words", "values", "variables", "flags on lines", "lines", "joined"),
        *("spaces", "null", "escape"),
    ],
)
def test_hostile_commands(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        import_command(parse_command(text), folder=Path())
    assert error.value.what.startswith(message)
    assert len(error.value.what) < 300


def test_a_control_character_in_a_file_of_the_interface() -> None:
    settings = {"sdxl": True, "pretrained_model_name_or_path": "a\u0000.safetensors"}
    with pytest.raises(
        InputError, match=r"--pretrained_model_name_or_path contains the control character U\+0000"
    ):
        import_command(parse_gui_json(json.dumps(settings), "x.json"), folder=Path())
    with pytest.raises(InputError, match="not valid JSON: a text contains half of a surrogate pair"):
        import_command(parse_gui_json('{"sdxl": true, "output_name": "\\ud800"}', "x.json"), folder=Path())


def test_line_breaks_in_values_stay_valid_toml(tmp_path: Path) -> None:
    settings = {
        "sdxl": True,
        "pretrained_model_name_or_path": "m.safetensors",
        "training_comment": "a\nb = 1",
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(settings))
    assert run(["recipe", "import", str(path), "-o", str(tmp_path / "r.toml")]) == 0


def test_files_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.bat"
    path.write_bytes(SHORT.encode("utf-16") + b"\x41")
    assert run(["recipe", "import", str(path)]) == 2
    assert "error: x.bat is not valid UTF-16" in capfd.readouterr().err
    path.write_bytes(b"a" * (4 * LONGEST_TEXT + 1))
    assert run(["recipe", "import", str(path)]) == 2
    assert "error: x.bat has 1,600,001 bytes: expected a command or settings" in capfd.readouterr().err
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert run(["recipe", "import", str(tmp_path / "x.json")]) == 2
    assert "x.json is not valid JSON: it is nested too deeply" in capfd.readouterr().err


def test_deeply_nested_arguments_stay_text() -> None:
    assert literal("(" * 15_000) == "(" * 15_000
    assert literal("(0.9, 0.99)") == [0.9, 0.99]


@pytest.mark.parametrize("value", ["1e308", "9" * 400, "1e17", "nan"])
def test_numbers_out_of_range(value: str) -> None:
    line = result_of(f"--resolution={value}", "resolution")
    assert "not supported: expected a whole number, found" in line
    assert len(line) < 400


def test_a_path_with_a_line_break_is_refused() -> None:
    """A recipe with it could not be read."""
    settings = {"sdxl": True, "pretrained_model_name_or_path": "m.safetensors", "train_data_dir": "a\nb"}
    with pytest.raises(InputError, match=r"the path 'a\\nb' contains a control character"):
        import_command(parse_gui_json(json.dumps(settings), "x.json"), folder=Path())
