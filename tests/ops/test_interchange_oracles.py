"""Compare W + dW of diffusers, PEFT and lycoris-lora for our files with our own, in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectune.adapters.adapter import Adapter
from spectune.adapters.spellings import Spelling
from spectune.adapters.writer import AdapterHeader, AdapterWriter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank
from spectune.files.provenance import HasProvenance, Provenance
from spectune.files.source import TensorInfo
from spectune.ops.convert import convert
from spectune.ops.export import export
from spectune.ops.rebuild import rebuild
from spectune.pairs.merged import Merged, Restored, merged
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue, layer_weight
from spectune.sdxl.layout import PartName
from spectune.sdxl.names import module_path
from spectune.sdxl.state_dicts import module_tensors
from tests.layouts import TINY, Modules
from tests.loras import distance, saved_lora
from tests.ops.test_oracles import lycoris_weight, module_of, peft_weight
from tests.sample_pairs import open_principal, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit

PARTS = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


def pipeline(modules: Modules) -> StableDiffusionXLPipeline:
    """Return a pipeline with copies of the tiny modules, without tokenizers and autoencoder."""
    parts: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
    for part, name in PARTS.items():
        parts[name] = copy.deepcopy(getattr(modules, part))
    return StableDiffusionXLPipeline(**parts, scheduler=cast(Any, EulerDiscreteScheduler()))


def weights_in(pipe: StableDiffusionXLPipeline, catalogue: Catalogue) -> dict[str, Tensor]:
    """Return W + dW by layer, as PEFT would merge it."""
    weights: dict[str, Tensor] = {}
    for layer in catalogue:
        part, path = module_path(layer.name, catalogue.unet)
        module = getattr(pipe, PARTS[part]).get_submodule(path)
        assert isinstance(module, LoraLayer), layer.name
        (active,) = module.scaling
        base = cast(nn.Module, module.get_base_layer())
        weights[layer.name] = (cast(Tensor, base.weight) + module.get_delta_weight(active)).detach()
    return weights


def in_diffusers(modules: Modules, path: Path, catalogue: Catalogue) -> dict[str, Tensor]:
    pipe = pipeline(modules)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return weights_in(pipe, catalogue)


def largest_error(ours: Merged | Restored, theirs: Mapping[str, Tensor], layers: Catalogue) -> float:
    return max(distance(theirs[layer.name], layer_weight(ours, layer)) for layer in layers)


def changes_much(base: Path, ours: Merged | Restored, layers: Catalogue) -> bool:
    """Return whether the change is 1000 times the tolerance, so that a missing change fails the test."""
    with open_checkpoint(base) as source:
        return all(distance(layer_weight(source, one), layer_weight(ours, one)) > 1e-3 for one in layers)


@pytest.mark.parametrize("spelling", [Spelling.KOHYA, Spelling.DIFFUSERS])
def test_diffusers_loads_what_export_writes(
    spelling: Spelling,
    tiny_modules: Modules,
    tiny_checkpoint: Path,
    tiny_split: TinySplit,
    tmp_path: Path,
    catalogue: Catalogue,
) -> None:
    tuned = saved_tuned(tuned_from(tiny_checkpoint, tiny_split(None), size=0.1), tmp_path / "t.safetensors")
    lora = export(tuned, tmp_path / "lora.safetensors", base=tiny_checkpoint, keys=spelling).path
    theirs = in_diffusers(tiny_modules, lora, catalogue)
    with open_checkpoint(tiny_checkpoint) as base:
        ours = merged(base, [(open_principal(tiny_checkpoint, lora), 1.0)], dtype=torch.float32)
        assert changes_much(tiny_checkpoint, ours, catalogue)
        assert largest_error(ours, theirs, catalogue) < 1e-6


@pytest.mark.parametrize("spelling", Spelling)
def test_other_programs_apply_the_same_scale_in_every_spelling(
    spelling: Spelling, tiny_modules: Modules, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    lora = saved_lora(tmp_path / "a.safetensors", catalogue, rank=4, alpha=3.0)
    made = convert(lora, tmp_path / "b.safetensors", keys=spelling, base=tiny_checkpoint).path
    with open_checkpoint(tiny_checkpoint) as base:
        ours = merged(base, [(open_principal(tiny_checkpoint, lora), 1.0)], dtype=torch.float32)
        if spelling is Spelling.COMFYUI:
            theirs = by_state_dict_names(load_file(made), tiny_modules, catalogue)
        else:
            theirs = in_diffusers(tiny_modules, made, catalogue)
        assert changes_much(tiny_checkpoint, ours, catalogue)
        assert largest_error(ours, theirs, catalogue) < 1e-6


def by_state_dict_names(file: dict[str, Tensor], modules: Modules, catalogue: Catalogue) -> dict[str, Tensor]:
    """Return W + dW by layer, with keys mapped as ComfyUI does: a stem plus `.weight` is a state dict name.

    ComfyUI's UNet has the names of the checkpoint, its encoders those of transformers with `text_model.`.
    """
    names: dict[str, Tensor] = {}
    for name, tensor in modules.single_file().items():
        if name.startswith("model.diffusion_model."):
            names[name.removeprefix("model.").removesuffix(".weight")] = tensor
    for root, part in (("clip_l", modules.te1), ("clip_g", modules.te2)):
        for name, tensor in part.state_dict().items():
            path = f"text_model.{name.removeprefix('text_model.')}"
            names[f"text_encoders.{root}.transformer.{path}".removesuffix(".weight")] = tensor
    merged_weights: dict[str, Tensor] = {}
    for key, up in file.items():
        stem, end, _ = key.partition(".lora_up.weight")
        if end:
            down, alpha = file[f"{stem}.lora_down.weight"], float(file[f"{stem}.alpha"])
            change = alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))
            merged_weights[stem] = names[stem] + change.reshape(names[stem].shape)
    assert len(merged_weights) == len(catalogue)
    ordered = {layer.name: _comfyui_stem(layer) for layer in catalogue}
    return {name: merged_weights[stem] for name, stem in ordered.items()}


def _comfyui_stem(layer: Layer) -> str:
    part, _, rest = layer.name.partition(".")
    roots = {"unet": "diffusion_model", "te1": "clip_l", "te2": "clip_g"}
    return f"{roots[part]}.{rest}" if part == "unet" else f"text_encoders.{roots[part]}.transformer.{rest}"


@pytest.mark.slow
def test_diffusers_needs_even_alphas(
    tiny_modules: Modules, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    one = {layer for layer in catalogue if layer.block == "mid"}
    lora = saved_lora(tmp_path / "a.safetensors", one, rank=4, alpha=1.0)
    rest = saved_lora(
        tmp_path / "rest.safetensors", [layer for layer in catalogue if layer not in one], rank=4
    )
    save_file(load_file(lora) | load_file(rest), lora)
    even = convert(lora, tmp_path / "even.safetensors", even_alphas=True, base=tiny_checkpoint)
    assert even.error == 0  # alpha / rank is 1/4
    with open_checkpoint(tiny_checkpoint) as base:
        ours = merged(base, [(open_principal(tiny_checkpoint, lora), 1.0)], dtype=torch.float32)
        evened = in_diffusers(tiny_modules, even.path, catalogue)
        assert largest_error(ours, evened, catalogue) < 1e-6
        assert largest_error(ours, in_diffusers(tiny_modules, lora, catalogue), catalogue) > 1e-3


BLOCK = "unet.middle_block.1.transformer_blocks.0"
CONV = "unet.middle_block.0.in_layers.2"


@dataclass(frozen=True)
class RandomSdxl(HasProvenance):
    """A full-size SDXL with random tensors, which are generated when they are loaded."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    label: str = "random"

    def load(self, name: str) -> Tensor:
        shape = self.tensors[name].shape
        generator = torch.Generator().manual_seed(len(name))
        return 0.02 * torch.randn(shape, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [Spelling.KOHYA, Spelling.DIFFUSERS])
def test_a_full_size_block_is_the_same_in_other_programs(
    spelling: Spelling, full_infos: Mapping[str, TensorInfo], tmp_path: Path
) -> None:
    base, rank = RandomSdxl(full_infos), 16
    layers = [layer for layer in build_catalogue(base) if layer.name.startswith((f"{BLOCK}.", CONV))]
    assert len(layers) == 11
    assert max(layer.shape for layer in layers) == (10240, 1280)
    path = tmp_path / "lora.safetensors"
    pairs = {layer.name: random_pair(layer, rank) for layer in layers}
    ranks = dict.fromkeys(pairs, rank)
    header = AdapterHeader(layers, ranks, torch.float16, Provenance(), spelling)
    with AdapterWriter(path, header) as writer:
        for layer in layers:
            writer.write_layer(layer, pairs[layer.name])
    ours = merged(base, [(Adapter(pairs, {}, "memory"), 1.0)], dtype=torch.float32)
    file = load_file(path)
    expected = {layer.name: layer_weight(ours, layer) for layer in layers}
    if spelling is Spelling.KOHYA:
        for layer in {layer.shape: layer for layer in layers}.values():
            weight = layer_weight(base, layer)
            for theirs in (lycoris_weight(layer, weight, file), peft_weight(layer, weight, file)):
                assert distance(theirs, expected[layer.name]) < 1e-6
                assert distance(weight, expected[layer.name]) > 1e-3
        return
    block = full_block(base, layers)
    wrapped = nn.ModuleDict({"block": block, "conv": module_of(layers[0], layer_weight(base, layers[0]))})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name for name, _ in linears(wrapped)])
    inject_adapter_in_model(config, wrapped)
    state = {in_block(key): tensor.float() for key, tensor in file.items()}
    loaded = set_peft_model_state_dict(wrapped, state)
    assert not loaded.unexpected_keys
    for layer in layers:
        module = wrapped.get_submodule(in_block(layer.diffusers))
        assert isinstance(module, LoraLayer)
        weight = cast(Tensor, cast(nn.Module, module.get_base_layer()).weight)
        theirs = (weight + module.get_delta_weight("default")).detach()
        assert distance(theirs, expected[layer.name]) < 1e-6


def random_pair(layer: Layer, rank: int) -> LowRank:
    generator = torch.Generator().manual_seed(len(layer.name))
    down, up = (0.05 * torch.randn(s, generator=generator) for s in layer.factor_shapes(rank))
    return LowRank(down.half(), up.half(), float(rank))


def full_block(base: RandomSdxl, layers: list[Layer]) -> BasicTransformerBlock:
    """Return a transformer block of diffusers in SDXL's size with the weights of the layers."""
    block = BasicTransformerBlock(1280, 20, 64, cross_attention_dim=2048, activation_fn="geglu")
    modules = dict(linears(block))
    ours = {layer.name.removeprefix(f"{BLOCK}."): layer for layer in layers if layer.name.startswith(BLOCK)}
    assert modules.keys() == ours.keys()
    for name, module in modules.items():
        cast(nn.Linear, module).weight.data = layer_weight(base, ours[name])
    return block


def linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def in_block(key: str) -> str:
    """Convert a name in a pipeline to the name in the wrapped block."""
    inside = key.replace("unet.mid_block.attentions.0.transformer_blocks.0.", "block.")
    return inside.replace("unet.mid_block.resnets.0.conv1", "conv")


def test_diffusers_opens_a_rebuilt_checkpoint_with_all_weights(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    tuned = saved_tuned(tuned_from(tiny_checkpoint, tiny_split(None), size=0.1), tmp_path / "t.safetensors")
    model = rebuild(tiny_checkpoint, tuned, tmp_path / "model.safetensors").path
    # diffusers knows the configuration of SDXL only: that of the tiny model is read from the folder
    folder = convert(tiny_checkpoint, tmp_path / "folder").path
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(model), config=str(folder), local_files_only=True, torch_dtype=torch.float32
    )
    modules = {**{part: getattr(pipe, name) for part, name in PARTS.items()}, "vae": pipe.vae}
    with open_checkpoint(model) as source, open_checkpoint(tiny_checkpoint) as before:
        counts = dict.fromkeys(modules, 0)
        for part, module in modules.items():
            views = module_tensors(TINY, cast(PartName, part), source)
            state = {key.removeprefix("text_model."): t for key, t in module.state_dict().items()}
            for name, view in views.items():
                loaded = state[name.removeprefix("text_model.")]
                assert torch.equal(loaded, view.load(source).float()), f"{part} {name}"
                counts[part] += not torch.equal(loaded, view.load(before).float())
    assert counts["vae"] == 0
    assert [counts[part] for part in PARTS] == [
        sum(
            name.startswith(f"{part}.")
            for name in tuned_from(tiny_checkpoint, tiny_split(None), size=0).layers
        )
        for part in PARTS
    ]
