"""The table of docs/reference/files.md: what each command does with each kind of file.

`python -m tests.file_kinds.table` writes it, in several minutes; with names of kinds or commands, it runs
only these. tests/test_file_kinds.py compares it.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from docs.generate import DOCS
from spectune.cli.app import run
from spectune.files.source import MemorySource
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import hints_metadata
from tests.file_kinds.adapters import ADAPTERS, Model
from tests.file_kinds.checkpoints import CHECKPOINTS, save
from tests.layouts import TINY, build_modules
from tests.sample_adapters import pairs

PAGE = DOCS / "reference/files.md"
MARKER = "<!-- Generated below this line by `python -m tests.file_kinds.table`. -->\n"
WORKS = "works"
_DRAW = ["-c", "a cat", "--steps", "1", "--size", "32", "--cfg", "1"]
Arguments = Callable[["Bench", Path, Path], Sequence[str | Path]]  # bench, file, empty folder for outputs

CHECKPOINT_COMMANDS: Mapping[str, Arguments] = {
    "inspect": lambda bench, file, out: ["inspect", file],
    "split": lambda bench, file, out: ["split", file, "--rank", "2", "-o", out / "split"],
    "rebuild": lambda bench, file, out: ["rebuild", file, bench.lora, *_to(out)],
    "export": lambda bench, file, out: ["export", bench.base, file, "--rank", "2", *_to(out)],
    "slice": lambda bench, file, out: [
        "slice", f"{file}:unet", f"{bench.base}:te", f"{bench.base}:vae", *_to(out)
    ],
    "convert": lambda bench, file, out: ["convert", file, *_to(out)],
    "null": lambda bench, file, out: ["null", file, *_to(out)],
    "merge": lambda bench, file, out: ["merge", f"{file}:0.5", f"{bench.base}:0.5", *_to(out)],
    "new": lambda bench, file, out: [
        "new", file, bench.pictures, "--yes", "--vram", "12GB", "-o", out / "r.toml"
    ],
    "train": lambda bench, file, out: ["train", bench.recipe(out, base=file)],
    "sample": lambda bench, file, out: ["sample", file, *_DRAW, "-o", out],
}  # fmt: skip
ADAPTER_COMMANDS: Mapping[str, Arguments] = {
    "inspect": CHECKPOINT_COMMANDS["inspect"],
    "rebuild": lambda bench, file, out: ["rebuild", bench.base, file, *_to(out)],
    "export": CHECKPOINT_COMMANDS["export"],
    "slice": lambda bench, file, out: ["slice", f"{file}:unet", "--base", bench.base, *_to(out)],
    "convert": lambda bench, file, out: ["convert", file, "--base", bench.base, *_to(out)],
    "sample": lambda bench, file, out: ["sample", bench.base, file, *_DRAW, "-o", out],
    "train": lambda bench, file, out: ["train", bench.recipe(out, base=bench.base, principal=file)],
}


def _to(out: Path) -> tuple[str, Path]:
    return "-o", out / "out.safetensors"


@dataclass
class Bench:
    """A folder with a base, its pictures, and files of each kind, which are written when they are used."""

    folder: Path
    tensors: Mapping[str, Tensor]
    files: dict[str, Path] = field(default_factory=dict[str, Path])

    @cached_property
    def base(self) -> Path:
        return save(self.tensors, self.folder / "base.safetensors")

    @cached_property
    def model(self) -> Model:
        source = MemorySource(self.tensors, hints_metadata(TINY))
        return Model(self.tensors, build_catalogue(source, all_layers=True))

    @cached_property
    def lora(self) -> Path:
        return save(pairs(self.model.attention), self.folder / "lora.safetensors")

    @cached_property
    def pictures(self) -> Path:
        folder = self.folder / "pictures/1_cat"
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), "teal").save(folder / "a.png")
        return folder.parent

    def recipe(self, out: Path, *, base: Path, principal: Path | None = None) -> Path:
        frame = "rank = 2" if principal is None else f'principal = "{principal.as_posix()}"'
        (out / "recipe.toml").write_text(
            f'[model]\nbase = "{base.as_posix()}"\n{frame}\nparts = ["unet"]\n'
            f'[data]\nfolders = ["{self.pictures.as_posix()}"]\nresolution_px = 32\n'
            f'[run]\nname = "a"\noutput = "{(out / "run").as_posix()}"\nsteps = 1\nbatch = 1\n'
            'device = "cpu"\n'
        )
        return out / "recipe.toml"

    def file(self, kind: str) -> Path:
        if kind not in self.files:
            folder = self.folder / f"{len(self.files)}"
            folder.mkdir(exist_ok=True)
            torch.manual_seed(0)
            if kind in CHECKPOINTS:
                self.files[kind] = CHECKPOINTS[kind](self.tensors, folder)
            else:
                self.files[kind] = ADAPTERS[kind](self.model, folder)
        return self.files[kind]

    def cell(self, kind: str, command: str) -> str:
        """Run a command on a kind of file; return "works", or the first line of its error."""
        arguments = (CHECKPOINT_COMMANDS if kind in CHECKPOINTS else ADAPTER_COMMANDS)[command]
        file, printed = self.file(kind), io.StringIO()
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as out,
            redirect_stdout(io.StringIO()),
            redirect_stderr(printed),
        ):
            code = run([str(word) for word in arguments(self, file, Path(out))])
        if not code:
            return WORKS
        error = re.search(r"^error: (.*)$", printed.getvalue(), flags=re.MULTILINE)
        assert code == 2, f"{command} of {kind}: exit code {code}"
        assert error is not None, f"{command} of {kind}: {printed.getvalue()}"
        return _generic(error[1], file)


def _generic(message: str, file: Path) -> str:
    """Return a message with FILE for the name of the file, and without tensor names beyond the first."""
    for name in (str(file), file.name):
        message = message.replace(name, "FILE")
    message = message.replace("|", "\\|")
    return message if len(message) <= 200 else f"{message[:197]}..."


def generated_part(bench: Bench, kept: Mapping[tuple[str, str], str]) -> str:
    """Run every command on every kind of file, except `kept`; return the tables and their errors."""
    errors: dict[str, int] = {}

    def table(title: str, kinds: Iterable[str], commands: Sequence[str]) -> str:
        rows = [[title, *(f"`{command}`" for command in commands)], ["---"] * (len(commands) + 1)]
        for kind in kinds:
            cells = [kept.get((kind, command)) or bench.cell(kind, command) for command in commands]
            found = [c if c == WORKS else f"error {errors.setdefault(c, len(errors) + 1)}" for c in cells]
            rows.append([kind, *found])
            print(kind, *found, file=sys.stderr)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    parts = [
        table("kind of checkpoint", CHECKPOINTS, list(CHECKPOINT_COMMANDS)),
        table("kind of adapter", ADAPTERS, list(ADAPTER_COMMANDS)),
        "\n".join(
            ["| error | message |", "| --- | --- |", *(f"| {n} | {text} |" for text, n in errors.items())]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def documented() -> dict[tuple[str, str], str]:
    """Return the cells of the page: (kind, command) -> "works", or the message of the error."""
    text = PAGE.read_text(encoding="utf-8").partition(MARKER)[2].strip()
    if not text:
        return {}
    tables = [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()]
        for table in text.split("\n\n")
    ]
    errors = {f"error {number}": message for number, message in tables[-1][2:]}
    return {
        (row[0], command.strip("`")): errors.get(cell, cell)
        for table in tables[:-1]
        for row in table[2:]
        for command, cell in zip(table[0][1:], row[1:], strict=True)
    }


def main(kinds: Collection[str] = (*CHECKPOINTS, *ADAPTERS), commands: Collection[str] = ()) -> None:
    """Write the tables of the page: run these kinds and commands (empty: all), keep the other cells."""
    kept = {
        (kind, command): text
        for (kind, command), text in documented().items()
        if kind not in kinds or (commands and command not in commands)
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        single = build_modules(TINY).single_file()
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in single.items()}
        text = generated_part(Bench(Path(folder), tensors), kept)
    above = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    PAGE.write_text(f"{above}{MARKER}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    named = sys.argv[1:]
    main([kind for kind in (*CHECKPOINTS, *ADAPTERS) if kind in named] or (*CHECKPOINTS, *ADAPTERS),
         [command for command in CHECKPOINT_COMMANDS if command in named])  # fmt: skip
