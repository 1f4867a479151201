"""A closed-form start for a flow model: refit the few layers through which a UNet learns of noise levels.

The network of an EPS model wants (alpha+sigma) x_flow and the timestep t(s), and answers eps; a flow model is
fed x_flow and 1000 s and answers the velocity. Linear least squares bring it near, before any training:

* time_embed: the first layer is refit so that 1000 s gives the hidden numbers that t(s) gave, the second so
  that the embedding comes out the same;
* conv_in takes the mean of (alpha+sigma) into its weight (the norms behind it forgive the rest);
* conv_out is refit from the features in front of it to the velocity that the exact bridge gives.

They have biases and full ranks, which no low-rank change holds, so the trained file carries them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectune.model.inject import AdaptedLayer
from spectune.model.network import Sdxl
from spectune.model.prediction import TRAIN_STEPS
from spectune.sdxl.state_dicts import state_views
from spectune.training.eps_to_flow.bridge import Bridge

PATHS = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out")
# Of the mean squared feature: keeps directions that the data hardly has where they were. conv_out has much:
# refit freely it begins lower, has large weights and then learns slowly (experiments/LOG.md, 2026-11-25).
TIME_RIDGE, OUTPUT_RIDGE = 1e-4, 1.0


@dataclass(frozen=True)
class Asked:
    """What conv_out is refit to: a question, and the velocity that is wanted."""

    velocity: Tensor  # (batch, channels, h, w) float32
    answer: Callable[[], Tensor]  # the network's own, read as that of a flow model


@dataclass
class WarmStart:
    """Tensors of the UNet that stand in for those of the base, by their names in a checkpoint."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # float32, on the CPU
    _swapped: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[nn.Parameter, Tensor, Tensor]]
    )  # parameter, its numbers in the base, those that stand in

    def put(self, model: Sdxl, tensors: Mapping[str, Tensor]) -> None:
        """Let tensors stand in, in the type and on the device of the model's own."""
        for name, parameter in parameters(model).items():
            if name in tensors:
                before = self._swapped[name][1] if name in self._swapped else parameter.data
                after = tensors[name].to(before.device, before.dtype)
                parameter.data = after
                self._swapped[name] = (parameter, before, after)
        self.tensors = {**self.tensors, **{name: t.detach().float().cpu() for name, t in tensors.items()}}

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within, the model has the tensors of its base."""
        for parameter, before, _ in self._swapped.values():
            parameter.data = before
        try:
            yield
        finally:
            for parameter, _, after in self._swapped.values():
                parameter.data = after


def parameters(model: Sdxl) -> dict[str, nn.Parameter]:
    """The parameters that a warm start replaces, by their names in a checkpoint."""
    names = {key: view.tensor for key, view in state_views(model.layout, "unet").items()}
    return {
        names[f"{path}.{kind}"]: getattr(_module(model, path), kind)
        for path in PATHS
        for kind in ("weight", "bias")
    }


def refit_time(model: Sdxl, bridge: Bridge, levels: Tensor) -> dict[str, Tensor]:
    """Both layers of time_embed, float64, so that 1000 s gives what t(s) gave at the noise levels (count,).

    Hidden numbers and embeddings are fitted with the levels' own density.
    """
    first, second = (_module(model, path) for path in PATHS[:2])
    (w1, b1), (w2, b2) = (_numbers(layer) for layer in (first, second))
    seen, wanted = (
        model.unet.time_proj(times).double() for times in (TRAIN_STEPS * levels, bridge.timestep(levels))
    )  # (count, sinusoids)
    hidden = wanted @ w1.T + b1  # (count, width)
    w1_new, b1_new = _refit(seen, hidden, w1, b1)
    w2_new, b2_new = _refit(F.silu(seen @ w1_new.T + b1_new), F.silu(hidden) @ w2.T + b2, w2, b2)
    return _named(model, {PATHS[0]: (w1_new, b1_new), PATHS[1]: (w2_new, b2_new)})


def rescale_input(model: Sdxl, bridge: Bridge, levels: Tensor) -> dict[str, Tensor]:
    """conv_in with the mean of c_in = alpha + sigma over the noise levels (count,) in its weight."""
    weight, bias = _numbers(_module(model, "conv_in"))
    return _named(model, {"conv_in": (weight * float(bridge.at(levels).c_in.double().mean()), bias)})


def refit_output(model: Sdxl, questions: Iterable[Asked]) -> dict[str, Tensor]:
    """conv_out so that the features in front of it give the velocities of these questions, near its own."""
    layer = _module(model, "conv_out")
    assert isinstance(layer, nn.Conv2d)
    weight, bias = _numbers(layer)
    gram = torch.zeros(weight[0].numel() + 1, weight[0].numel() + 1, dtype=torch.float64)
    cross = torch.zeros(len(gram), len(weight), dtype=torch.float64)
    features: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: features.append(args[0].detach().float()))
    try:
        for question in questions:
            features.clear()
            question.answer()
            for maps, velocity in zip(features[-1], question.velocity, strict=True):
                rows = _with_ones(_patches(maps, layer))  # (h*w, in*kh*kw + 1)
                gram += (rows.T @ rows).cpu().double()
                cross += (rows.T @ velocity.flatten(1).T.to(rows)).cpu().double()
    finally:
        hook.remove()
    before = torch.cat([weight.flatten(1), bias[:, None]], dim=1).T  # (in*kh*kw + 1, out)
    found = (before + _ridge(gram, cross - gram @ before, OUTPUT_RIDGE)).T
    return _named(model, {"conv_out": (found[:, :-1].reshape(weight.shape), found[:, -1])})


def _refit(inputs: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for inputs (count, in) and outputs (count, out), near those that are given."""
    rows = _with_ones(inputs)
    before = torch.cat([weight, bias[:, None]], dim=1).T
    found = (before + _ridge(rows.T @ rows, rows.T @ (outputs - rows @ before), TIME_RIDGE)).T
    return found[:, :-1], found[:, -1]


def _ridge(gram: Tensor, cross: Tensor, share: float) -> Tensor:
    """(gram + share * mean of its diagonal)^-1 cross, float64."""
    return torch.linalg.solve(gram + share * gram.diagonal().mean() * torch.eye(len(gram)).double(), cross)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _patches(maps: Tensor, layer: nn.Conv2d) -> Tensor:
    """What each output of a convolution sees of (in, h, w), (h*w, in*kh*kw)."""
    where: dict[str, Any] = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
    return F.unfold(maps[None], layer.kernel_size, **where)[0].T


def _module(model: Sdxl, path: str) -> nn.Linear | nn.Conv2d:
    """The module at a path of the UNet, below its trained change if it has one."""
    found = model.unet.get_submodule(path)
    if isinstance(found, AdaptedLayer):
        return found.base
    assert isinstance(found, nn.Linear | nn.Conv2d), path
    return found


def _numbers(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()


def _named(model: Sdxl, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    names = {key: view.tensor for key, view in state_views(model.layout, "unet").items()}
    return {
        names[f"{path}.{kind}"]: tensor.float()
        for path, pair in found.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }
