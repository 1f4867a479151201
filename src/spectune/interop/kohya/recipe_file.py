"""Write an imported recipe as TOML, with a comment that names the source of each value."""

from __future__ import annotations

from collections.abc import Iterator

from spectune.interop.kohya.importer import ImportedRecipe
from spectune.training.recipe.commented import commented_recipe, one_line

_RESIDUAL = """\
The pair of the guide: the diff model is the residual, the extract is the principal. To train without the
rounding of the pair, use the original instead of the diff model:
  base = "original.safetensors"     (and no `residual`)
  form = "delta"                    (keep `principal`)"""
_BASE = """\
The frame is computed from the base when training starts. To compute it only once, run `spectune split`:
  principal = "base.principal-r64.safetensors"     (and no `rank`)"""
_VAE = """\
A VAE file does not declare the scaling of its latents. For a known VAE add name = "eq-kblueleaf" or
"eq-anzhc"; for any other add scale, shift and padding."""


def recipe_text(imported: ImportedRecipe, *, command: str) -> str:
    """Return the text of the recipe. Its first line is `command`, which runs it."""
    is_pair = any(setting.key == "model.residual" for setting in imported.settings)
    return commented_recipe(
        imported.settings,
        head=f"{command}\nWritten by `spectune recipe import`. The comment of each value names its flag.",
        remarks={"model": _RESIDUAL if is_pair else _BASE, "vae": _VAE},
        tail=list(_left_out(imported)),
    )


def _left_out(imported: ImportedRecipe) -> Iterator[str]:
    """Yield a list of the flags that set no key, for each reason."""
    for heading, verdicts in (("Ignored", ("ignored",)), ("Not supported", ("unsupported", "unknown"))):
        lines = [f"  {one_line(str(result))}" for result in imported.results if result.verdict in verdicts]
        if lines:
            yield "\n".join([f"{heading}:", *lines])
