"""Test tables and the progress bar in terminals of different widths."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from spectune.cli import console
from spectune.cli.tables import fitted_table

NAME = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
COLUMNS = ("part", "layers", "full rank", "r16", "r32", "r64", "r128", "r256", "90 % at", "decay")
ROW = ("unet", "197", "64..128", "47.1%", "68.6%", "89.5%", "100 %", "100 %", "48.5", "0.70")


def lines(columns: tuple[str, ...], *rows: tuple[str, ...], width: int, left: int = 1) -> list[str]:
    printed = Console(file=io.StringIO(), width=width, highlight=False)
    printed.print(fitted_table(columns, rows, left=left, width=width), crop=False)
    assert isinstance(printed.file, io.StringIO)
    return [line.rstrip() for line in printed.file.getvalue().splitlines()]


@pytest.mark.parametrize(("width", "framed"), [(120, True), (80, False)])
def test_numbers_and_headings_are_never_broken(width: int, framed: bool) -> None:
    shown = lines(COLUMNS, ROW, width=width)
    assert max(map(len, shown)) <= width
    assert ("┃" in shown[1]) == framed
    (row,) = [line for line in shown if "unet" in line]
    assert re.split(r"\s{2,}", re.sub("[│┃]", " ", row).strip()) == list(ROW)
    words = re.sub("[│┃]", " ", " ".join(shown)).split()
    assert {"full", "rank", "layers", "decay", "at"} <= set(words)


def test_a_long_name_is_on_a_line_of_its_own() -> None:
    shown = lines(("tensor", "max ulp", "error"), (NAME, "502", "1.0e-04"), ("b", "7", "0"), width=80)
    assert shown == ["tensor", "  max ulp    error", NAME, "      502  1.0e-04", "b", "        7        0"]
    assert "│" in lines(("tensor", "max ulp", "error"), (NAME, "502", "1.0e-04"), width=120)[3]


def test_headings_of_a_narrow_table_are_broken_at_spaces() -> None:
    shown = lines(("tensor", "full rank", "90 % at"), (NAME, "64", "48"), width=16)
    assert shown == ["tensor", "  full  90\N{NO-BREAK SPACE}%", "  rank    at", NAME, "    64    48"]


def test_text_wraps_between_words() -> None:
    shown = lines(("program", "note"), ("ComfyUI", "loads only widths and depths"), width=30, left=2)
    assert max(map(len, shown)) <= 30
    body = shown[3:-1]
    assert len(body) > 1
    assert re.sub("[│]", "", " ".join(body)).split() == [
        "ComfyUI",
        "loads",
        "only",
        "widths",
        "and",
        "depths",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_fits_and_shows_all_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(
        console, "err", console.SafeConsole(file=file, width=width, force_terminal=True, color_system=None)
    )
    with console.progress("split") as report:
        report(1234, 2515, NAME)
    bars = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", file.getvalue()) if "2515" in line]
    assert bars
    for bar in bars:
        assert len(bar.rstrip()) <= width
        assert re.search(r"1234/2515 .*\d:\d\d:\d\d left ", bar) or width < 70
    assert NAME[-12:] in bars[-1] or width < 80
