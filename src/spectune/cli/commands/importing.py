"""The command that makes a recipe of a command of sd-scripts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from spectune.cli.console import print_json, print_warning, say
from spectune.errors import InputError
from spectune.files.writer import check_target
from spectune.interop.kohya.command_line import Command, parse_command
from spectune.interop.kohya.config_files import parse_file, with_config_file
from spectune.interop.kohya.importer import ImportedRecipe, convert, replaced_by_split
from spectune.interop.kohya.recipe_text import recipe_text


def import_recipe(words: str, out: Path, *, force: bool, as_json: bool) -> bool:
    """Whether every flag was understood; a command that trains nothing is answered, and no recipe written.

    `words` is the command itself, a file that holds it, or `-` for the standard input.
    """
    command = with_config_file(read_command(words), _folder_of(words))
    split = replaced_by_split(command)
    if split is not None:
        _answer_fix(split, as_json=as_json)
        return True
    conversion = convert(command, folder=out.parent)
    text = recipe_text(conversion, command=f"spectune train {out.as_posix()}")
    check_target(out, len(text.encode()), force=force)
    out.write_text(text, encoding="utf-8")
    if as_json:
        print_json(_record(conversion, out))
    else:
        _print_answers(conversion, out)
    return conversion.understood


def read_command(words: str) -> Command:
    """The command that `words` are, that stands in the file they name, or on the standard input for `-`."""
    if words == "-":
        return parse_command(sys.stdin.read())
    if _is_file_name(words):
        path = Path(words)
        if not path.is_file():
            raise InputError(f"{path} does not exist", hint="give a file, or the command itself in quotes")
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


def _answer_fix(split: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"recipe": None, "replaced_by": split, "understood": True, "flags": [], "notes": []})
        return
    say("this command trains nothing: at such a learning rate it only rewrites the extract with the")
    say("trainer's keys, alpha and type. `spectune split` writes those at once, with the residual that")
    say("belongs to them. No recipe is written; instead of this command and of the steps around it, run:")
    print(split)


def _print_answers(conversion: ImportedRecipe, out: Path) -> None:
    for answer in conversion.answers:
        if answer.verdict in ("taken", "ignored"):
            say(str(answer))
        else:
            print_warning(str(answer))
    for note in conversion.notes:
        print_warning(note)
    open_ends = sum(answer.verdict in ("unsupported", "unknown") for answer in conversion.answers)
    if open_ends:
        count = len(conversion.answers)
        say(f"{open_ends} of {count} flags have no counterpart: the recipe lists them at its end")
    say(f"wrote {out}; run it with: spectune train {out}")


def _record(conversion: ImportedRecipe, out: Path) -> dict[str, object]:
    return {
        "recipe": str(out),
        "replaced_by": None,
        "understood": conversion.understood,
        "flags": [
            {
                "flag": str(answer.given),
                "verdict": answer.verdict,
                "settings": dict(answer.settings),
                "why": answer.why.removeprefix("; "),
            }
            for answer in conversion.answers
        ],
        "notes": list(conversion.notes),
    }
