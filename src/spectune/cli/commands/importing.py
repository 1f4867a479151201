"""The command `recipe import`: converts a command of sd-scripts into a recipe."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from spectune.cli.console import print_json, print_warning, say
from spectune.errors import InputError, counted
from spectune.files.writer import check_target
from spectune.interop.kohya.command_line import Command, parse_command
from spectune.interop.kohya.config_files import parse_file, with_config_file
from spectune.interop.kohya.importer import ImportedRecipe, import_command, replaced_by_split
from spectune.interop.kohya.recipe_file import recipe_text


def import_recipe(words: str, out: Path, *, force: bool, as_json: bool) -> bool:
    """Write the recipe of a command and return whether every flag was understood.

    For a command that trains nothing, print the `spectune split` that replaces it and write no recipe.
    `words` is the command itself, a file that contains it, or `-` for the standard input.
    """
    command = with_config_file(read_command(words), _folder_of(words))
    split = replaced_by_split(command)
    if split is not None:
        _print_split(split, as_json=as_json)
        return True
    imported = import_command(command, folder=out.parent)
    text = recipe_text(imported, command=f"spectune train {out.as_posix()}")
    check_target(out, len(text.encode()), force=force)
    out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(_record(imported, out))
    else:
        _print_results(imported, out)
    return imported.understood


def read_command(words: str) -> Command:
    """Read the command in `words`, in the file that they name, or on the standard input for `-`."""
    if words == "-":
        return parse_command(sys.stdin.read())
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
    except OSError:  # too long for a name
        return False
    looks_like_one = re.search(r"\.(bat|cmd|sh|ps1|txt|toml|json)$", words.strip(), re.IGNORECASE)
    return looks_like_one is not None and "--" not in words


def _folder_of(words: str) -> Path:
    return Path(words).parent if _is_file_name(words) else Path()


def _print_split(split: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"recipe": None, "replaced_by": split, "understood": True, "flags": [], "notes": []})
        return
    say("this command trains nothing: with such a small learning rate it only rewrites the extract with the")
    say("keys, alpha and dtype of the trainer. `spectune split` writes these at once, together with the")
    say("residual. No recipe was written. Instead of this command and the steps around it, run:")
    print(split)


def _print_results(imported: ImportedRecipe, out: Path) -> None:
    for result in imported.results:
        if result.verdict in ("taken", "ignored"):
            say(str(result))
        else:
            print_warning(str(result))
    for note in imported.notes:
        print_warning(note)
    unsupported = sum(result.verdict in ("unsupported", "unknown") for result in imported.results)
    if unsupported:
        total = counted(len(imported.results), "flag")
        say(f"{unsupported} of {total} have no counterpart in spectune; the end of the recipe lists them")
    say(f"wrote {out}; to train, run: spectune train {out}")


def _record(imported: ImportedRecipe, out: Path) -> dict[str, object]:
    return {
        "recipe": str(out),
        "replaced_by": None,
        "understood": imported.understood,
        "flags": [
            {
                "flag": str(result.flag),
                "verdict": result.verdict,
                "settings": dict(result.settings),
                "why": result.why.removeprefix("; "),
            }
            for result in imported.results
        ],
        "notes": list(imported.notes),
    }
