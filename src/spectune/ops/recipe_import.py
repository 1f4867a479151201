"""Convert a command of kohya's sd-scripts to a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError
from spectune.files.rename import replace_text
from spectune.files.writer import check_target
from spectune.interop.kohya.command_line import Command, parse_command
from spectune.interop.kohya.config_files import parse_file, with_config_file, with_dataset_config
from spectune.interop.kohya.importer import ImportedRecipe, import_command, replaced_by_split, trainer_dtype
from spectune.interop.kohya.recipe_file import recipe_text
from spectune.operation import operation
from spectune.ops.options.training import ImportOptions


@dataclass(frozen=True)
class ImportReport:
    """The recipe that was written, or for a command that trains nothing, the command that replaces it."""

    path: Path | None
    imported: ImportedRecipe | None
    replaced_by: str | None = None
    trainer_dtype: str = ""  # the dtype in which that command's trainer stores factors, if it sets one

    @property
    def understood(self) -> bool:
        """Return whether every flag has a counterpart."""
        return self.imported is None or self.imported.understood


@operation(ImportOptions)
def recipe_import(options: ImportOptions) -> ImportReport:
    """Write the recipe that is equivalent to a command of sd-scripts, with a verdict for each flag."""
    folder = _folder_of(options.command)
    command = with_config_file(read_command(options.command), folder)
    command = with_dataset_config(command, folder)
    split = replaced_by_split(command)
    if split is not None:
        return ImportReport(None, None, split, trainer_dtype(command))
    out = options.out
    imported = import_command(command, folder=out.parent)
    text = recipe_text(imported, command=f"spectune train {out.as_posix()}")
    check_target(out, len(text.encode()), force=options.force)
    replace_text(out, text)
    return ImportReport(out, imported)


def read_command(words: str) -> Command:
    """Parse the command, or read it from the file that `words` names."""
    if _is_file_name(words):
        path = Path(words)
        if not path.is_file():
            raise InputError(f"{path} does not exist", hint="pass a file, or the command itself in quotes")
        return parse_file(path)
    return parse_command(words)


def _is_file_name(words: str) -> bool:
    try:
        if Path(words).is_file():
            return True
    except (OSError, ValueError):  # too long for a file name, or it contains a null character
        return False
    has_suffix = re.search(r"\.(bat|cmd|sh|ps1|txt|toml|json)$", words.strip(), re.IGNORECASE)
    return has_suffix is not None and "--" not in words


def _folder_of(words: str) -> Path:
    return Path(words).parent if _is_file_name(words) else Path()
