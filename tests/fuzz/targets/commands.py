"""Target: command lines with wrong options, wrong values and odd characters, as a JSON list of arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import typer
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spectune.cli.app import app
from tests.fuzz import seeds
from tests.fuzz.harness import run_command
from tests.fuzz.mutation import NUMBERS, TEXTS
from tests.fuzz.targets.texts import ALL_KEYS

FILES = (
    "base.safetensors",
    "lora.safetensors",
    "recipe.toml",
    "folder",
    "missing.safetensors",
    "bad.safetensors",
)
VALUES = (
    "2",
    "0.5",
    "float16",
    "te",
    "unet",
    "lora",
    "kohya",
    "default",
    "all",
    "cpu",
    "12GB",
    "eps",
    "out.png",
)
# Valid, these take minutes or serve a page. A wrong option makes sure that they are not.
SLOW = ("demo", "doctor", "plan", "sample", "compare", "train", "new", "studio")
# A command that writes files could write them there.
FOLDERS_OUTSIDE = ("/", "..", "../..", "\\", "C:\\", "//host/share", "~")
# Valid command lines.
LINES = (
    "inspect base.safetensors --layers te1",
    "split base.safetensors --rank 2 --layers te1 --dtype float16 -o out",
    "null base.safetensors -o out.safetensors",
    "export base.safetensors lora.safetensors --rank 2 --keys kohya -o out.safetensors",
    "rebuild base.safetensors lora.safetensors --strength 0.5 -o out.safetensors",
    "slice lora.safetensors:te:0.5 --base base.safetensors -o out.safetensors",
    "merge base.safetensors:0.5 base.safetensors:te=0.5 -o out.safetensors",
    "convert lora.safetensors --base base.safetensors --keys diffusers -o out.safetensors",
    "--version",
    "slice --help",
)


class Commands:
    """Command lines."""

    name = "commands"
    is_for_bytes = False

    def seeds(self) -> Sequence[bytes]:
        return [json.dumps(line.split()).encode() for line in LINES]

    def inputs(self) -> SearchStrategy[bytes]:
        commands = _options_of_commands()

        def build(name: str, random: Random) -> bytes:
            return json.dumps(_command_line(name.split(), commands[name], random)).encode()

        random = st.randoms(use_true_random=True)
        changed = st.builds(_changed, st.sampled_from(LINES), random, st.integers(1, 2))
        return changed | st.builds(build, st.sampled_from(list(commands)), random)

    def write(self, folder: Path, data: bytes) -> None:
        arguments = json.loads(data)
        if not isinstance(arguments, list) or not all(isinstance(word, str) for word in arguments):
            raise ValueError("not a list of words")
        if arguments and arguments[0] in SLOW and arguments[1:2] != ["--no-such-option"]:
            raise ValueError("a command that may take minutes")  # made smaller by the search for small inputs
        (folder / "arguments.json").write_bytes(data)
        (folder / "base.safetensors").write_bytes(seeds.model())
        (folder / "lora.safetensors").write_bytes(seeds.lora())
        (folder / "bad.safetensors").write_bytes(b"\x10" * 30)
        (folder / "recipe.toml").write_text(ALL_KEYS)
        (folder / "folder").mkdir()

    def operate(self, folder: Path) -> None:
        run_command(self.arguments(folder))

    def arguments(self, folder: Path) -> list[str]:
        return json.loads((folder / "arguments.json").read_bytes())


def _options_of_commands() -> dict[str, list[str]]:
    """Return the option names of each command, from the application itself."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, Any]] = [("", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        if below := getattr(command, "commands", None):
            waiting += [(f"{name} {word}".strip(), one) for word, one in below.items()]
        else:
            found[name] = sorted(flag for one in command.params for flag in one.opts if flag.startswith("-"))
    return dict(sorted(found.items()))


def _changed(line: str, random: Random, count: int) -> bytes:
    """Return a valid command line with words that are replaced, extended, removed, repeated or inserted."""
    words = line.split()
    for _ in range(count):
        place = random.randrange(len(words))
        piece, separator = random.choice((*VALUES, *FILES, *[_odd(random)] * 20)), random.choice(":=,+.")
        words[place : place + 1] = random.choice(
            ([piece], [f"{words[place]}{separator}{piece}"], [], [words[place]] * 2, [words[place], piece])
        )
        words = words or [piece]
    return json.dumps(words).encode()


def _command_line(name: list[str], options: Sequence[str], random: Random) -> list[str]:
    words: list[str] = []
    for _ in range(random.randrange(3)):
        words.append(_odd(random) if random.random() < 0.2 else random.choice(FILES))
    for _ in range(random.randrange(4)):
        option = random.choice(options) if random.random() < 0.9 else f"--{_odd(random)}"
        value = _odd(random) if random.random() < 0.6 else random.choice((*VALUES, *FILES))
        words += random.choice(([option], [option, value], [f"{option}={value}"]))
    random.shuffle(words)
    if name[0] in SLOW:  # not at the end, where it could be the value of an option
        words.insert(0, "--no-such-option")
    if random.random() < 0.05:
        name = [_odd(random)]
    return [*name, *words]


def _odd(random: Random) -> str:
    odd = random.choice((*TEXTS, *NUMBERS, chr(random.randrange(1, 0x3000))))
    return "x" if odd in FOLDERS_OUTSIDE else str(odd)
