"""The table of losses of a run: a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from spectune.errors import InputError
from spectune.files.rename import replacing


@dataclass(frozen=True)
class LossRow:
    """A row of the table: a logged step, or a validation."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None


_NUMBERS = [field.name for field in fields(LossRow)][1:]


def write_table(rows: Sequence[LossRow], target: Path) -> None:
    """Write the rows; a crash leaves the old table."""
    with replacing(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(LossRow)])
        writer.writerows(astuple(row) for row in rows)


def read_table(file: Path) -> list[LossRow]:
    """Return the rows of a table; none if there is no file.

    Raises:
        InputError: The file is not a table of this kind.
    """
    if not file.exists():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return [
                LossRow(int(row["step"]), *(float(row[key]) if row[key] else None for key in _NUMBERS))
                for row in csv.DictReader(lines)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} is not the loss table of a run", hint="move or remove it: a run writes its table there"
        ) from error
