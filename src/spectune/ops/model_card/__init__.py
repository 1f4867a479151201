"""Write a model card: a Markdown page beside a model, with what its metadata and its run folder record.

* card: the page.
* run_facts: the recipe, steps, losses and previews of the run that made an adapter.
"""

from __future__ import annotations

from pathlib import Path

from spectune.checkpoints.open import open_checkpoint
from spectune.files.rename import replace_text
from spectune.files.writer import check_target
from spectune.ops.model_card.card import card_text
from spectune.ops.model_card.run_facts import run_facts


def card_path(model: Path) -> Path:
    """Return the path of the card: `style.md` beside `style.safetensors`, README.md in a diffusers folder."""
    name = model.name.removesuffix(".index.json").removesuffix(".safetensors")
    return model / "README.md" if name == model.name else model.with_name(f"{name}.md")


def check_card(model: Path, *, force: bool) -> None:
    """Raise InputError if the card of `model` exists and `force` is off."""
    card = card_path(model)
    if card.exists():
        check_target(card, 0, force=force)


def write_card(model: Path, made_from: Path, weights_hash: str) -> Path:
    """Write the card of `model` and return its path. `made_from` is the adapter or checkpoint of the user."""
    target = card_path(model)
    with open_checkpoint(model) as written, open_checkpoint(made_from) as source:
        facts = run_facts(made_from, source.provenance.base_hash)
        text = card_text(written, source, facts, folder=target.parent, weights_hash=weights_hash)
    replace_text(target, text)
    return target
