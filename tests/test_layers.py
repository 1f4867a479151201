"""Imports run downwards only: a layer knows those below it, never those above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = "spectune"

LEVELS = {
    "weights": 1,
    "factor": 2,
    "rebuilding": 3,
    "model": 4,
    "training": 5,
    "sample": 6,
    "api": 7,
    "apps": 8,
}
# errors.py stands below all layers, `python -m spectune` above them. The package itself hands out what api.py
# has, but imports nothing before it is asked for: to others it is nothing more than a name.
BOTTOM, TOP = 0, 9
FILES_WITH_A_LEVEL = {"api"}

STRANGERS = {("sample", "training"), ("training", "sample")}
TENSORS_ONLY = ("weights", "factor", "rebuilding")
KEPT_OUT_OF_TENSORS = {"diffusers", "transformers", "accelerate", "peft", "gradio", "typer", "rich"}


def level(module: str) -> int:
    """Level of a module of the package, given by its dotted name."""
    layer = layer_of(module)
    return TOP if layer == "__main__" else LEVELS.get(layer, BOTTOM)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(source: str, module: str, *, is_package: bool) -> set[str]:
    """Dotted names of all that a module imports, also inside functions and for type checkers only."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from spectune import weights` imports a layer: the name counts as much as the module.
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports and should not, one line each."""
    layer = layer_of(module)
    own_level = TOP if module == PACKAGE else level(module)
    problems: list[str] = []
    for name in sorted(imports_of(source, module, is_package=is_package)):
        top = name.split(".")[0]
        if top == PACKAGE and level(name) > own_level:
            problems.append(f"{module} imports {name}, which stands above it")
        elif top == PACKAGE and (layer, layer_of(name)) in STRANGERS:
            problems.append(f"{module} imports {name}: {layer} and {layer_of(name)} do not know each other")
        elif layer in TENSORS_ONLY and top in KEPT_OUT_OF_TENSORS:
            problems.append(f"{module} imports {top}, which {layer} does without")
    return problems


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((SRC / PACKAGE).rglob("*.py"))


def test_every_folder_of_the_package_has_a_level() -> None:
    folders = {path.relative_to(SRC / PACKAGE).parts[0] for path in FILES if path.parent != SRC / PACKAGE}
    assert folders == set(LEVELS) - FILES_WITH_A_LEVEL


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == []


def test_the_tensor_layers_load_without_the_libraries_they_do_without() -> None:
    """The same as above for what their imports import in turn."""
    modules = [module_name(path) for path in FILES if layer_of(module_name(path)) in TENSORS_ONLY]
    code = f"import sys, {', '.join(modules)}; print(*sorted({KEPT_OUT_OF_TENSORS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spectune.weights.reader", "from spectune.factor.svd import top_singular"),
        ("spectune.weights.reader", "import spectune.rebuilding.merge as merge"),
        ("spectune.factor.svd", "from spectune import model"),
        ("spectune.factor.svd", "from ..apps import cli"),
        ("spectune.rebuilding.merge", "def late():\n    from spectune.training import loop"),
        ("spectune.rebuilding.merge", "if TYPE_CHECKING:\n    from spectune.model.sdxl import Sdxl"),
        ("spectune.sample.generate", "from spectune.training.objective import Eps"),
        ("spectune.training.loop", "from spectune.sample import generate"),
        ("spectune.errors", "from spectune.weights.names import kohya_stem"),
        ("spectune.apps.cli", "from spectune.__main__ import main"),
        ("spectune.weights.names", "import diffusers.models"),
        ("spectune.factor.split", "from transformers import CLIPTextModel"),
        ("spectune.rebuilding.files", "import typer"),
        ("spectune.rebuilding.files", "from spectune.api import split"),
        ("spectune.api", "from spectune.apps.console import say"),
    ],
)
def test_the_checker_sees_a_violation(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spectune.weights.reader", "from spectune.errors import InputError"),
        ("spectune.weights.reader", "from .layout import Layout"),
        ("spectune.rebuilding.merge", "from spectune.factor.matrix import product"),
        (
            "spectune.apps.cli",
            "from spectune.training.loop import train\nfrom spectune.sample import generate",
        ),
        ("spectune.model.sdxl", "from diffusers import AutoencoderKL"),
        ("spectune.__main__", "from spectune.apps.cli import main"),
        ("spectune.apps.cli", "from spectune import api"),
        ("spectune", "from spectune.api import split"),
    ],
)
def test_the_checker_lets_downward_imports_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_from_itself() -> None:
    assert imports_of("from .x import y", "spectune.training", is_package=True) == {"spectune.training.x.y"}
    assert imports_of("from .x import y", "spectune.training.loop", is_package=False) == {
        "spectune.training.x.y"
    }
