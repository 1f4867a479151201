"""Fixtures: a fake ComfyUI with the tiny SDXL in its checkpoints folder and the nodes loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui_nodes.fakes import NODES, ROOT, Comfy, forget_package, install, load_package
from tests.sample_pairs import saved_tuned, small_split, tuned_from

BASE = "tiny.safetensors"


@pytest.fixture
def comfy(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comfy]:
    fake = Comfy(tmp_path)
    shutil.copy(tiny_checkpoint, fake.folders["checkpoints"] / BASE)
    install(fake, monkeypatch)
    fake.nodes = load_package(ROOT / "comfyui_nodes", NODES)
    yield fake
    forget_package(NODES)


@pytest.fixture(scope="session")
def tuned_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tuned adapter of the tiny SDXL with random changes of all default layers (flow, shift 2.5)."""
    folder = tmp_path_factory.mktemp("tuned")
    report = small_split(tiny_checkpoint, folder)
    return saved_tuned(tuned_from(tiny_checkpoint, report, size=0.05), folder / "tuned.safetensors")
