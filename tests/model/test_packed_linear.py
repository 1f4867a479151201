"""Packed weights against values computed by hand."""

import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectune.errors import SpectuneError
from spectune.model.packed_linear import PackedLinear, pack, unpack

needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

# Dettmers et al. 2023, appendix E: the 16 values of a 4-bit normal float
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
# bounds of the relative error of normally distributed weights; nf4 by the table above: 0.0918
RELATIVE = {"nf4": (0.08, 0.1), "int8": (0.004, 0.012)}


def matrix(rows=64, columns=128, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def nearest_nf4(weight):
    """Scale each block of 64 weights by its largest magnitude and round to the nearest table entry."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    index = (blocks[..., None] / scale[..., None] - table).abs().argmin(dim=-1)
    return (table[index] * scale).view_as(weight)


def nearest_int8(weight):
    scale = weight.half().float().abs().amax(dim=1, keepdim=True) / 127
    return (weight.half().float() / scale).round() * scale


@needs_bnb
@pytest.mark.parametrize(("packing", "by_hand"), [("nf4", nearest_nf4), ("int8", nearest_int8)])
def test_weights_are_rounded_to_the_nearest_value_of_the_format(packing, by_hand):
    weight = matrix()
    packed = pack(weight, packing)
    result = unpack(packed, packing, (64, 128), torch.float32)
    # half a step is 1e-3 in int8 and 4e-3 in nf4; weights half way between two values may round either way
    wrong = (result - by_hand(weight)).abs() > 1e-6
    assert wrong.float().mean() < 1e-3
    low, high = RELATIVE[packing]
    assert low < (result - weight).norm() / weight.norm() < high
    assert packed.codes.nbytes == weight.numel() * {"nf4": 0.5, "int8": 1}[packing]
    assert packed.scales.dtype == torch.float32


@needs_bnb
@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_zeros_stay_zeros(packing):
    weight = matrix()
    weight[:8] = 0
    result = unpack(pack(weight, packing), packing, (64, 128), torch.float32)
    assert torch.equal(result[:8], weight[:8])


@needs_bnb
@pytest.mark.parametrize("packing", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_layer_equals_a_linear_layer_with_its_unpacked_weight(packing, dtype):
    base = nn.Linear(128, 64).requires_grad_(False)
    layer = PackedLinear(base, packing)
    x = torch.randn(2, 5, 128, dtype=dtype, requires_grad=True)
    weight = layer.unpacked(dtype)
    expected = F.linear(x, weight, base.bias.to(dtype))
    result = layer(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
    g = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(result, x, g)
    torch.testing.assert_close(gradient, g @ weight)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (128, 64, (64, 128))
    assert layer.weight.dtype == base.weight.dtype
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@needs_bnb
def test_no_unpacked_weight_is_saved_for_the_backward_pass():
    layer = PackedLinear(nn.Linear(128, 64).requires_grad_(False), "nf4")
    saved = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum()
    assert [t for t in saved if t.numel() >= 64 * 128] == []


@needs_bnb
def test_it_compiles_without_a_graph_break():
    layer = PackedLinear(nn.Linear(128, 64).requires_grad_(False), "nf4")
    x = torch.randn(4, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    gradients = [torch.autograd.grad(module(x).sum(), x)[0] for module in (compiled, layer)]
    torch.testing.assert_close(gradients[0], gradients[1])


@needs_bnb
def test_a_change_of_dtype_keeps_the_scales():
    layer = PackedLinear(nn.Linear(128, 64), "nf4")
    codes, scales = layer.codes.clone(), layer.scales.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, scales)
    assert torch.equal(layer.codes, codes)


def test_without_bitsandbytes_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(SpectuneError, match="needs bitsandbytes, which is not installed") as caught:
        pack(matrix(), "nf4")
    assert caught.value.hint == 'pip install "spectune[bnb]"'
