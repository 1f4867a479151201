"""Parse kohya commands, pasted or in a script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from spectune.errors import InputError, did_you_mean, printable

SCRIPTS = ("sdxl_train_network.py", "sdxl_train.py")
LAUNCHER = "accelerate launch"
SECRETS = ("wandb_api_key", "huggingface_token")

# Limits on foreign text. sd-scripts has about 300 flags, and cmd.exe accepts lines of 8191 characters.
LONGEST_TEXT = 400_000
LONGEST_VARIABLE = 32_767
MOST_LINES = 10_000
MOST_WORDS_OF_TEXT = 20_000  # prose around a command included
MOST_WORDS = 500
_CONTROL = ("Cc", "Cs")  # control characters and lone surrogates


@dataclass(frozen=True)
class Flag:
    """A flag of a command with its values; a switch has no values."""

    name: str
    values: tuple[str, ...] = ()
    parent: str | None = None  # LAUNCHER, or the flag that this is an argument of, such as network_args
    is_default: bool = False  # a default of sd-scripts, not a flag of the command

    def __str__(self) -> str:
        value = "***" if self.name in SECRETS else printable(" ".join(self.values))
        joined = f"{self.name}={value}" if self.values else self.name
        shown = f"--{joined}"
        if self.parent == LAUNCHER:
            shown = f"{LAUNCHER} --{joined}"
        elif self.parent:
            shown = f"--{self.parent} {joined}"
        return f"{shown} (default)" if self.is_default else shown


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _CONTROL and char not in "\t\r\n"


@dataclass(frozen=True)
class Dataset:
    """The images of a --dataset_config."""

    sets: tuple[dict[str, Any], ...]  # the tables [[data.sets]]
    problems: tuple[tuple[Flag, str], ...]  # settings without counterpart, with the reason


@dataclass(frozen=True)
class Command:
    """A training command: its script and its flags."""

    script: str  # one of SCRIPTS
    flags: tuple[Flag, ...]
    launcher: tuple[Flag, ...] = ()  # flags of `accelerate launch`
    notes: tuple[str, ...] = ()  # parts of the text that were dropped
    is_complete: bool = True  # False for settings that may name no model, such as a preset
    dataset: Dataset | None = None  # the content of the --dataset_config

    def has(self, name: str) -> bool:
        return any(flag.name == name for flag in self.flags)

    def values(self, name: str) -> tuple[str, ...]:
        """Return the values of a flag, or () if it is missing. The last occurrence counts, as in argparse."""
        return next((flag.values for flag in reversed(self.flags) if flag.name == name), ())

    def value(self, name: str) -> str | None:
        return next(iter(self.values(name)), None)


def check_flags(command: Command) -> None:
    """Raise InputError if `command` has too many flags or values, or a value contains a control character."""
    words = sum(1 + len(flag.values) for flag in (*command.flags, *command.launcher))
    if words > MOST_WORDS:
        raise InputError(f"expected at most {MOST_WORDS} flags and values, found {words:,}")
    for flag in (*command.flags, *command.launcher):
        for text in (flag.name, *flag.values):
            if odd := next(filter(_is_control, text), ""):
                raise InputError(
                    f"--{printable(flag.name, 60)} contains the control character U+{ord(odd):04X}",
                    hint="remove it; settings and paths are plain text",
                )


# ---------------------------------------------------------------- lines

_COMMENT = re.compile(r"\s*(?:rem\b|::|#|@?echo\b)", re.IGNORECASE)
# line continuations: the caret of cmd, the backslash of bash, the backtick of PowerShell
_CONTINUED = re.compile(r"(?<!\S)[\^\\`]\s*$")
_NAMES_SCRIPT = re.compile(r"train[\w-]{0,60}\.py", re.IGNORECASE)  # bounded: the time stays linear
_SET = re.compile(r'\s*@?set\s+"?(?P<name>\w+)=(?P<value>.*)', re.IGNORECASE)
_ASSIGNED = re.compile(r"\s*(?:export\s+)?\$?(?P<name>\w+)\s*=\s*(?P<value>.*)")
# Word processors and web pages replace plain quotes and double hyphens with these.
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "„": '"', "\u00a0": " ", "\ufeff": None})

# A space in a PowerShell variable. PowerShell does not split such a value into words.
_PROTECTED_SPACE = "\ue000"


def logical_lines(text: str) -> list[str]:
    """Return each command of `text` as one line, with comments removed and variables substituted."""
    _check_size(text)
    text = re.sub(r"(?<!\S)[—–]-?(?=[a-z])", "--", text.translate(_TYPOGRAPHY))
    lines: list[list[str]] = []
    names_script = False  # whether the last line names a script
    variables: dict[str, str] = {}
    continued = False
    for raw in text.splitlines():
        if not raw.strip() or _COMMENT.match(raw):
            continue
        assigned = None if continued else _assignment(raw)
        if assigned is not None:
            name, text = assigned
            if not text.startswith(("[", "@(")):  # PowerShell lists, not text
                value = _substitute(text, variables, longest=LONGEST_VARIABLE)
                is_powershell = raw.lstrip().startswith("$")
                variables[name] = value.replace(" ", _PROTECTED_SPACE) if is_powershell else value
            continue
        line = _substitute(_CONTINUED.sub("", raw), variables)
        # The last line of a command may end with a continuation sign.
        starts_command = names_script and _NAMES_SCRIPT.search(line) is not None
        if lines and not starts_command and (continued or raw.lstrip().startswith("--")):
            lines[-1].append(line)
            names_script = names_script or _NAMES_SCRIPT.search(line) is not None
        else:
            lines.append([line])
            names_script = _NAMES_SCRIPT.search(line) is not None
        continued = _CONTINUED.search(raw) is not None
    return [" ".join(parts) for parts in lines]


def _check_size(text: str) -> None:
    """Raise InputError for a text that is too long to be a script. Reading it would take seconds."""
    limits = {"characters": LONGEST_TEXT, "lines": MOST_LINES, "words": MOST_WORDS_OF_TEXT}
    found = {"characters": len(text), "lines": text.count("\n"), "words": len(text.split())}
    for unit, limit in limits.items():
        if found[unit] > limit:
            raise InputError(f"expected at most {limit:,} {unit}, found {found[unit]:,}: this is no command")


def _assignment(line: str) -> tuple[str, str] | None:
    """Return the name and the text of an assignment in cmd, bash or PowerShell, else None."""
    if match := _SET.fullmatch(line):
        return match["name"], match["value"].rstrip().removesuffix('"')
    if match := _ASSIGNED.fullmatch(line):
        text = match["value"].strip()
        end = text.find(text[0], 1) if text[:1] in ("'", '"') else -1
        if end > 0 and text[end + 1 :].lstrip()[:1] in ("", "#"):
            return match["name"], text[1:end]
        return match["name"], text.partition("#")[0].rstrip()
    return None


def _substitute(text: str, variables: dict[str, str], *, longest: int = LONGEST_TEXT) -> str:
    total = len(text)

    def value(match: re.Match[str]) -> str:
        nonlocal total
        name = next(group for group in match.groups() if group)
        found = variables.get(name, match[0])
        total += len(found)
        if total > longest:
            raise InputError(
                f"the variable {printable(name, 60)} makes a line longer than {longest:,} characters",
                hint="paste the command with the values in place of the variables",
            )
        return found

    return re.sub(r"%(\w+)%|!(\w+)!|\$\{(\w+)\}|\$(\w+)", value, text)


# ---------------------------------------------------------------- words

_PIECE = r"""(?P<space>\s+) | "(?P<double>{inside}*)" | (?<![^\s=])'(?P<single>[^']*)'
    | (?P<open>") | (?P<plain>(?:[^\s"'\\]+|{backslash}|(?<=[^\s=])')+|')"""
# On Windows a backslash is part of a path. In a Unix shell it escapes the next character.
_WINDOWS = re.compile(_PIECE.format(inside='[^"]', backslash=r"\\"), re.VERBOSE)
_UNIX = re.compile(_PIECE.format(inside=r'(?:\\["\\]|[^"])', backslash=r"""\\[ "'\\]?"""), re.VERBOSE)


def split_words(line: str) -> list[str]:
    """Split a command line into words and remove the quotes.

    Raises:
        InputError: A quote is not closed.
    """
    windows = re.search(r"[A-Za-z]:\\|\\\\\w", line) is not None
    words: list[str] = []
    word: list[str] | None = None  # the pieces of the current word
    for piece in (_WINDOWS if windows else _UNIX).finditer(line):
        if piece["open"]:
            raise InputError(
                f"a quote is not closed: {line[piece.start() : piece.start() + 60]}",
                hint="paste the complete command, or save it as a .txt file and pass that file",
            )
        if piece["space"]:
            words += [] if word is None else ["".join(word)]
            word = None
            continue
        text = next(part for part in (piece["double"], piece["single"], piece["plain"]) if part is not None)
        escaped = not windows and piece["single"] is None
        word = [] if word is None else word
        word.append(re.sub(r"""\\([ "'\\])""", r"\1", text) if escaped else text)
    words += [] if word is None else ["".join(word)]
    return [done.replace(_PROTECTED_SPACE, " ") for done in words]


def group_flags(words: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """Return the flags in `words` with their values, and any prose after a trailing caret."""
    grouped: list[tuple[str, list[str]]] = []
    prose: list[str] = []
    in_prose = False
    for word in words:
        if word in ("^", "`", "\\"):  # a continuation sign that lost its line break
            continue
        bare = word.lstrip("^") if word.startswith("^-") else word
        if re.match(r"--[A-Za-z]", bare):
            name, equals, value = bare[2:].partition("=")
            grouped.append((name.replace("-", "_"), [value] if equals else []))
            in_prose = False
        elif in_prose or word.startswith("^"):
            in_prose = True
            prose.append(word.lstrip("^"))
        elif grouped:
            grouped[-1][1].append(word)
    return [Flag(name, tuple(values)) for name, values in grouped], prose


# ---------------------------------------------------------------- the command

_SHELL = ("&&", "||", "&", "|", ";", ">", ">>")
_SCRIPT = re.compile(r"[\w-]*train[\w-]*\.py", re.IGNORECASE)


def parse_command(text: str) -> Command:
    """Return the one training command in `text`.

    Raises:
        InputError: `text` contains no command, several commands, or a script that does not train SDXL.
    """
    commands = list(_commands(text))
    if len(commands) > 1:
        raise InputError(
            f"expected one training command, found {len(commands)}: "
            f"{', '.join(command.script for command in commands)}",
            hint="import one command at a time; each needs its own recipe",
        )
    if not commands:
        raise InputError(
            "no training command: found neither a script such as sdxl_train_network.py nor flags with --",
            hint="paste the command in single quotes, or pass its .bat, .sh, .toml or .json file",
        )
    return commands[0]


def _commands(text: str) -> Iterator[Command]:
    lines = [words for line in logical_lines(text) if (words := _training_words(split_words(line)))]
    for words in lines:
        place = next((i for i, word in enumerate(words) if _script_name(word)), None)
        if place is not None:
            yield _command(_known_script(words[place]), words[place + 1 :], words[:place])
    if not any(_script_name(word) for words in lines for word in words):
        # Flags without a script, from the middle of a file or a forum post.
        yield from (_command(SCRIPTS[0], words) for words in lines if words[0].startswith("--"))


def _training_words(words: list[str]) -> list[str]:
    """Return the command with a training script among commands joined by `&&` etc., or the last command."""
    start = 0
    for place, word in enumerate(words):
        if word in _SHELL:
            if any(map(_script_name, words[start:place])):
                return words[start:place]
            start = place + 1
    return words[start:]


def _script_name(word: str) -> str | None:
    name = PureWindowsPath(word).name  # accepts both kinds of slashes
    return name if len(name) < 100 and _SCRIPT.fullmatch(name) else None


def _known_script(word: str) -> str:
    name = _script_name(word)
    assert name is not None
    if name not in SCRIPTS:
        raise InputError(
            f"expected {' or '.join(SCRIPTS)}, found {name}{did_you_mean(name, SCRIPTS)}",
            hint="spectune trains SDXL only; import a command of one of these two scripts",
        )
    return name


def _command(script: str, words: Sequence[str], launcher: Sequence[str] = ()) -> Command:
    flags, prose = group_flags(words)
    notes = [f"dropped text after the command: {printable(' '.join(prose))}"] if prose else []
    return Command(script, tuple(flags), tuple(group_flags(launcher)[0]), tuple(notes))
