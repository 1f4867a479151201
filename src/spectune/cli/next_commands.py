"""Commands to paste after another command, with paths that cmd, PowerShell and bash read alike."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from spectune.training.recipe.recipe import Recipe


def commands_after_training(recipe: Recipe, *, folder: Path | None = None) -> list[str]:
    """Return the commands that turn the result of a recipe into a checkpoint, a LoRA and pictures.

    Args:
        recipe: A recipe whose training is finished.
        folder: The working directory, to which paths are relative where possible.
    """
    output, name = recipe.run.output, recipe.run.name
    base, tuned, checkpoint, lora, pictures = (
        quoted(_from(path, folder or Path.cwd()))
        for path in (
            recipe.model.checkpoint,
            output / f"{name}.safetensors",
            output / f"{name}-checkpoint.safetensors",
            output / f"{name}-lora.safetensors",
            output / f"{name}-pictures",
        )
    )
    size = recipe.data.resolution_px
    return [
        f"spectune rebuild {base} {tuned} -o {checkpoint}",
        f"spectune export {base} {tuned} -o {lora}",
        f'spectune sample {base} {tuned} -c "a picture" --size {size} -o {pictures}',
    ]


def quoted(path: Path, *, windows: bool = os.name == "nt") -> str:
    """Return a path as one argument of cmd, PowerShell and bash.

    Double quotes do in all three, except around `$`, a backtick or `!`. cmd has no other quotes, so these
    characters get single quotes only on systems without it.
    """
    text = path.as_posix()  # Windows accepts / and bash needs it
    if re.fullmatch(r"[\w./:][\w./:-]*", text, flags=re.ASCII):
        return text
    if windows or not re.search(r'[$`!"\\]', text):
        return f'"{text}"'
    return shlex.quote(text)


def _from(path: Path, folder: Path) -> Path:
    absolute = folder / path
    if not absolute.is_relative_to(folder):
        return absolute
    relative = absolute.relative_to(folder)
    return absolute if str(relative).startswith("-") else relative  # else it would be an option
