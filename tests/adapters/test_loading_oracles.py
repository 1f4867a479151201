"""Compare the table of programs with what lycoris-lora and diffusers load for the tiny model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from lycoris.kohya import create_network, create_network_from_weights
from peft.tuners.lora import LoraLayer
from torch import nn

from spectune.adapters.loading import loading_table
from spectune.adapters.programs import Program
from spectune.adapters.spellings import Spelling, spelled
from spectune.files.source import MemorySource
from spectune.sdxl.layers import Catalogue, Kind, Layer, build_catalogue
from spectune.sdxl.names import Part
from tests.layouts import Modules
from tests.sample_adapters import Tensors, as_peft, as_tuned, kohya_style, pair, pairs, renamed, without


@pytest.fixture(scope="module")
def catalogue(source: MemorySource) -> Catalogue:
    return build_catalogue(source, all_layers=True)


@pytest.fixture(scope="module")
def layer(catalogue: Catalogue) -> Layer:
    return catalogue.by_name["unet.input_blocks.3.1.transformer_blocks.0.attn1.to_v"]


def claimed(tensors: Tensors, catalogue: Catalogue, program: Program) -> int | None:
    """Return how many layers load according to the table; None if the file is refused."""
    (found,) = [c for c in loading_table(MemorySource(tensors, {}), catalogue) if c.program is program]
    return None if found.refuses else found.loads


class Oracles:
    """Counters of the layers of the tiny model that each program loads; None if it raises an error."""

    def __init__(self, modules: Modules, catalogue: Catalogue) -> None:
        self.modules = modules
        self.catalogue = catalogue
        self.scales: set[float] = set()  # that diffusers applied for the last file
        self.wrong = 0
        self.roots = {part: sgm_module(catalogue, part) for part in Part}

    def lycoris_file(self, tensors: Tensors) -> int | None:
        encoders = [self.roots[Part.TE1], self.roots[Part.TE2]]
        try:
            network, _ = create_network_from_weights(
                1.0, None, None, encoders, self.roots[Part.UNET], weights_sd=dict(tensors)
            )
        except (TypeError, AttributeError):
            return None
        return len(network.unet_loras) + len(network.text_encoder_loras)

    def lycoris(self, tensors: Tensors) -> int:
        """Return how many layers of a preset=full network find both factors, as with network_weights."""
        network = create_network(
            1.0, 2, 2, None, [self.roots[Part.TE1], self.roots[Part.TE2]], self.roots[Part.UNET],
            algo="locon", preset="full", train_norm=False, conv_dim=2, conv_alpha=2,
        )  # fmt: skip
        for module in network.text_encoder_loras + network.unet_loras:
            network.add_module(module.lora_name, module)
        missing = set(network.load_state_dict(dict(tensors), strict=False).missing_keys)
        names = {key.partition(".")[0] for key in network.state_dict()}
        return sum(not {f"{name}.lora_down.weight", f"{name}.lora_up.weight"} & missing for name in names)

    def diffusers(self, tensors: Tensors) -> int | None:
        parts = [copy.deepcopy(part) for part in (self.modules.te1, self.modules.te2, self.modules.unet)]
        components: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
        components |= dict(zip(("text_encoder", "text_encoder_2", "unet"), parts, strict=True))
        pipe = StableDiffusionXLPipeline(**components, scheduler=cast("Any", EulerDiscreteScheduler()))
        try:
            pipe.load_lora_weights({key: tensor.clone() for key, tensor in tensors.items()})
        except (ValueError, KeyError):
            return None
        wrapped = [module for part in parts for module in part.modules() if isinstance(module, LoraLayer)]
        self.scales = {scale for module in wrapped for scale in module.scaling.values()}
        self.wrong = sum(scale != 1 for module in wrapped for scale in module.scaling.values())
        return len(wrapped)

    def wrong_scales(self, tensors: Tensors) -> int:
        """Return how many layers of a file with alpha = rank get another scale than 1 in diffusers."""
        assert self.diffusers(tensors) == 192
        return self.wrong


def sgm_module(catalogue: Catalogue, part: Part) -> nn.Module:
    """Return a minimal module with the layer names and the class names of the blocks of sd-scripts."""
    root = nn.Module()
    for layer in catalogue:
        if layer.part is not part:
            continue
        module, path = root, layer.name.split(".")[1:]
        for name in path[:-1]:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(path[-1], bare(layer))
    for module in root.modules():
        for child, kind in CLASS_NAMES.items():
            if child in dict(module.named_children()):
                module.__class__ = type(kind, (nn.Module,), {})
    return root


# by a child that only they have
CLASS_NAMES = {
    "in_layers": "ResnetBlock2D",
    "proj_in": "Transformer2DModel",
    "op": "Downsample2D",
    "conv": "Upsample2D",
    "q_proj": "CLIPAttention",
    "fc1": "CLIPMLP",
}


def bare(layer: Layer) -> nn.Module:
    if layer.kind is Kind.LINEAR:
        return nn.Linear(layer.shape[1], layer.shape[0], bias=False)
    out, into, *kernel = layer.shape
    return nn.Conv2d(into, out, kernel[0], padding=kernel[0] // 2, bias=False)


@pytest.fixture(scope="module")
def oracles(tiny_modules: Modules, catalogue: Catalogue) -> Oracles:
    return Oracles(tiny_modules, catalogue)


PROCESSOR = re.compile(r"\.to_(q|k|v|out)(?:\.0)?\.lora_(A|B)\.weight$")


def in_processor(match: re.Match[str]) -> str:
    """Return the key of an attention layer as diffusers wrote it in 2023."""
    return f".processor.to_{match[1]}_lora.{'down' if match[2] == 'A' else 'up'}.weight"


def as_comfyui(tensors: Tensors, layers: Iterable[Layer]) -> Tensors:
    for layer in layers:
        tensors = renamed(tensors, layer.kohya, spelled(layer.name, layer.diffusers, Spelling.COMFYUI))
    return tensors


Change = Callable[[Tensors, Catalogue, Layer], Tensors]
CHANGES: Mapping[str, Change] = {
    "plain": lambda plain, catalogue, layer: plain,
    "all layers": lambda plain, catalogue, layer: pairs(catalogue),
    "one alpha missing": lambda plain, catalogue, layer: without(plain, f"{layer.kohya}.alpha"),
    "no alpha": lambda plain, catalogue, layer: without(plain, ".alpha"),
    "alpha is not the rank": lambda plain, catalogue, layer: plain | pair(layer, alpha=1.0),
    "diff_b": lambda plain, catalogue, layer: (
        plain | {f"{layer.kohya}.diff_b": torch.zeros(layer.out_features)}
    ),
    "diff in addition to a pair": lambda plain, catalogue, layer: (
        plain | {f"{layer.kohya}.diff": torch.zeros(layer.shape)}
    ),
    "diff alone": lambda plain, catalogue, layer: (
        {key: tensor for key, tensor in plain.items() if not key.startswith(f"{layer.kohya}.")}
        | {f"{layer.kohya}.diff": torch.zeros(layer.shape)}
    ),
    "norm": lambda plain, catalogue, layer: plain | {"lora_unet_out_0.w_norm": torch.zeros(16)},
    "unknown key": lambda plain, catalogue, layer: plain | {"bundle_emb.x": torch.zeros(1)},
    "unknown layer": lambda plain, catalogue, layer: (
        plain | renamed(pair(layer), layer.kohya, "lora_unet_input_blocks_9_1_proj_in")
    ),
    "tuned": lambda plain, catalogue, layer: as_tuned(plain),
    "no up": lambda plain, catalogue, layer: without(plain, f"{layer.kohya}.lora_up.weight"),
    "no down": lambda plain, catalogue, layer: without(plain, f"{layer.kohya}.lora_down.weight"),
    "one layer as diffusers": lambda plain, catalogue, layer: renamed(plain, layer.kohya, kohya_style(layer)),
    "one layer as PEFT": lambda plain, catalogue, layer: as_peft(plain, [layer]),
    "PEFT": lambda plain, catalogue, layer: as_peft(plain, [layer for layer in catalogue if layer.default]),
    "PEFT, all layers": lambda plain, catalogue, layer: as_peft(pairs(catalogue), catalogue),
    "ComfyUI": lambda plain, catalogue, layer: as_comfyui(
        plain, (each for each in catalogue if each.default)
    ),
    "one layer as ComfyUI": lambda plain, catalogue, layer: as_comfyui(plain, [layer]),
    "PEFT of the UNet": lambda plain, catalogue, layer: {
        f"base_model.model.{key.removeprefix('unet.')}": tensor
        for key, tensor in as_peft(plain, [layer for layer in catalogue if layer.default]).items()
        if key.startswith("unet.")
    },
    "attention processors": lambda plain, catalogue, layer: {
        PROCESSOR.sub(in_processor, key): tensor
        for key, tensor in as_peft(plain, [layer for layer in catalogue if layer.default]).items()
        if PROCESSOR.search(key)
    },
    "dora_scale": lambda plain, catalogue, layer: (
        plain | {f"{layer.kohya}.dora_scale": torch.ones(layer.out_features, 1)}
    ),
    "old diffusers": lambda plain, catalogue, layer: {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for key, tensor in as_peft(plain, [layer for layer in catalogue if layer.default]).items()
    },
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
def test_lycoris_and_diffusers_agree_with_the_table(
    name: str, catalogue: Catalogue, layer: Layer, oracles: Oracles
) -> None:
    tensors = CHANGES[name](pairs(each for each in catalogue if each.default), catalogue, layer)
    assert oracles.lycoris_file(tensors) == claimed(tensors, catalogue, Program.LYCORIS_FILE)
    assert oracles.diffusers(tensors) == claimed(tensors, catalogue, Program.DIFFUSERS)
    if name != "diff alone":  # no pair of factors
        assert oracles.lycoris(tensors) == claimed(tensors, catalogue, Program.LYCORIS)


def test_the_oracles_detect_a_missing_layer(catalogue: Catalogue, layer: Layer, oracles: Oracles) -> None:
    tensors = pairs(each for each in catalogue if each.default and each is not layer)
    assert oracles.lycoris_file(tensors) == oracles.lycoris(tensors) == oracles.diffusers(tensors) == 191


@pytest.mark.slow
def test_diffusers_uses_the_most_frequent_alpha_for_a_missing_one(
    catalogue: Catalogue, oracles: Oracles
) -> None:
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    plain = pairs(each for each in catalogue if each.default) | pair(layer, rank=3)
    assert oracles.wrong_scales(plain) == oracles.wrong_scales(without(plain, ".alpha")) == 0
    bare = without(plain, f"{layer.kohya}.alpha")
    assert oracles.wrong_scales(bare) == 1
    assert oracles.scales == {1.0, 2 / 3}
    assert oracles.wrong_scales(without(plain, "te1_text_model_encoder_layers_0_mlp_fc1.alpha")) == 0


def test_diffusers_uses_one_alpha_where_alphas_differ(catalogue: Catalogue, oracles: Oracles) -> None:
    default = [layer for layer in catalogue if layer.default]
    tensors = {
        key: tensor
        for index, layer in enumerate(default)
        for key, tensor in pair(layer, rank=2 if index % 3 else 3).items()
    }
    loadings = loading_table(MemorySource(tensors, {}), catalogue)
    ((note,),) = [loading.notes for loading in loadings if loading.program is Program.DIFFUSERS]
    assert oracles.wrong_scales(tensors) == len(note.names) == 37
    assert oracles.wrong_scales(without(tensors, ".alpha")) == 0
    assert {name for name in note.names if ".to_" not in name and ".self_attn." not in name} == set()
