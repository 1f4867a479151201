"""The file of preview prompts beside a new recipe, with captions of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectune.errors import counted
from spectune.files.rename import replace_text

SHOWN = 4  # prompts, from captions spread over the pictures
HEAD = """\
# A prompt per line for the previews. The file is read again before each preview.
# Options: --n negative prompt --w width --h height --d seed --l CFG --s steps
"""


def prompts_path(recipe: Path) -> Path:
    """Return the path of the prompts of a recipe."""
    return recipe.with_name(f"{recipe.stem}.prompts.txt")


def prompts_of(captions: Sequence[str]) -> list[str]:
    """Return some captions that a line of prompts can hold, spread over the pictures."""
    usable = list(dict.fromkeys(caption for caption in captions if caption and _fits(caption)))
    return usable[:: max(1, len(usable) // SHOWN)][:SHOWN]


def write_prompts(path: Path, captions: Sequence[str], *, force: bool) -> tuple[str, ...]:
    """Write the prompts, unless there is such a file; return notes."""
    lines = prompts_of(captions)
    if not lines:
        return ()
    if path.exists() and not force:
        return (f"the prompts in {path} stay as they are",)
    text = "".join(f"{line} --d {seed}\n" for seed, line in enumerate(lines, start=1))
    replace_text(path, HEAD + text)
    return (f"wrote {path} with {counted(len(lines), 'prompt')} for the previews",)


def _fits(caption: str) -> bool:
    """Return whether a caption stays the same in a file of prompts: options begin with `--`."""
    return caption.isprintable() and "--" not in caption and not caption.startswith(("#", "//"))
