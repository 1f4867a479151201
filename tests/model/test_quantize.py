"""Quantised base layers: bitsandbytes' numbers against hand-computed ones, and what their rounding costs."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import product
from spectune.core.split import split_weight
from spectune.errors import InputError, SpectuneError
from spectune.model.inject import inject
from spectune.model.network import build_model
from spectune.model.quantize import (
    QuantisedLinear,
    dequantise,
    linear_layers,
    quantise,
    quantise_layers,
)
from spectune.model.text import tokenize
from spectune.sdxl.layers import Kind, build_catalogue, layer_weight
from spectune.sdxl.names import Part

ROOT = Path(__file__).parents[2]
needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

# Dettmers et al. 2023, appendix E: the 16 values of a 4-bit normal float
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
RELATIVE = {"nf4": (0.08, 0.1), "int8": (0.004, 0.012)}  # of normal numbers; nf4 by the table above: 0.0918


def matrix(rows=64, columns=128, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def nearest_nf4(weight):
    """By hand: each block of 64 numbers by its largest magnitude, each number the nearest of the table."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    index = (blocks[..., None] / scale[..., None] - table).abs().argmin(dim=-1)
    return (table[index] * scale).view_as(weight)


def nearest_int8(weight):
    scale = weight.half().float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.half().float() / scale).round() * scale


@needs_bnb
@pytest.mark.parametrize(("kind", "by_hand"), [("nf4", nearest_nf4), ("int8", nearest_int8)])
def test_the_rounding_is_that_of_the_table(kind, by_hand):
    weight = matrix()
    packed = quantise(weight, kind)
    found = dequantise(packed, kind, (64, 128), torch.float32)
    # 1e-6: half a step is 1e-3 in int8 and 4e-3 in nf4, and a number on the border may go either way
    wrong = (found - by_hand(weight)).abs() > 1e-6
    assert wrong.float().mean() < 1e-3
    low, high = RELATIVE[kind]
    assert low < (found - weight).norm() / weight.norm() < high
    assert packed.codes.nbytes == weight.numel() * {"nf4": 0.5, "int8": 1}[kind]
    assert packed.scales.dtype == torch.float32


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_stay_zeros(kind):
    weight = matrix()
    weight[:8] = 0
    found = dequantise(quantise(weight, kind), kind, (64, 128), torch.float32)
    assert torch.equal(found[:8], weight[:8])


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_quantised_layer_is_a_linear_layer_of_its_unpacked_weight(kind, dtype):
    base = nn.Linear(128, 64).requires_grad_(False)
    layer = QuantisedLinear(base, kind)
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    weight = layer.unpacked(dtype)
    expected = F.linear(x, weight, base.bias.to(dtype))
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(found, x, g)
    torch.testing.assert_close(gradient, g @ weight)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (128, 64, (64, 128))
    assert layer.weight.dtype == base.weight.dtype
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@needs_bnb
def test_nothing_unpacked_is_kept_for_the_way_back():
    layer = QuantisedLinear(nn.Linear(128, 64).requires_grad_(False), "nf4")
    kept = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum()
    assert [t for t in kept if t.numel() >= 64 * 128] == []


@needs_bnb
def test_it_can_be_compiled_in_one_piece():
    layer = QuantisedLinear(nn.Linear(128, 64).requires_grad_(False), "nf4")
    x = torch.randn(4, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    gradients = [torch.autograd.grad(module(x).sum(), x)[0] for module in (compiled, layer)]
    torch.testing.assert_close(gradients[0], gradients[1])


@needs_bnb
def test_a_change_of_type_leaves_the_scales_alone():
    layer = QuantisedLinear(nn.Linear(128, 64), "nf4")
    codes, scales = layer.codes.clone(), layer.scales.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.codes, codes)


def test_without_bitsandbytes_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(SpectuneError, match="need bitsandbytes, which is not installed") as caught:
        quantise(matrix(), "nf4")
    assert caught.value.hint == "pip install 'spectune[bnb]'"


# ---------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def frames(source):
    return {
        layer.name: split_weight(layer_weight(source, layer), rank=4, store=torch.float32).low_rank
        for layer in build_catalogue(source)
    }


def residual_model(source, frames):
    model = build_model(source)
    injection = inject(model, frames, form="residual")
    with torch.no_grad():
        for name, layer in injection.layers.items():
            layer.base.weight -= product(frames[name])
    return model, injection


def answer(model):
    text = model.encode_text(tokenize(["a cat", "two dogs"], model.layout.te1.context))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return model.denoise(x, torch.tensor([10, 700]), text, torch.full((2, 6), 64.0))


@needs_bnb
def test_all_linear_layers_that_are_factored_and_no_others(source):
    model = build_model(source)
    wanted = [layer.name for layer in build_catalogue(source) if layer.kind is Kind.LINEAR]
    assert linear_layers(model) == wanted
    report = quantise_layers(model, None, "nf4")
    assert list(report.layers) == wanted
    found = {n for n, m in model.unet.named_modules() if isinstance(m, QuantisedLinear)}
    left = {n for n, m in model.unet.named_modules() if type(m) is nn.Linear}
    assert len(found) == sum(name.startswith("unet.") for name in wanted)
    assert left == {f"{at}.linear_{n}" for at in ("time_embedding", "add_embedding") for n in (1, 2)}
    assert type(model.te2.text_projection) is nn.Linear
    assert [part.part for part in report.parts] == [Part.UNET, Part.TE1, Part.TE2]


@needs_bnb
@pytest.mark.parametrize(
    ("adapted", "quantised"),
    [("unet", {"unet"}), ("te1", {"unet", "te1"}), ("te2", {"unet", "te2"}), ("", {"unet", "te1", "te2"})],
)
def test_encoders_that_are_not_trained_stay_whole(source, frames, adapted, quantised):
    model = build_model(source)
    if adapted:
        name = next(name for name in frames if name.startswith(f"{adapted}."))
        inject(model, {name: frames[name]}, form="residual")
    assert {name.partition(".")[0] for name in quantise_layers(model, None, "int8").layers} == quantised


@needs_bnb
@pytest.mark.parametrize(("kind", "bound"), [("nf4", 0.2), ("int8", 0.02)])
def test_a_quantised_residual_model_trains_and_is_close_to_the_original(source, frames, kind, bound):
    before = answer(build_model(source))
    model, injection = residual_model(source, frames)
    torch.testing.assert_close(answer(model), before, rtol=1e-3, atol=1e-4)
    quantise_layers(model, None, kind, frames=frames)
    after = answer(model)
    assert 1e-4 < (after - before).norm() / before.norm() < bound
    after.square().mean().backward()
    unused = f"te1.text_model.encoder.layers.{model.layout.te1.layers - 1}."
    for name, layer in injection.layers.items():
        if not name.startswith(unused):  # SDXL reads the state before it
            assert layer.up.grad.abs().sum() > 0, name
    quantised = {name for name, layer in injection.layers.items() if isinstance(layer.base, QuantisedLinear)}
    assert quantised == set(linear_layers(model))


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_report_is_the_error_of_the_weights(source, frames, kind):
    """The figures of one layer and one part against norms computed here from the original weights."""
    model, injection = residual_model(source, frames)
    report = quantise_layers(model, None, kind, frames=frames)
    layers = build_catalogue(source).by_name
    names = [name for name in report.layers if name.startswith("te2.")]
    weights = {name: layer_weight(source, layers[name]).float() for name in names}
    off = {n: injection.layers[n].base.weight + product(frames[n]) - w for n, w in weights.items()}
    norm = torch.cat([w.flatten() for w in weights.values()]).norm()
    expected = torch.cat([difference.flatten() for difference in off.values()]).norm() / norm
    part = report.parts[2]
    assert (part.part, part.layers) == (Part.TE2, len(names))
    assert part.residual_error == pytest.approx(float(expected), rel=1e-4)
    direct = torch.cat(
        [
            (dequantise(quantise(w, kind), kind, tuple(w.shape), torch.float32) - w).flatten()
            for w in weights.values()
        ]
    )
    assert part.weight_error == pytest.approx(float(direct.norm() / norm), rel=1e-3)
    left = torch.cat([(w - product(frames[n])).flatten() for n, w in weights.items()]).norm()
    assert part.residual_share == pytest.approx(float(left / norm), rel=1e-4)
    assert part.residual_error < part.weight_error, "the residual loses less than the weight"
    assert part.bytes_before == sum(w.numel() * 4 for w in weights.values())
    assert part.bytes_after < part.bytes_before * {"nf4": 0.16, "int8": 0.3}[kind]


@needs_bnb
def test_without_frames_both_errors_are_of_the_weight(source):
    report = quantise_layers(build_model(source), None, "int8")
    for part in report.parts:
        assert part.residual_share == 1.0
        assert part.residual_error == part.weight_error
    assert str(report.parts[1]).startswith("te1: 12 linear layers, ")
    assert "MB, weights off by 0." in str(report.parts[1])


@needs_bnb
def test_named_layers_only_and_none_twice(source):
    model = build_model(source)
    name = "te1.text_model.encoder.layers.0.mlp.fc1"
    assert list(quantise_layers(model, [name], "int8").layers) == [name]
    assert isinstance(model.te1.encoder.layers[0].mlp.fc1, QuantisedLinear)
    assert type(model.te1.encoder.layers[0].mlp.fc2) is nn.Linear
    with pytest.raises(InputError, match=f"{name} is quantised already"):
        quantise_layers(model, [name], "nf4")
    with pytest.raises(InputError, match=r"unet\.out\.2 is a Conv2d: only linear layers are quantised"):
        quantise_layers(model, ["unet.out.2"], "nf4")


@needs_bnb
def test_the_figures_of_the_documentation():
    """docs/reference/small-cards.md: the encoders of the embedded base at rank 16, relative to |W|."""
    with open_checkpoint(ROOT / "demo" / "base.safetensors") as base:
        model = build_model(base)
        frames = {
            layer.name: split_weight(layer_weight(base, layer), rank=16, store=torch.float32).low_rank
            for layer in build_catalogue(base)
            if layer.part is not Part.UNET
        }
    for name, frame in frames.items():
        parent, attribute = model.place(name)
        with torch.no_grad():
            getattr(parent, attribute).weight -= product(frame)
    found = quantise_layers(model, frames, "nf4", frames=frames).parts
    assert [part.part for part in found] == [Part.TE1, Part.TE2]
    page = (ROOT / "docs" / "reference" / "small-cards.md").read_text(encoding="utf-8")
    for part in found:
        figures = (part.residual_share, part.residual_error, part.weight_error)
        row = f"{part.part} | {figures[0]:.1%} | {figures[1]:.2%} | {figures[2]:.2%} |".replace("%", " %")
        assert row in page
