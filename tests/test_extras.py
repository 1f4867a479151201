"""Test the split of the dependencies: what works without an extra, and what the error says."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dev
from spectune import extras
from spectune.errors import InputError
from spectune.extras import EXTRA_OF, check_version, extras_named

FILE_COMMANDS = ["inspect", "split", "verify", "null", "merge", "export", "slice", "convert", "rebuild"]


@pytest.mark.slow
def test_the_core_is_enough_for_the_nodes_and_the_commands_on_files(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_checkpoint, tmp_path / "base.safetensors")
    path = f"sys.path[:0] = [{str(dev.ROOT)!r}, {str(dev.ROOT / 'src')!r}]"
    code = f"import sys; {path}; from tests.without_extras import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    nodes, *lines, blocked = done.stdout.splitlines() or [""]
    assert (nodes, lines) == (
        "nodes 6",
        [*(f"{name} 0" for name in FILE_COMMANDS), "sample 2", "inspect 2"],
    ), done.stderr[-3000:]
    assert {"diffusers", "transformers", "accelerate", "PIL", "matplotlib"} <= set(blocked.split())
    sample, plot = done.stderr.split("error: ")[1:]
    assert sample == 'this needs PIL, which is not installed\nhint: pip install "spectune[train]"\n'
    assert "this needs matplotlib, which is not installed\n" in plot


def test_every_package_of_an_extra_is_in_the_table_of_modules() -> None:
    """Packages that are not installed here are skipped."""
    project = tomllib.loads((dev.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules: dict[str, set[str]] = {}
    for module, names in packages_distributions().items():
        for name in names:
            modules.setdefault(canonicalize_name(name), set()).add(module)
    for extra in set(EXTRA_OF.values()):
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            found = modules.get(canonicalize_name(requirement.name), set())
            if requirement.name == "spectune":  # an extra that includes another one
                continue
            assert not found or extra in {EXTRA_OF.get(module) for module in found}, requirement


def test_other_missing_modules_are_not_explained() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_of_ours"), extras_named():
        import nothing_of_ours  # noqa: F401  # pyright: ignore[reportMissingImports]
    match = "the optimizer needs lion_pytorch, which"
    with pytest.raises(InputError, match=match) as caught, extras_named("the optimizer"):
        raise ModuleNotFoundError("No module named 'lion_pytorch.x'", name="lion_pytorch.x")
    assert caught.value.hint == 'pip install "spectune[train]"'


def test_a_package_of_another_program_in_the_wrong_version_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["torch>=2.4", 'transformers>=5.8,<6; extra == "train"']
    monkeypatch.setattr(extras, "requires", lambda name: lines)
    monkeypatch.setattr(extras, "version", lambda name: "4.57.6")
    with pytest.raises(
        InputError, match=r"transformers 4\.57\.6 is installed: this needs transformers<6,>=5\.8"
    ):
        check_version("transformers", "train")
    monkeypatch.setattr(extras, "version", lambda name: "5.23.0")
    check_version("transformers", "train")
