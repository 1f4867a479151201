"""Injected adapters: both forms compute the same function and gradients, and nothing changes at step 0."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.model.inject import AdaptedLayer, inject
from spectune.model.network import PlainAttention, build_model
from spectune.sdxl.layers import build_catalogue, layer_weight


def double_model(source):
    return build_model(source, dtype=torch.float64)


def residual_source(source, frames):
    """Return the source with R = W - B0 A0 in float64, so that the two forms agree beyond float32."""
    values = {
        name: value.double() if value.is_floating_point() else value for name, value in source.values.items()
    }
    for layer in build_catalogue(source):
        if layer.name not in frames:
            continue
        frame = frames[layer.name]
        principal = frame.scale * (frame.up.flatten(1).double() @ frame.down.flatten(1).double()).view(
            layer.shape
        )
        changed = values[layer.tensor].clone()
        changed[layer.row_slice] -= principal
        values[layer.tensor] = changed
    return MemorySource(values, source.metadata)


def test_the_delta_form_equals_the_original_bit_for_bit_at_step_0(source, frames, predict):
    model = build_model(source)
    before = predict(model)
    inject(model, frames)
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_linear_layer_is_exact_for_transposed_inputs(tokens, width):
    """Attention blocks pass (batch, height * width, channels) as a transposed view."""
    torch.manual_seed(0)
    base = torch.nn.Linear(width, width).requires_grad_(False)  # as in training
    x = torch.randn(2, width, tokens).transpose(1, 2)
    frame = torch.randn(4, width)
    layer = AdaptedLayer(
        base, LowRank(down=frame, up=torch.randn(width, 4), alpha=4.0), "delta", torch.float32
    )
    assert torch.equal(layer(x), base(x))


def test_both_forms_agree_in_outputs_gradients_and_steps(source, frames, predict):
    # a quarter of the layers covers both kinds and all parts; all layers would take minutes
    frames = dict(list(frames.items())[::4])
    delta_model, residual_model = double_model(source), double_model(residual_source(source, frames))
    delta = inject(delta_model, frames, form="delta", dtype=torch.float64)
    residual = inject(residual_model, frames, form="residual", dtype=torch.float64)
    optimizers = [torch.optim.AdamW(i.parameters(), lr=4e-3, weight_decay=0.0) for i in (delta, residual)]
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for _ in range(5):
        outputs = [predict(delta_model), predict(residual_model)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
        for one, other in zip(delta.parameters(), residual.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    for name, layer in delta.layers.items():
        pairs = zip(layer.trained_change(), residual.layers[name].trained_change(), strict=True)
        for one, other in pairs:
            assert (one - other).abs().max() <= 1e-10, name
    assert max(float(tensor.abs().max()) for tensor in delta.parameters()) > 1e-2  # something was trained


def test_trainable_tensors_get_gradients_and_the_base_gets_none(source, frames, predict):
    model = build_model(source)
    injection = inject(model, frames)
    predict(model).square().mean().backward()
    unused = {
        f"te1.text_model.encoder.layers.{model.layout.te1.layers - 1}."
    }  # SDXL reads the state before it
    for name, layer in injection.layers.items():
        if not any(name.startswith(prefix) for prefix in unused):
            assert layer.up.grad is not None, name
            assert layer.up.grad.abs().sum() > 0, name
        assert layer.base.weight.grad is None


def test_an_injected_change_equals_the_merged_weight(source, frames, predict):
    """Compare the injected change with a network whose weights are W + scale*(dB (A0+dA) + B0 dA)."""
    from spectune.core.delta import change

    model, merged = build_model(source), build_model(source)
    injection = inject(model, frames)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in injection.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 1e-2)
    for name, delta in injection.deltas().items():
        parent, attribute = merged.place(name)
        with torch.no_grad():
            getattr(parent, attribute).weight += change(delta)
    torch.testing.assert_close(predict(model), predict(merged), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(predict(build_model(source)), predict(merged), rtol=1e-3, atol=1e-4)


def test_alpha_scales_the_frame(source, frames):
    name = next(iter(frames))
    frame = frames[name]
    halved = {name: LowRank(down=frame.down, up=frame.up, alpha=frame.rank / 2)}
    model = build_model(source)
    layer = inject(model, halved).layers[name]
    with torch.no_grad():
        layer.up.fill_(0.1)
    x = torch.randn(1, *frame.down.shape[1:2], *([6, 6] if frame.down.ndim == 4 else []))
    full = inject(build_model(source), {name: frame}).layers[name]
    with torch.no_grad():
        full.up.fill_(0.1)
    torch.testing.assert_close(layer(x) - layer.base(x), (full(x) - full.base(x)) / 2, rtol=1e-3, atol=1e-5)


def test_switching_off_and_ejecting_give_the_original(source, frames, predict):
    model = build_model(source)
    before = predict(model)
    injection = inject(model, frames)
    with torch.no_grad():
        for tensor in injection.parameters():
            tensor.add_(0.05)
    assert not torch.equal(predict(model), before)
    with injection.switched_off():
        assert torch.equal(predict(model), before)
    injection.eject()
    assert torch.equal(predict(model), before)


def test_moving_the_model_moves_the_adapters(source, frames):
    model = build_model(source)
    injection = inject(model, frames)
    model.unet.to(torch.float64)
    layer = next(iter(injection.layers.values()))
    assert {layer.base.weight.dtype, layer.down.dtype, layer.frame_up.dtype} == {torch.float64}


@pytest.mark.slow
def test_a_saved_change_loads_in_either_form(source, frames):
    first = inject(build_model(source), frames)
    with torch.no_grad():
        for tensor in first.parameters():
            tensor.fill_(1e-3)
    for form in ("delta", "residual"):
        second = inject(build_model(source), frames, form=form)
        second.load(first.deltas())
        for name, delta in second.deltas().items():
            torch.testing.assert_close(delta.up, first.deltas()[name].up, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="differ in 1 layer: "):
        second.load(dict(list(first.deltas().items())[1:]))


def test_a_frame_of_another_shape_is_an_error(source, frames):
    name, frame = next(iter(frames.items()))
    wrong = LowRank(down=frame.down[:, :-1], up=frame.up, alpha=frame.alpha)
    with pytest.raises(InputError, match=f"{name}: the frame is for a weight of shape"):
        inject(build_model(source), {name: wrong})


def test_subtracting_a_frame_reduces_the_norm_of_the_weight(source, frames):
    name, frame = next(iter(frames.items()))
    layer = build_catalogue(source).by_name[name]
    weight = layer_weight(source, layer).float()
    assert (weight - product(frame)).norm() < weight.norm()


@pytest.mark.parametrize("form", ["delta", "residual"])
def test_an_outer_autocast_changes_nothing(form, source, frames, predict, monkeypatch):
    """As on CUDA: norms return float32, other layers the dtype of autocast."""
    model = build_model(source, dtype=torch.bfloat16)
    injection = inject(model, frames, form=form)
    with torch.no_grad():
        for tensor in injection.parameters():
            tensor.add_(0.01)

    def step():
        for tensor in injection.parameters():
            tensor.grad = None
        loss = predict(model).float().square().mean()
        loss.backward()
        return float(loss), {name: layer.up.grad for name, layer in injection.layers.items()}

    loss, gradients = step()
    for name in ("layer_norm", "group_norm"):
        plain = getattr(torch.nn.functional, name)

        def in_float32(x, *args, plain=plain, **kwargs):
            inputs = [a.float() if isinstance(a, torch.Tensor) else a for a in (x, *args)]
            kwargs = {key: a.float() if isinstance(a, torch.Tensor) else a for key, a in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return plain(*inputs, **kwargs)

        monkeypatch.setattr(torch.nn.functional, name, in_float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_inside, gradients_inside = step()
    assert loss_inside == pytest.approx(loss, rel=0.02)
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert gradients_inside[name].dtype is torch.float32
            torch.testing.assert_close(gradients_inside[name], gradient, rtol=0.2, atol=0.05 * largest)


@pytest.mark.slow
def test_a_checkpointed_block_compiles_without_a_graph_break() -> None:
    def adapted_block() -> tuple[nn.Module, list[AdaptedLayer]]:
        torch.manual_seed(0)
        block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).bfloat16().requires_grad_(False)
        layers: list[AdaptedLayer] = []
        for module in list(block.modules()):
            if isinstance(module, Attention):
                module.set_processor(PlainAttention())
            for name, base in list(module.named_children()):
                if type(base) is nn.Linear:
                    frame = LowRank(torch.randn(4, base.in_features), torch.randn(base.out_features, 4), 4.0)
                    layers.append(AdaptedLayer(base, frame, "delta", torch.float32))
                    setattr(module, name, layers[-1])
        for layer in layers:
            layer.joined_factors.prepare(torch.bfloat16)  # as before a training
        return block.train(), layers

    x, context = torch.randn(2, 20, 32).bfloat16().requires_grad_(), torch.randn(2, 7, 24).bfloat16()
    gradients: list[list[Tensor]] = []
    for compiles in (False, True):
        block, layers = adapted_block()
        if compiles:
            torch._dynamo.utils.counters.clear()
            block.compile(backend="aot_eager")
        checkpoint(block, x, None, context, use_reentrant=False).float().square().sum().backward()
        gradients.append([layer.up.grad for layer in layers if layer.up.grad is not None])
    assert len(gradients[0]) == len(layers) == 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]
