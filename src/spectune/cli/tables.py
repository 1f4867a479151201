"""Lay out tables so that a narrow terminal breaks neither numbers nor words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_GAP = 2  # columns of the terminal between columns of a table without a frame


def fitted_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, width: int
) -> RenderableType:
    """Return a table for a terminal of `width`. The first `left` columns are text, the others are numbers.

    If the frame does not fit, the table has none. If that does not fit either, the first column is on a line
    of its own, above the others.
    """
    texts = [[row[index] for row in rows] for index in range(len(columns))]
    narrowest = [
        max(map(cell_len, [*_words(name), *(word for text in column for word in _units(text, index < left))]))
        for index, (name, column) in enumerate(zip(columns, texts, strict=True))
    ]
    widest = [max(map(cell_len, [name, *column])) for name, column in zip(columns, texts, strict=True)]
    frame = 3 * len(columns) + 1
    if sum(narrowest) + frame <= width:
        split = sum(widest) + frame > width
        return _grid(columns, rows, Table(header_style="bold"), narrowest, left=left, split=split)
    if sum(narrowest) + _GAP * (len(columns) - 1) <= width:
        bare = Table(header_style="bold", box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
        return _grid(columns, rows, bare, narrowest, left=left, split=True)
    return Group(*_stacked(columns, rows, left, width))


def _words(name: str) -> list[str]:
    """Return the lines of a narrow heading; a percent sign stays with its number."""
    return name.replace(" %", "\N{NO-BREAK SPACE}%").split(" ")


def _units(text: str, is_text: bool) -> Sequence[str]:
    """Return the parts of a cell that are never broken: words, or a number with its unit."""
    return text.split() if is_text else [text]


def _grid(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    grid: Table,
    narrowest: Sequence[int],
    *,
    left: int,
    split: bool,
) -> Table:
    for index, (name, least) in enumerate(zip(columns, narrowest, strict=True)):
        is_text = index < left
        grid.add_column(
            "\n".join(_words(name)) if split and not is_text else name,
            justify="left" if is_text else "right",
            min_width=least,
            no_wrap=not is_text,
            vertical="top",
        )
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))  # no markup: a path may contain square brackets
    return grid


def _stacked(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int, width: int) -> Iterator[Text]:
    names = columns[1:]
    heads, widths = _columns([[name] for name in names], rows)
    if sum(widths) + _GAP * len(widths) > width:
        heads, widths = _columns([_words(name) for name in names], rows)

    def line(cells: Sequence[str], style: str) -> Text:
        padded: list[str] = []
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True), start=1):
            space = " " * (width - cell_len(cell))
            padded.append(cell + space if index < left else space + cell)
        return Text(" " * _GAP + (" " * _GAP).join(padded).rstrip(), style, no_wrap=True, overflow="ignore")

    yield Text(columns[0], "bold")
    yield from (line(cells, "bold") for cells in heads)
    for row in rows:
        yield Text(row[0], no_wrap=True, overflow="ignore")
        yield line(row[1:], "")


def _columns(
    names: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]
) -> tuple[list[tuple[str, ...]], list[int]]:
    """Return the lines of the headings, the last ones full, and the width of each column but the first."""
    height = max(map(len, names))
    heads = list(zip(*([""] * (height - len(words)) + [*words] for words in names), strict=True))
    body = zip(*heads, *(row[1:] for row in rows), strict=True)
    return heads, [max(map(cell_len, column)) for column in body]
