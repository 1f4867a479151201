"""Model cards: facts from metadata and the run folder, foreign text without effect, unknown facts named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.files.reader import open_file
from spectune.ops.model_card import card_path, check_card
from spectune.ops.model_card.card import card_text
from spectune.ops.model_card.run_facts import RunFacts, run_facts
from spectune.training.callbacks.loss_table import LossRow, write_table


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a small LoRA with hostile metadata, in the folder of a run."""
    path = tmp_path / "style-step00000004.safetensors"
    metadata = {"spectune.base_hash": "ab" * 32, "spectune.base_name": "a`<b>|\x1b[31m.safetensors"}
    path.write_bytes(_empty_file(metadata))
    return path


def _empty_file(metadata: dict[str, str]) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "x": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def save_state(adapter: Path, **values: Any) -> None:
    state = {
        "step": 4,
        "images": 30,
        "base_hash": "ab" * 32,
        "recipe": {"run": {"name": "style", "output": "C:/Users"}, "model": {"rank": 8}},
    }
    folder = adapter.with_suffix(".state")
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(state | values), encoding="utf-8")


def text_of(adapter: Path, facts: RunFacts) -> str:
    with open_file(adapter) as file:
        return card_text(file, file, facts, folder=adapter.parent, weights_hash="cd" * 32)


def test_the_run_folder_gives_recipe_steps_pictures_and_previews(adapter: Path) -> None:
    save_state(adapter)
    (adapter.parent / "previews").mkdir()
    for step in (2, 4, 6):
        (adapter.parent / "previews" / f"style-step{step:08d}.png").touch()
    facts = run_facts(adapter, "ab" * 32)
    assert (facts.step, facts.images) == (4, 30)
    assert [path.name[-6:] for path in facts.previews] == ["02.png", "04.png"]
    text = text_of(adapter, facts)
    for line in ("| steps | `4` |", "| pictures | `30` |", "| model.rank | `8` |", "| losses | unknown |"):
        assert line in text.splitlines()
    assert "![preview](previews/style-step00000004.png)" in text
    assert "Users" not in text


@pytest.mark.parametrize(
    "values", [{"base_hash": "00"}, {"recipe": [1]}, {"recipe": {"run": {"name": "other"}}}]
)
def test_a_state_of_another_run_is_not_used(adapter: Path, values: dict[str, Any]) -> None:
    save_state(adapter, **values)
    assert run_facts(adapter, "ab" * 32) == RunFacts({})


def test_losses_are_those_of_the_table_up_to_the_step(adapter: Path) -> None:
    save_state(adapter)
    rows = [
        LossRow(0, validation_loss=0.5),
        LossRow(2, loss=0.25),
        LossRow(4, loss=0.75),
        LossRow(4, validation_loss=0.25),
    ]
    write_table([*rows, LossRow(6, loss=9.0)], adapter.parent / "style-loss.csv")
    assert run_facts(adapter, "ab" * 32).losses == (
        ("validation loss, first", 0.5),
        ("validation loss, last", 0.25),
        ("training loss, mean of the last 2 values", 0.5),
    )
    (adapter.parent / "style-loss.csv").write_text("another table\n1\n")
    assert run_facts(adapter, "ab" * 32).losses == ()


def test_unknown_facts_are_named_and_foreign_text_has_no_effect(adapter: Path) -> None:
    text = text_of(adapter, RunFacts({}))
    assert "| base | `a'<b>/\N{REPLACEMENT CHARACTER}[31m.safetensors` |" in text
    assert "| steps | unknown |" in text
    assert "license: unknown" in text.splitlines()[:3]
    assert "\x1b" not in text


def test_a_card_is_not_overwritten(tmp_path: Path) -> None:
    assert card_path(Path("a/x.safetensors.index.json")) == Path("a/x.md")
    assert card_path(Path("a/folder")) == Path("a/folder/README.md")
    (tmp_path / "x.md").touch()
    with pytest.raises(InputError, match="exists"):
        check_card(tmp_path / "x.safetensors", force=False)
    check_card(tmp_path / "x.safetensors", force=True)
