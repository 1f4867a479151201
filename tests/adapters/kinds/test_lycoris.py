"""Every kind against LyCORIS, which defined it: its modules write the file and give the expected weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.diag_oft import DiagOFTModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.full import FullModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.glora import GLoRAModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.ia3 import IA3Module  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.locon import LoConModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.loha import LohaModule  # pyright: ignore[reportMissingTypeStubs]
from lycoris.modules.lokr import LokrModule  # pyright: ignore[reportMissingTypeStubs]
from safetensors.torch import save_file
from torch import Tensor, nn

from spectune.adapters.adapter import GeneralAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.pairs.merged import merged
from spectune.sdxl.layers import Layer, build_catalogue, layer_weight

# A linear layer, a 3x3 and a 1x1 convolution, and a block of rows of a fused tensor.
LAYERS = (
    "unet.middle_block.1.proj_in",
    "unet.middle_block.0.in_layers.2",
    "unet.output_blocks.0.0.skip_connection",
    "te2.text_model.encoder.layers.1.self_attn.k_proj",
)
STRENGTH = 0.7


def module_of(weight: Tensor) -> nn.Linear | nn.Conv2d:
    out, inputs, *kernel = weight.shape
    module = (
        nn.Conv2d(inputs, out, (kernel[0], kernel[1]), bias=False)
        if kernel
        else nn.Linear(inputs, out, bias=False)
    )
    module.weight.data = weight.clone()
    return module


def additive(module: Any, weight: Tensor, strength: float) -> Tensor:
    return weight + strength * module.get_weight(weight.shape)


def locon(module: Any, weight: Tensor, strength: float) -> Tensor:
    return weight + strength * module.scale * module.make_weight()


def merged_weight(module: Any, weight: Tensor, strength: float) -> Tensor:
    return module.get_merged_weight(strength)[0]


def decomposed(change: Callable[[Any, Tensor, float], Tensor]) -> Callable[[Any, Tensor, float], Tensor]:
    """Return DoRA at strength 1; other strengths are those of ComfyUI, W + s * (W' - W)."""

    def expected(module: Any, weight: Tensor, strength: float) -> Tensor:
        complete = module.apply_weight_decompose(change(module, weight, 1.0))
        return weight + strength * (complete - weight)

    return expected


Oracle = Callable[[Any, Tensor, float], Tensor]
DORA = {"weight_decompose": True}
CASES: Mapping[str, tuple[type[Any], dict[str, Any], Oracle]] = {
    "LoHa": (LohaModule, {}, additive),
    "LoHa tucker": (LohaModule, {"use_tucker": True}, additive),
    "LoHa rs": (LohaModule, {"rs_lora": True}, additive),
    "LoKr": (LokrModule, {}, additive),
    "LoKr both": (LokrModule, {"decompose_both": True, "lora_dim": 1}, additive),
    "LoKr factor": (LokrModule, {"factor": 2}, additive),
    "LoKr full": (LokrModule, {"full_matrix": True}, additive),
    "LoKr tucker": (LokrModule, {"use_tucker": True, "lora_dim": 1}, additive),
    "DoRA rows": (LoConModule, DORA, decomposed(locon)),
    "DoRA columns": (LoConModule, {**DORA, "wd_on_out": False}, decomposed(locon)),
    "DoRA tucker": (LoConModule, {**DORA, "use_tucker": True}, decomposed(locon)),
    "DoRA of LoHa": (LohaModule, DORA, decomposed(additive)),
    "DoRA of LoKr": (LokrModule, {**DORA, "wd_on_out": False}, decomposed(additive)),
    "full": (FullModule, {}, merged_weight),
    "OFT": (DiagOFTModule, {}, merged_weight),
    "OFT constraint": (DiagOFTModule, {"constraint": 1e-3}, merged_weight),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}, merged_weight),
    "BOFT rescaled": (ButterflyOFTModule, {"lora_dim": 8, "rescaled": True}, merged_weight),
    "GLoRA": (GLoRAModule, {}, merged_weight),
    "IA3 input": (IA3Module, {"train_on_input": True}, merged_weight),
    "IA3 output": (IA3Module, {}, merged_weight),
}


def trained(kind: str, weight: Tensor, seed: int) -> Any:
    """Return a LyCORIS module of a kind with random parameters."""
    cls, options, _ = CASES[kind]
    torch.manual_seed(seed)
    module = cls("x", module_of(weight), **{"lora_dim": 4, "alpha": 3.0, **options})
    if cls is FullModule:
        module.apply_to()  # from here on, it has the complete weight, and saves the difference
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def tensors_of(module: Any, stem: str) -> dict[str, Tensor]:
    return {
        f"{stem}.{name}": tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def layers(tiny_checkpoint: Path) -> dict[str, tuple[Layer, Tensor]]:
    with open_checkpoint(tiny_checkpoint) as base:
        by_name = build_catalogue(base, all_layers=True).by_name
        return {name: (by_name[name], layer_weight(base, by_name[name]).float()) for name in LAYERS}


def rebuilt(base_path: Path, adapter: Path, strength: float) -> dict[str, Tensor]:
    """Return the weights of LAYERS in float32."""
    with open_checkpoint(base_path) as base:
        catalogue = build_catalogue(base, all_layers=True)
        with open_any_adapter(adapter, catalogue) as opened:
            assert isinstance(opened, GeneralAdapter)
            model = merged(base, [(opened, strength)], dtype=torch.float32)
            return {name: layer_weight(model, catalogue.by_name[name]) for name in LAYERS}


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", CASES)
@torch.no_grad()
def test_the_weights_equal_those_of_lycoris(
    kind: str, layers: dict[str, tuple[Layer, Tensor]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    modules = {name: trained(kind, weight, seed) for seed, (name, (_, weight)) in enumerate(layers.items())}
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= tensors_of(module, layers[name][0].kohya)
    save_file(tensors, tmp_path / "a.safetensors")
    for strength in (1.0, STRENGTH):
        weights = rebuilt(tiny_checkpoint, tmp_path / "a.safetensors", strength)
        for name, module in modules.items():
            weight = layers[name][1]
            expected = CASES[kind][2](module, weight, strength)
            assert error(weights[name], expected) < 1e-6, (name, strength)
            # the change itself is much larger than the tolerance, so an oracle that is 1% off fails
            assert error(weights[name], weight) > 1e-3, (name, strength)
            wrong = weight + 1.01 * (expected - weight)
            assert error(weights[name], wrong) > 1e-5, (name, strength)
