"""docs/reference/files.md has the true result of every command on every kind of file."""

from __future__ import annotations

import pytest

from spectune.files.source import MemorySource
from tests.file_kinds.adapters import ADAPTERS
from tests.file_kinds.checkpoints import CHECKPOINTS
from tests.file_kinds.table import ADAPTER_COMMANDS, CHECKPOINT_COMMANDS, Bench, documented

QUICK = ("inspect",)
TABLES = ((CHECKPOINTS, CHECKPOINT_COMMANDS), (ADAPTERS, ADAPTER_COMMANDS))


@pytest.fixture(scope="module")
def bench(source: MemorySource, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kinds"), source.values)


def test_the_page_has_a_cell_for_every_kind_and_command() -> None:
    cells = {(kind, command) for kinds, commands in TABLES for kind in kinds for command in commands}
    found = documented()
    assert set(found) == cells
    assert all(found.values())


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_do_what_the_page_says(bench: Bench, command: str) -> None:
    found = documented()
    kinds = [kind for kinds, commands in TABLES if command in commands for kind in kinds]
    assert {kind: bench.cell(kind, command) for kind in kinds} == {
        kind: found[kind, command] for kind in kinds
    }


@pytest.mark.slow
def test_all_commands_do_what_the_page_says(bench: Bench) -> None:
    expected = {key: text for key, text in documented().items() if key[1] not in QUICK}
    assert {key: bench.cell(*key) for key in expected} == expected
