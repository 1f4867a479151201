"""Quantized base layers of a complete model, and the error of their weights."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import product
from spectune.core.split import split_weight
from spectune.errors import InputError
from spectune.model.inject import inject
from spectune.model.network import build_model
from spectune.model.packed_linear import PackedLinear, pack, unpack
from spectune.model.quantize import linear_layers, quantize_layers
from spectune.sdxl.layers import Kind, build_catalogue, layer_weight
from spectune.sdxl.names import Part

ROOT = Path(__file__).parents[2]
needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def residual_model(source, frames):
    model = build_model(source)
    injection = inject(model, frames, form="residual")
    with torch.no_grad():
        for name, layer in injection.layers.items():
            layer.base.weight -= product(frames[name])
    return model, injection


@needs_bnb
def test_exactly_the_factored_linear_layers_are_quantized_by_default(source):
    model = build_model(source)
    expected = [layer.name for layer in build_catalogue(source) if layer.kind is Kind.LINEAR]
    assert linear_layers(model) == expected
    parts = quantize_layers(model, "nf4")
    assert sum(part.layers for part in parts) == len(expected)
    packed = {n for n, m in model.unet.named_modules() if isinstance(m, PackedLinear)}
    unpacked = {n for n, m in model.unet.named_modules() if type(m) is nn.Linear}
    assert len(packed) == sum(name.startswith("unet.") for name in expected)
    assert unpacked == {f"{at}.linear_{n}" for at in ("time_embedding", "add_embedding") for n in (1, 2)}
    assert type(model.te2.text_projection) is nn.Linear
    assert [part.part for part in parts] == [Part.UNET, Part.TE1, Part.TE2]


@needs_bnb
@pytest.mark.parametrize(
    ("adapted", "quantized"),
    [("unet", {"unet"}), ("te1", {"unet", "te1"}), ("te2", {"unet", "te2"}), ("", {"unet", "te1", "te2"})],
)
def test_text_encoders_without_adapters_are_not_quantized(source, frames, adapted, quantized):
    model = build_model(source)
    if adapted:
        name = next(name for name in frames if name.startswith(f"{adapted}."))
        inject(model, {name: frames[name]}, form="residual")
    assert {part.part.value for part in quantize_layers(model, "int8")} == quantized


@needs_bnb
@pytest.mark.parametrize(("packing", "bound"), [("nf4", 0.2), ("int8", 0.02)])
def test_a_quantized_residual_model_trains_close_to_the_original(source, frames, predict, packing, bound):
    before = predict(build_model(source))
    model, injection = residual_model(source, frames)
    torch.testing.assert_close(predict(model), before, rtol=1e-3, atol=1e-4)
    quantize_layers(model, packing, frames=frames)
    after = predict(model)
    assert 1e-4 < (after - before).norm() / before.norm() < bound
    after.square().mean().backward()
    unused = f"te1.text_model.encoder.layers.{model.layout.te1.layers - 1}."
    for name, layer in injection.layers.items():
        if not name.startswith(unused):  # SDXL reads the state before it
            assert layer.up.grad.abs().sum() > 0, name
    quantized = {name for name, layer in injection.layers.items() if isinstance(layer.base, PackedLinear)}
    assert quantized == set(linear_layers(model))


@needs_bnb
@pytest.mark.slow
@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_the_report_gives_the_relative_error_of_the_weights(source, frames, packing):
    """Compare the figures of one part with norms computed here from the original weights."""
    model, injection = residual_model(source, frames)
    parts = quantize_layers(model, packing, frames=frames)
    layers = build_catalogue(source).by_name
    names = [name for name in injection.layers if name in linear_layers(model) and name.startswith("te2.")]
    weights = {name: layer_weight(source, layers[name]).float() for name in names}
    errors = {n: injection.layers[n].base.weight + product(frames[n]) - w for n, w in weights.items()}
    norm = torch.cat([w.flatten() for w in weights.values()]).norm()
    expected = torch.cat([difference.flatten() for difference in errors.values()]).norm() / norm
    part = parts[2]
    assert (part.part, part.layers) == (Part.TE2, len(names))
    assert part.residual_error == pytest.approx(float(expected), rel=1e-4)
    direct = torch.cat(
        [
            (unpack(pack(w, packing), packing, tuple(w.shape), torch.float32) - w).flatten()
            for w in weights.values()
        ]
    )
    assert part.weight_error == pytest.approx(float(direct.norm() / norm), rel=1e-3)
    residual = torch.cat([(w - product(frames[n])).flatten() for n, w in weights.items()]).norm()
    assert part.residual_share == pytest.approx(float(residual / norm), rel=1e-4)
    assert part.residual_error < part.weight_error, "quantizing the residual causes a smaller error"
    assert part.bytes_before == sum(w.numel() * 4 for w in weights.values())
    assert part.bytes_after < part.bytes_before * {"nf4": 0.16, "int8": 0.3}[packing]


@needs_bnb
def test_without_frames_both_errors_are_equal(source):
    parts = quantize_layers(build_model(source), "int8")
    for part in parts:
        assert part.residual_share == 1.0
        assert part.residual_error == part.weight_error
    assert str(parts[1]).startswith("te1: 12 linear layers, ")
    assert "MB, error of the weights 0." in str(parts[1])


@needs_bnb
def test_layers_are_quantized_only_once(source):
    model = build_model(source)
    quantize_layers(model, "int8")
    with pytest.raises(InputError, match="is already quantized"):
        quantize_layers(model, "nf4")


@needs_bnb
def test_the_documentation_shows_the_measured_errors():
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
    _, *encoders = quantize_layers(model, "nf4", frames=frames)
    page = (ROOT / "docs" / "reference" / "small-cards.md").read_text(encoding="utf-8")
    for part in encoders:
        figures = (part.residual_share, part.residual_error, part.weight_error)
        row = f"{part.part} | {figures[0]:.1%} | {figures[1]:.2%} | {figures[2]:.2%} |".replace("%", " %")
        assert row in page
