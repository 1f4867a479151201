"""Commands to paste after another command, with paths that cmd, PowerShell and bash read alike."""

from __future__ import annotations

from pathlib import Path

from spectune.errors import quoted
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


def _from(path: Path, folder: Path) -> Path:
    absolute = folder / path
    if not absolute.is_relative_to(folder):
        return absolute
    relative = absolute.relative_to(folder)
    return absolute if str(relative).startswith("-") else relative  # else it would be an option
