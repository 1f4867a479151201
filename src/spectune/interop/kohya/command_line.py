"""A kohya command as people paste it, or the script that holds it, taken apart into its flags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath

from spectune.errors import InputError, did_you_mean

SCRIPTS = ("sdxl_train_network.py", "sdxl_train.py")
LAUNCHER = "accelerate launch"
SECRETS = ("wandb_api_key", "huggingface_token")


@dataclass(frozen=True)
class Given:
    """A flag as it was given; a switch has no values."""

    name: str
    values: tuple[str, ...] = ()
    within: str | None = None  # LAUNCHER, or the flag whose value this is a part of, such as network_args
    implied: bool = False  # not given: the default of sd-scripts

    def __str__(self) -> str:
        value = "***" if self.name in SECRETS else " ".join(self.values)
        joined = f"{self.name}={value}" if self.values else self.name
        shown = f"--{joined}"
        if self.within == LAUNCHER:
            shown = f"{LAUNCHER} --{joined}"
        elif self.within:
            shown = f"--{self.within} {joined}"
        return f"{shown} (not given)" if self.implied else shown


@dataclass(frozen=True)
class Command:
    script: str  # one of SCRIPTS
    flags: tuple[Given, ...]
    launcher: tuple[Given, ...] = ()  # of `accelerate launch`
    notes: tuple[str, ...] = ()  # what of the text was left out

    def has(self, name: str) -> bool:
        return any(given.name == name for given in self.flags)

    def values(self, name: str) -> tuple[str, ...]:
        """The values of a flag, empty where it is not given; the last one counts, as for argparse."""
        return next((given.values for given in reversed(self.flags) if given.name == name), ())

    def value(self, name: str) -> str | None:
        return next(iter(self.values(name)), None)


# ---------------------------------------------------------------- lines

_COMMENT = re.compile(r"\s*(?:rem\b|::|#|@?echo\b)", re.IGNORECASE)
# cmd's caret, the backslash of bash and PowerShell's backtick, at the end of a line
_CONTINUED = re.compile(r"(?<!\S)[\^\\`]\s*$")
_NAMES_SCRIPT = re.compile(r"train[\w-]*\.py", re.IGNORECASE)
_ASSIGNED = (
    re.compile(r'\s*@?set\s+"?(?P<name>\w+)=(?P<value>.*?)"?\s*', re.IGNORECASE),
    re.compile(r"""\s*(?:export\s+)?\$?(?P<name>\w+)\s*=\s*(["']?)(?P<value>.*?)\2\s*(?:#.*)?"""),
)
# Word processors and web pages make these of plain quotes and of two hyphens.
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "„": '"', "\u00a0": " ", "\ufeff": None})


_HELD_SPACE = "\ue000"  # in a variable of PowerShell, which does not split a value into words


def logical_lines(text: str) -> list[str]:
    """The commands of a text, each in one line, without comments and with the variables it sets put in."""
    text = re.sub(r"(?<!\S)[—–]-?(?=[a-z])", "--", text.translate(_TYPOGRAPHY))
    lines: list[str] = []
    variables: dict[str, str] = {}
    goes_on = False
    for raw in text.splitlines():
        if not raw.strip() or _COMMENT.match(raw):
            continue
        assigned = None if goes_on else next((m for p in _ASSIGNED if (m := p.fullmatch(raw))), None)
        if assigned is not None:
            if not assigned["value"].startswith(("[", "@(")):  # PowerShell's lists are no text
                value = _filled_in(assigned["value"], variables)
                held = raw.lstrip().startswith("$")
                variables[assigned["name"]] = value.replace(" ", _HELD_SPACE) if held else value
            continue
        line = _filled_in(_CONTINUED.sub("", raw), variables)
        # the last line of a command may end as if it went on
        another = bool(lines) and all(map(_NAMES_SCRIPT.search, (lines[-1], line)))
        if lines and not another and (goes_on or raw.lstrip().startswith("--")):
            lines[-1] += " " + line
        else:
            lines.append(line)
        goes_on = _CONTINUED.search(raw) is not None
    return lines


def _filled_in(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = next(group for group in match.groups() if group)
        return variables.get(name, match[0])

    return re.sub(r"%(\w+)%|!(\w+)!|\$\{(\w+)\}|\$(\w+)", value, text)


# ---------------------------------------------------------------- words

_PIECE = r"""(?P<space>\s+) | "(?P<double>{inside}*)" | (?<![^\s=])'(?P<single>[^']*)'
    | (?P<open>") | (?P<plain>{char})"""
# A backslash of Windows is a part of a path, one of a Unix shell takes the next sign as it is.
_WINDOWS = re.compile(_PIECE.format(inside='[^"]', char="."), re.VERBOSE | re.DOTALL)
_UNIX = re.compile(_PIECE.format(inside=r'(?:\\["\\]|[^"])', char=r"""\\[ "'\\]|."""), re.VERBOSE | re.DOTALL)


def split_words(line: str) -> list[str]:
    """The words of a command line without their quotes; InputError for a quote that is not closed."""
    windows = re.search(r"[A-Za-z]:\\|\\\\\w", line) is not None
    words: list[str] = []
    word: str | None = None
    for piece in (_WINDOWS if windows else _UNIX).finditer(line):
        if piece["open"]:
            raise InputError(
                f"a quote is not closed: {line[piece.start() : piece.start() + 60]}",
                hint="paste the whole command, or save it as a .txt file and give that",
            )
        if piece["space"]:
            words += [] if word is None else [word]
            word = None
            continue
        text = next(part for part in (piece["double"], piece["single"], piece["plain"]) if part is not None)
        escaped = not windows and piece["single"] is None
        word = (word or "") + (re.sub(r"""\\([ "'\\])""", r"\1", text) if escaped else text)
    return [done.replace(_HELD_SPACE, " ") for done in [*words, *([] if word is None else [word])]]


def group_flags(words: Sequence[str]) -> tuple[list[Given], list[str]]:
    """The flags in `words` with the values behind them, and the text that a caret has let in."""
    grouped: list[tuple[str, list[str]]] = []
    prose: list[str] = []
    in_prose = False
    for word in words:
        if word in ("^", "`", "\\"):  # a continuation whose line break was lost
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
    return [Given(name, tuple(values)) for name, values in grouped], prose


# ---------------------------------------------------------------- the command

_SHELL = ("&&", "||", "&", "|", ";", ">", ">>")
_SCRIPT = re.compile(r"[\w-]*train[\w-]*\.py", re.IGNORECASE)


def parse_command(text: str) -> Command:
    """The one training command in `text`.

    Raises InputError when there is none, when there are several, and for scripts that train something else.
    """
    found = list(_commands(text))
    if len(found) > 1:
        raise InputError(
            f"{len(found)} training commands: {', '.join(command.script for command in found)}",
            hint="give one of them at a time, each has a recipe of its own",
        )
    if not found:
        raise InputError(
            "no training command: neither a script such as sdxl_train_network.py nor flags with --",
            hint="paste the command in single quotes, or give the .bat, .sh, .toml or .json file of it",
        )
    return found[0]


def _commands(text: str) -> Iterator[Command]:
    lines = [words for line in logical_lines(text) if (words := _of_one_command(split_words(line)))]
    for words in lines:
        place = next((i for i, word in enumerate(words) if _script_name(word)), None)
        if place is not None:
            yield _command(_known_script(words[place]), words[place + 1 :], words[:place])
    if not any(_script_name(word) for words in lines for word in words):
        # the flags alone, from the middle of a script or a forum post
        yield from (_command(SCRIPTS[0], words) for words in lines if words[0].startswith("--"))


def _of_one_command(words: list[str]) -> list[str]:
    """The words of the command with a script among those that `&&` and the like join, else the last one."""
    for place, word in enumerate(words):
        if word in _SHELL:
            before = words[:place]
            return before if any(map(_script_name, before)) else _of_one_command(words[place + 1 :])
    return words


def _script_name(word: str) -> str | None:
    name = PureWindowsPath(word).name  # takes both kinds of slashes
    return name if _SCRIPT.fullmatch(name) else None


def _known_script(word: str) -> str:
    name = _script_name(word)
    assert name is not None
    if name not in SCRIPTS:
        raise InputError(
            f"{name} is none of {', '.join(SCRIPTS)}{did_you_mean(name, SCRIPTS)}",
            hint="spectune trains SDXL, and imports what sdxl_train_network.py and sdxl_train.py take",
        )
    return name


def _command(script: str, words: Sequence[str], launcher: Sequence[str] = ()) -> Command:
    flags, prose = group_flags(words)
    notes = [f"left out, it follows the command: {' '.join(prose)}"] if prose else []
    return Command(script, tuple(flags), tuple(group_flags(launcher)[0]), tuple(notes))
