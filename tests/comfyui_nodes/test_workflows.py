"""Test that the example workflows name existing nodes and inputs, and that their two forms agree."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.comfyui_nodes.fakes import ROOT, Comfy

FOLDER = ROOT / "comfyui_nodes" / "workflows"
NAMES = ("validate_split", "tuned")
# ComfyUI's own nodes that the workflows use: sockets, then widgets in their order
CORE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ((), ("ckpt_name",)),
    "CLIPTextEncode": (("clip",), ("text",)),
    "EmptyLatentImage": ((), ("width", "height", "batch_size")),
    "KSampler": (
        ("model", "positive", "negative", "latent_image"),
        ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    ),
    "VAEDecode": (("samples", "vae"), ()),
    "SaveImage": (("images",), ("filename_prefix",)),
    "ImageBlend": (("image1", "image2"), ("blend_factor", "blend_mode")),
    "PreviewImage": (("images",), ()),
    "PreviewAny": (("source",), ()),
}


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(comfy: Comfy, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sockets and widgets of a node, in order."""
    if kind in CORE:
        return CORE[kind]
    groups = comfy.nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    inputs = {**groups["required"], **groups.get("optional", {})}
    sockets = [
        name
        for name, (of, *options) in inputs.items()
        if of in ("MODEL", "CLIP") or (options and options[0].get("forceInput"))
    ]
    return tuple(sockets), tuple(name for name in inputs if name not in sockets)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_inputs_and_links_exist(comfy: Comfy, name: str) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        sockets, widgets = inputs_of(comfy, node["type"])
        assert tuple(entry["name"] for entry in node["inputs"]) == sockets, node["type"]
        assert len(node["widgets_values"]) == len(widgets), node["type"]
    for link, source, slot, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_match_the_nodes(comfy: Comfy, name: str) -> None:
    ours = [node for node in read(name)["nodes"] if node["type"] not in CORE]
    assert ours
    for node in ours:
        kind = comfy.nodes.NODE_CLASS_MAPPINGS[node["type"]]
        assert tuple(output["type"] for output in node["outputs"]) == kind.RETURN_TYPES


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_agrees(comfy: Comfy, name: str) -> None:
    workflow, api = read(name), read(f"{name}_api")
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    expected: dict[str, Any] = {}
    for node in workflow["nodes"]:
        widgets = dict(zip(inputs_of(comfy, node["type"])[1], node["widgets_values"], strict=True))
        widgets.pop("control_after_generate", None)
        sockets = {e["name"]: links[e["link"]] for e in node["inputs"] if e["link"] is not None}
        expected[str(node["id"])] = (node["type"], sockets | widgets)
    assert {at: (node["class_type"], node["inputs"]) for at, node in api.items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_widget_values_are_valid(comfy: Comfy, name: str) -> None:
    """Check choices other than file names, which depend on the user."""
    for node in read(f"{name}_api").values():
        if node["class_type"] in CORE:
            continue
        groups = comfy.nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        for group in groups.values():
            for key, (kind, *_) in group.items():
                if isinstance(kind, list) and not any(choice.endswith(".safetensors") for choice in kind):
                    value = node["inputs"][key]
                    assert value in kind or value.endswith(".safetensors"), (key, value)
