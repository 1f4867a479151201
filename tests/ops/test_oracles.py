"""Compare W + dW of lycoris-lora and PEFT for our files with our own, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file
from torch import Tensor, nn

from spectune.checkpoints.open import open_checkpoint
from spectune.files.source import WeightSource
from spectune.ops.export import export
from spectune.ops.split import split
from spectune.pairs.merged import merged, restored
from spectune.sdxl.layers import Kind, Layer, build_catalogue, layer_weight
from tests.sample_pairs import open_principal, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit


def module_of(layer: Layer, weight: Tensor) -> nn.Linear | nn.Conv2d:
    """Return a torch module with the layer's weight in float32."""
    if layer.kind is Kind.LINEAR:
        module = nn.Linear(layer.shape[1], layer.shape[0], bias=False)
    else:
        out, into, *kernel = layer.shape
        module = nn.Conv2d(into, out, tuple(kernel), padding=kernel[0] // 2, bias=False)
    module.weight.data = weight.float().clone()
    return module


def lycoris_weight(layer: Layer, weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    """Return W + dW of lycoris-lora, which reads the tensors by their names in the file."""
    state = {key.partition(".")[2]: t for key, t in file.items() if key.partition(".")[0] == layer.kohya}
    made = LoConModule.make_module_from_state_dict(
        layer.kohya, module_of(layer, weight), *(state.get(name) for name in LoConModule.weight_list)
    )
    made.load_state_dict({name: t.float() for name, t in state.items()}, strict=False)
    return made.get_merged_weight(multiplier=1.0)[0].detach()


def peft_weight(layer: Layer, weight: Tensor, file: dict[str, Tensor]) -> Tensor:
    """Return W + dW of a merged PEFT layer with the same factors."""
    down, up = (file[f"{layer.kohya}.lora_{side}.weight"].float() for side in ("down", "up"))
    rank, alpha = down.shape[0], int(file[f"{layer.kohya}.alpha"])
    kind = PeftLinear if layer.kind is Kind.LINEAR else PeftConv2d
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False)
    wrapped = kind(module_of(layer, weight), "x", config=config, r=rank, lora_alpha=alpha)
    wrapped.lora_A["x"].weight.data = down
    wrapped.lora_B["x"].weight.data = up
    wrapped.merge()
    return wrapped.get_base_layer().weight.detach()


def assert_same_models(base: WeightSource, ours: WeightSource, adapter: Path) -> None:
    """Check that every layer agrees within 1e-6 of its norm."""
    file = load_file(adapter)
    catalogue = build_catalogue(base)
    kinds = set()
    for layer in catalogue:
        weight = layer_weight(base, layer)
        expected = layer_weight(ours, layer).double()
        for theirs in (lycoris_weight(layer, weight, file), peft_weight(layer, weight, file)):
            assert theirs.shape == layer.shape
            error = float((theirs.double() - expected).norm() / expected.norm())
            assert error <= 1e-6, (layer.name, error)
        kinds.add((layer.kind, layer.shape[2:], layer.rows is not None))
    assert len(kinds) == 4  # linear, fused linear, 1x1 and 3x3


@pytest.mark.parametrize("store", [torch.float16, torch.float32])
def test_other_programs_apply_the_same_principal(
    tiny_checkpoint: Path, tmp_path: Path, store: torch.dtype
) -> None:
    report = split(tiny_checkpoint, tmp_path, rank=4, conv_rank=3, dtype=store, residual_dtype=torch.float32)
    assert report.residual is not None
    principal = open_principal(tiny_checkpoint, report.principal)
    with open_checkpoint(report.residual) as residual:
        assert_same_models(residual, restored(residual, principal, dtype=torch.float32), report.principal)


def test_other_programs_apply_the_same_exported_lora(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.1), tmp_path / "tuned.safetensors")
    lora = export(tuned, tmp_path / "lora.safetensors", base=tiny_checkpoint).path
    adapter = open_principal(tiny_checkpoint, lora)
    with open_checkpoint(tiny_checkpoint) as base:
        assert_same_models(base, merged(base, [(adapter, 1.0)], dtype=torch.float32), lora)
