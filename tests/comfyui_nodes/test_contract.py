"""Test the interface that ComfyUI requires of every node, and how the nodes are loaded."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comfyui_nodes.fakes import NODES, ROOT, Comfy, forget_package, load_package

NAMES = (
    "SpectuneSplit",
    "SpectuneLoadPair",
    "SpectuneApplyDeltas",
    "SpectuneExport",
    "SpectuneSlice",
    "SpectuneSampling",
)
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN"}


def problems(node: type[Any]) -> list[str]:
    """Return the ways in which a class violates ComfyUI's interface of a node."""
    found: list[str] = []
    if not inspect.ismethod(node.INPUT_TYPES):
        return ["INPUT_TYPES is not a classmethod"]
    inputs = node.INPUT_TYPES()
    if "required" not in inputs or not set(inputs) <= {"required", "optional", "hidden"}:
        found.append(f"groups of inputs: {sorted(inputs)}")
    if not isinstance(node.RETURN_TYPES, tuple):
        found.append("RETURN_TYPES is not a tuple")
    if len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) != len(node.RETURN_TYPES):
        found.append("RETURN_NAMES and RETURN_TYPES have different lengths")
    if node.CATEGORY != "spectune":
        found.append(f"category {node.CATEGORY}")
    parameters = dict(list(inspect.signature(getattr(node, node.FUNCTION)).parameters.items())[1:])
    optional = set(inputs.get("optional", {}))
    if parameters.pop("inputs", None):  # **inputs takes the options of a record, which have defaults
        optional &= set(parameters)
    if set(parameters) != set(inputs["required"]) | optional:
        found.append(f"parameters {sorted(parameters)}")
    if optional != {name for name, param in parameters.items() if param.default is not param.empty}:
        found.append("optional inputs, and only these, need a default")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_node_has_the_interface(comfy: Comfy, name: str) -> None:
    assert problems(comfy.nodes.NODE_CLASS_MAPPINGS[name]) == []


def test_a_wrong_input_name_fails(comfy: Comfy) -> None:
    class Wrong(comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneSampling"]):
        def set(self, model: Any, fiel: str, prediction: str = "auto", shift: float = 0.0) -> None: ...

    assert problems(Wrong) == ["parameters ['fiel', 'model', 'prediction', 'shift']"]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_sockets_widgets_or_lists(comfy: Comfy, name: str) -> None:
    for group in comfy.nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES().values():
        for kind, *options in group.values():
            assert isinstance(kind, list) or kind in WIDGETS | {"MODEL", "CLIP"}
            assert all(isinstance(option, dict) for option in options)
            if isinstance(kind, list):
                assert all(isinstance(choice, str) for choice in kind)


def test_all_nodes_are_registered_with_a_title(comfy: Comfy) -> None:
    assert tuple(comfy.nodes.NODE_CLASS_MAPPINGS) == NAMES
    assert tuple(comfy.nodes.NODE_DISPLAY_NAME_MAPPINGS) == NAMES


def test_lists_contain_only_safetensors_files(comfy: Comfy) -> None:
    (comfy.folders["checkpoints"] / "old.ckpt").touch()
    inputs = comfy.nodes.NODE_CLASS_MAPPINGS["SpectuneSplit"].INPUT_TYPES()
    assert inputs["required"]["checkpoint"][0] == ["tiny.safetensors"]


def test_the_repository_loads_as_a_custom_node(comfy: Comfy) -> None:
    path = list(sys.path)
    try:
        repository = load_package(ROOT, "cloned")
        assert tuple(repository.NODE_CLASS_MAPPINGS) == NAMES
        assert tuple(repository.NODE_DISPLAY_NAME_MAPPINGS) == NAMES
        assert sys.path == path, "an installed library needs no entry in sys.path"
    finally:
        forget_package("cloned")


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "spectune" else original(name)
    )


def test_a_clone_uses_its_own_library(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    without_library(monkeypatch)
    monkeypatch.setitem(sys.modules, "cloned.comfyui_nodes", comfy.nodes)  # the nodes are loaded already
    try:
        load_package(ROOT, "cloned")
        assert sys.path == [*before, str(ROOT / "src")], "only src, not the repository"
    finally:
        forget_package("cloned")


def test_the_repository_defines_no_nodes_outside_comfyui() -> None:
    assert "folder_paths" not in sys.modules
    try:
        assert not hasattr(load_package(ROOT, "cloned"), "NODE_CLASS_MAPPINGS")
    finally:
        forget_package("cloned")


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    try:
        with pytest.raises(
            ImportError,
            match=r"does not have spectune, which the .* need\nhint: .*run `pip install spectune`",
        ):
            load_package(ROOT / "comfyui_nodes", NODES)
    finally:
        forget_package(NODES)


def test_nodes_import_each_other_relatively(comfy: Comfy) -> None:
    """Inside ComfyUI, `comfy` is ComfyUI's package."""
    own = {path.stem for path in (ROOT / "comfyui_nodes").glob("*.py")}
    for path in sorted((ROOT / "comfyui_nodes").glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and words[1].startswith("comfy"):
                assert words[1].removeprefix("comfy.") not in own, f"{Path(path).name}: {line}"
