"""Imports go only one way: a room imports rooms of a lower level, never those of a higher level."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = "spectune"

LEVELS = {
    "core": 1,
    "files": 2,
    "sdxl": 3,
    "checkpoints": 4,
    "adapters": 5,
    "model": 6,
    "pairs": 7,
    "sampling": 8,
    "training": 9,
    "interop": 10,
    "ops": 11,
    "cli": 12,
    "studio": 13,
}
# errors.py is below every room, `python -m spectune` above. The package forwards the operations, but imports
# nothing until one is used.
BOTTOM, TOP = 0, 14
MOST_FILES_PER_FOLDER = 15

INDEPENDENT = {("sampling", "training"), ("training", "sampling")}
TENSORS_ONLY = ("core", "files", "sdxl", "checkpoints", "adapters", "pairs")
KEPT_OUT_OF_TENSORS = {"diffusers", "transformers", "accelerate", "peft", "typer", "rich"}


def level(module: str) -> int:
    """Return the level of a module of the package by its dotted name."""
    layer = layer_of(module)
    return TOP if layer == "__main__" else LEVELS.get(layer, BOTTOM)


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(source: str, module: str, *, is_package: bool) -> set[str]:
    """Return the dotted names of all imports of a module, also in functions and for type checkers."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from spectune import model` imports a room: the name counts like a module
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return the forbidden imports of a module, one line each."""
    layer = layer_of(module)
    own_level = TOP if module == PACKAGE else level(module)
    problems: list[str] = []
    for name in sorted(imports_of(source, module, is_package=is_package)):
        top = name.split(".")[0]
        if top == PACKAGE and level(name) > own_level:
            problems.append(f"{module} imports {name}, which is above it")
        elif top == PACKAGE and (layer, layer_of(name)) in INDEPENDENT:
            problems.append(f"{module} imports {name}: {layer} and {layer_of(name)} must be independent")
        elif layer in TENSORS_ONLY and top in KEPT_OUT_OF_TENSORS:
            problems.append(f"{module} imports {top}, which {layer} must not load")
    return problems


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((SRC / PACKAGE).rglob("*.py"))


def test_every_folder_of_the_package_has_a_level() -> None:
    folders = {path.relative_to(SRC / PACKAGE).parts[0] for path in FILES if path.parent != SRC / PACKAGE}
    assert folders == set(LEVELS)


def test_imports_run_downwards() -> None:
    problems: list[str] = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        problems += violations(source, module_name(path), is_package=path.name == "__init__.py")
    assert problems == []


FILE_OPERATIONS = (
    "inspect",
    "null",
    "split",
    "verify",
    "rebuild",
    "export",
    "slice",
    "convert",
    "recipe_import",
)


def loaded_after(*imports: str) -> list[set[str]]:
    """Return the libraries that a Python process has loaded after each import; indirect imports count too."""
    libraries = KEPT_OUT_OF_TENSORS | {"torch"}
    show = f"; print(*sorted({libraries!r} & set(sys.modules)))"
    code = "\n".join(["import sys", *(line + show for line in imports)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.split("\n")[:-1]]


def test_tensor_rooms_and_file_operations_load_no_network_library() -> None:
    rooms = [module_name(path) for path in FILES if layer_of(module_name(path)) in TENSORS_ONLY]
    operations = [f"spectune.ops.{name}" for name in FILE_OPERATIONS]
    package, rebuild, *rest = loaded_after(
        "import spectune", "spectune.rebuild", f"import {', '.join(rooms)}", f"import {', '.join(operations)}"
    )
    assert package == set()
    assert [rebuild, *rest] == [{"torch"}] * 3


def test_help_loads_neither_torch_nor_an_operation_and_errors_in_recipes_wait_for_no_network() -> None:
    """Counting tokens needs transformers. The networks are in diffusers, which takes seconds to load."""
    shown, train, dataset = loaded_after(
        "from spectune.cli.commands import make_app; make_app()",
        "import spectune.ops.train, spectune.cli.reports.train",
        "import spectune.ops.dataset",
    )
    assert "torch" not in shown
    assert "torch" in train
    for loaded in (train, dataset):
        assert loaded & {"accelerate", "diffusers", "peft"} == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spectune.files.reader", "from spectune.sdxl.names import kohya_stem"),
        ("spectune.files.reader", "import spectune.pairs.merged as merged"),
        ("spectune.core.svd", "from spectune import model"),
        ("spectune.core.svd", "from ..cli import app"),
        ("spectune.pairs.merged", "def late():\n    from spectune.training import loop"),
        ("spectune.pairs.merged", "if TYPE_CHECKING:\n    from spectune.ops.split import SplitReport"),
        ("spectune.sampling.generate", "from spectune.training.objective.cost import Cost"),
        ("spectune.training.loop", "from spectune.sampling import generate"),
        ("spectune.errors", "from spectune.sdxl.names import kohya_stem"),
        ("spectune.cli", "from spectune.__main__ import main"),
        ("spectune.sdxl.names", "import diffusers.models"),
        ("spectune.core.split", "from transformers import CLIPTextModel"),
        ("spectune.pairs.merged", "import typer"),
        ("spectune.ops.split", "from spectune.cli.console import say"),
        ("spectune.operation", "from spectune.files.reader import Checkpoint"),
    ],
)
def test_the_checker_detects_a_violation(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spectune.files.reader", "from spectune.errors import InputError"),
        ("spectune.files.reader", "from .layout import Layout"),
        ("spectune.pairs.merged", "from spectune.core.low_rank import product"),
        ("spectune.cli", "from spectune.training.loop import train\nfrom spectune.sampling import generate"),
        ("spectune.model.network", "from diffusers import AutoencoderKL"),
        ("spectune.__main__", "from spectune.cli.app import main"),
        ("spectune.cli.app", "from spectune.ops import split"),
        ("spectune", "from spectune.ops.split import split"),
    ],
)
def test_the_checker_accepts_downward_imports(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_the_package() -> None:
    assert imports_of("from .x import y", "spectune.training", is_package=True) == {"spectune.training.x.y"}
    assert imports_of("from .x import y", "spectune.training.loop", is_package=False) == {
        "spectune.training.x.y"
    }


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Return the modules of the package that a file imports; names inside of modules are not included."""
    known = {module_name(path) for path in FILES}
    names = imports_of(source, module, is_package=is_package)
    return {name if name in known else name.rpartition(".")[0] for name in names} & known - {module}


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of import cycles, and those that import them, directly or through others."""
    left = {module: set(needs) for module, needs in graph.items()}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_there_are_no_import_cycles() -> None:
    graph = {
        module_name(path): imported_modules(
            path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py"
        )
        for path in FILES
        if path.parent != SRC / PACKAGE or path.name != "__init__.py"
    }
    assert cycles(graph) == []


def test_the_search_for_cycles_finds_a_cycle() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


def test_core_imports_only_torch() -> None:
    """The mathematics can be read, tested and reused without the other rooms."""
    allowed = {"torch", PACKAGE, *sys.stdlib_module_names}
    for path in (SRC / PACKAGE / "core").glob("*.py"):
        names = imports_of(path.read_text(encoding="utf-8"), module_name(path), is_package=False)
        assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_class_names_are_unique_in_the_package() -> None:
    """A search for a class finds one definition."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module_name(path))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_folders_have_at_most_fifteen_files() -> None:
    folders = {path.parent for path in FILES} - {SRC / PACKAGE}
    counts = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MOST_FILES_PER_FOLDER} == {}
