"""Compare scales read from configurations of PEFT and diffusers with those that the two apply."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectune.adapters.adapter import Adapter
from spectune.adapters.alphas import PeftAlphas, read_peft_alphas
from spectune.adapters.reader import open_adapter
from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.ops.convert import convert
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.sdxl.names import Part, module_path
from tests.layouts import Modules
from tests.loras import distance, products

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "k_proj", "fc1"]
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is the rank": {"r": 4, "lora_alpha": 4},
    "alpha is not the rank": {"r": 4, "lora_alpha": 6},
    "rank-stabilized": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "ranks and alphas by pattern": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"attn1.to_q": 2, "conv1": 8, "fc1": 3},
        "alpha_pattern": {
            "attn1.to_q": 1,
            "conv1": 16,
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 7,
            "encoder.layers.1.mlp.fc1": 5,
        },
    },
    "patterns and rank-stabilized": {
        "r": 4, "lora_alpha": 2, "alpha_pattern": {"to_v": 3}, "use_rslora": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source, all_layers=True)


def wrapped(module: nn.Module, targets: list[str], config: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a module with a LoRA of random numbers in it."""
    copied = copy.deepcopy(module)
    lora = LoraConfig(**config, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(lora, copied)
    return copied


def scales_in(modules: Mapping[str, nn.Module], catalogue: Catalogue) -> dict[str, float]:
    """Return the scales that PEFT applies, by layer."""
    found: dict[str, float] = {}
    for layer in catalogue:
        part, path = module_path(layer.name, catalogue.unet)
        if part.value in modules:
            module = modules[part.value].get_submodule(path)
            if isinstance(module, LoraLayer):
                found[layer.name] = module.scaling["default"]
    return found


def read_scales(path: Path, catalogue: Catalogue) -> dict[str, float]:
    with open_adapter(path, catalogue) as opened:
        assert isinstance(opened, Adapter)
        assert opened.warnings == ()
        return {name: opened.layers[name].scale for name in opened.layers}


def saved_by_diffusers(modules: Mapping[str, nn.Module], folder: Path) -> Path:
    roots = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}
    layers = {f"{roots[p]}_lora_layers": get_peft_model_state_dict(cast(Any, m)) for p, m in modules.items()}
    metadata = _collate_lora_metadata({roots[part]: module for part, module in modules.items()})
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", CONFIGS)
def test_scales_equal_those_of_diffusers(
    name: str, tiny_modules: Modules, tmp_path: Path, catalogue: Catalogue
) -> None:
    modules = {
        "unet": wrapped(tiny_modules.unet, UNET_TARGETS, CONFIGS[name]),
        "te1": wrapped(tiny_modules.te1, TEXT_TARGETS, {"r": 3, "lora_alpha": 5}),
        "te2": wrapped(tiny_modules.te2, TEXT_TARGETS, CONFIGS[name]),
    }
    path = saved_by_diffusers(modules, tmp_path)
    expected = scales_in(modules, catalogue)
    found = read_scales(path, catalogue)
    assert found.keys() == expected.keys()
    assert len(found) == len([key for key in load_file(path) if "lora_A" in key or ".lora.down" in key])
    assert {part: sum(n.startswith(part) for n in found) > 4 for part in ("unet", "te1", "te2")} == {
        "unet": True,
        "te1": True,
        "te2": True,
    }
    for layer, scale in expected.items():
        assert found[layer] == pytest.approx(scale, rel=1e-12), layer


@pytest.mark.parametrize("name", CONFIGS)
def test_scales_equal_those_of_peft(
    name: str, tiny_modules: Modules, tmp_path: Path, catalogue: Catalogue
) -> None:
    config = LoraConfig(**CONFIGS[name], target_modules=UNET_TARGETS, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(cast(Any, tiny_modules.unet)), config)
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_config.json").is_file()
    path = tmp_path / "adapter_model.safetensors"
    assert read_scales(path, catalogue) == pytest.approx(
        scales_in({"unet": model.base_model.model}, catalogue), rel=1e-12
    )


def test_conversion_keeps_the_scales_of_peft(
    tiny_modules: Modules, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    """The converted file stores alphas, and its products equal those that PEFT computes."""
    module = wrapped(tiny_modules.unet, UNET_TARGETS, CONFIGS["ranks and alphas by pattern"])
    path = saved_by_diffusers({"unet": module}, tmp_path)
    made = convert(path, tmp_path / "kohya.safetensors", base=tiny_checkpoint)
    assert made.error == 0
    found = products(made.path)
    for layer in catalogue:
        part, place = module_path(layer.name, catalogue.unet)
        if layer.kohya in found:
            assert part is Part.UNET
            lora = module.get_submodule(place)
            assert isinstance(lora, LoraLayer)
            theirs = lora.get_delta_weight("default").detach().flatten(1)
            assert distance(theirs, found[layer.kohya]) < 1e-6
    again = convert(made.path, tmp_path / "peft.safetensors", base=tiny_checkpoint, even_alphas=True)
    assert max(distance(products(again.path)[stem], exact) for stem, exact in found.items()) < 1e-6


def factors(catalogue: Catalogue, name: str, rank: int = 4) -> dict[str, Tensor]:
    layer = catalogue.by_name[name]
    down, up = layer.factor_shapes(rank)
    return {
        f"{layer.diffusers}.lora_A.weight": torch.randn(down),
        f"{layer.diffusers}.lora_B.weight": torch.randn(up),
    }


def scale_of(tensors: Mapping[str, Tensor], settings: object, path: Path, catalogue: Catalogue) -> float:
    metadata = {"lora_adapter_metadata": settings if isinstance(settings, str) else json.dumps(settings)}
    save_file(dict(tensors), path, metadata=metadata)
    (found,) = read_scales(path, catalogue).values()
    return found


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),  # of another part
        ({"unet.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": None}, 1.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": None}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"proj_in": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.0.proj_in": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"^mid_block.attentions.0.proj_in": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"j_in": 2}}, 2.0),  # only complete names match
        (
            {"unet.lora_alpha": 8, "unet.alpha_pattern": {".*proj.*": 2}},
            2.0,
        ),  # regular expressions are not supported
        ({"unet.alpha_pattern": {"proj_in": 6}}, 1.5),
    ],
)
def test_alpha_patterns_apply_as_in_peft(
    settings: object, scale: float, catalogue: Catalogue, tmp_path: Path
) -> None:
    tensors = factors(catalogue, "unet.middle_block.1.proj_in")
    assert scale_of(tensors, settings, tmp_path / "a.safetensors", catalogue) == pytest.approx(scale)


def test_alpha_tensors_take_precedence_over_the_configuration(catalogue: Catalogue, tmp_path: Path) -> None:
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    tensors = factors(catalogue, layer.name) | {f"{layer.diffusers}.alpha": torch.tensor(1.0)}
    assert scale_of(tensors, {"unet.lora_alpha": 8}, tmp_path / "a.safetensors", catalogue) == 0.25


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("[1]", "metadata lora_adapter_metadata of a.safetensors is not a JSON object: [1]"),
        ("{", "metadata lora_adapter_metadata of a.safetensors is not a JSON object: {"),
        ({"unet.lora_alpha": "8"}, "unet.lora_alpha is '8': expected a number"),
        (
            {"unet.alpha_pattern": {"x": "y"}},
            "unet.alpha_pattern is {'x': 'y'}: expected numbers by layer name",
        ),
        ('{"unet.lora_alpha": NaN}', "unet.lora_alpha is nan: expected a number"),
        (
            {"unet.alpha_pattern": {"x": None}},
            "unet.alpha_pattern is {'x': None}: expected numbers by layer name",
        ),
        ({"unet.alpha_pattern": 3}, "unet.alpha_pattern is 3: expected numbers by layer name"),
        ({"unet.lora_alpha": {"x": 3}}, "unet.lora_alpha is {'x': 3}: expected a number"),
    ],
)
def test_invalid_configurations_are_errors(
    settings: object, what: str, catalogue: Catalogue, tmp_path: Path
) -> None:
    tensors = factors(catalogue, "unet.middle_block.1.proj_in")
    with pytest.raises(InputError) as caught:
        scale_of(tensors, settings, tmp_path / "a.safetensors", catalogue)
    assert what in caught.value.what


def test_only_a_configuration_in_the_same_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    module = "unet.mid_block.attentions.0.proj_in"
    ours = read_peft_alphas(tmp_path / "adapter_model.safetensors", {})
    assert ours.alpha(module, 4) == 8
    assert ours.alpha("text_encoder.text_model.encoder.layers.0.mlp.fc1", 2) == 8
    assert read_peft_alphas(tmp_path / "other.safetensors", {}) == PeftAlphas({})
    assert PeftAlphas({}).alpha(module, 4) is None
    # metadata of the file itself take precedence
    settings = {"lora_adapter_metadata": '{"unet.lora_alpha": 3, "unet.use_rslora": true}'}
    found = read_peft_alphas(tmp_path / "adapter_model.safetensors", settings)
    assert found.alpha(module, 4) == pytest.approx(3 * math.sqrt(4))
