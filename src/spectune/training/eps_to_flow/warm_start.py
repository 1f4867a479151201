"""The warm start: refit the few UNet layers that depend on the noise level, in closed form.

The network of an EPS model expects (alpha+sigma) x_flow and the timestep t(s), and predicts eps. A flow model
gets x_flow and 1000 s and predicts the velocity. Linear least squares approximate this before any training:

* time_embed: the first layer is refit to map 1000 s to the hidden values that it had for t(s), and the second
  layer is refit to give the same embedding.
* conv_in: its weight is multiplied by the mean of alpha+sigma. The norms after it compensate the rest.
* conv_out: it is refit from its input features to the velocity of the exact bridge.

A low-rank change cannot hold these changes of biases and full-rank weights. The trained file stores the
complete tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectune.model.network import Sdxl
from spectune.model.prediction import TRAIN_STEPS
from spectune.sdxl.state_dicts import state_views
from spectune.training.data.dataset import Batch
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.eps_to_flow.conversion import REPLACED_MODULES, base_module
from spectune.training.objective.noising import NoisedBatch
from spectune.training.objective.objective import Objective

TIME_GRID = 4096  # noise levels that the embedding is fitted at
MEASURED_BATCHES = 4
# Ridge terms, relative to the mean squared feature. They keep the weights of directions that the data hardly
# contains. conv_out needs a large one: with a small one, the loss starts lower, but the weights get large and
# the layer learns slowly (experiments/LOG.md, 2026-11-25).
TIME_RIDGE, OUTPUT_RIDGE = 1e-4, 1.0

FirstBatches = Callable[
    [int], Iterable[Batch]
]  # count -> the first batches of the run, the same at each call


@torch.no_grad()
def fit_warm_start(objective: Objective, first_batches: FirstBatches, *, batches: int, pixels: int) -> str:
    """Refit the model in place and return a log line with its error against the exact bridge.

    Args:
        objective: The objective of the run, with a conversion.
        first_batches: Returns the first batches of the run.
        batches: The number of batches that conv_out is fitted on.
        pixels: The area of a training image.
    """
    conversion, model = objective.conversion, objective.denoiser.model
    assert conversion is not None
    levels = objective.prediction.even_times(TIME_GRID, pixels=pixels)
    objective.denoiser.eval()
    before = _relative_error(objective, first_batches)
    for refit in (refit_time, rescale_input):
        conversion.swapped.put(model, refit(model, conversion.bridge, levels))
    between = _relative_error(objective, first_batches)
    pairs = _output_and_target(objective, first_batches(batches))
    conversion.swapped.put(model, refit_output(model, pairs))
    after = _relative_error(objective, first_batches)
    return (
        f"error of the velocity against the exact bridge: {before:.2f} before the warm start, {between:.2f} "
        f"after refitting the time embedding and conv_in, {after:.2f} after refitting conv_out"
    )


def _output_and_target(
    objective: Objective, batches: Iterable[Batch]
) -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
    """Yield, for each batch, a function that runs the network and the teacher's velocity."""
    for batch in batches:
        noised = objective.noised(batch)
        target = objective.with_teacher(noised, batch).target
        yield lambda n=noised, b=batch: _predict_as_flow(objective, n, b), target


def _predict_as_flow(objective: Objective, noised: NoisedBatch, batch: Batch) -> Tensor:
    return objective.denoiser(noised.latents, noised.timestep, batch.captions, batch.time_ids)


def _relative_error(objective: Objective, first_batches: FirstBatches) -> float:
    """Return the squared error against the teacher's velocity, relative to its squared norm."""
    error = size = 0.0
    for predict, target in _output_and_target(objective, first_batches(MEASURED_BATCHES)):
        error += float((predict() - target).square().sum())
        size += float(target.square().sum())
    return error / size


def refit_time(model: Sdxl, bridge: Bridge, levels: Tensor) -> dict[str, Tensor]:
    """Return both layers of time_embed, fitted so that 1000 s gives the embedding of t(s).

    `levels` (count,) are the noise levels s to fit at. The fit is computed in float64.
    """
    first, second = (base_module(model, path) for path in REPLACED_MODULES[:2])
    (w1, b1), (w2, b2) = (_weight_and_bias(layer) for layer in (first, second))
    inputs, old_inputs = (
        model.unet.time_proj(times).double() for times in (TRAIN_STEPS * levels, bridge.timestep(levels))
    )  # (count, sinusoids)
    hidden = old_inputs @ w1.T + b1  # (count, width)
    w1_new, b1_new = _refit(inputs, hidden, w1, b1)
    w2_new, b2_new = _refit(F.silu(inputs @ w1_new.T + b1_new), F.silu(hidden) @ w2.T + b2, w2, b2)
    return _named(model, {REPLACED_MODULES[0]: (w1_new, b1_new), REPLACED_MODULES[1]: (w2_new, b2_new)})


def rescale_input(model: Sdxl, bridge: Bridge, levels: Tensor) -> dict[str, Tensor]:
    """Return conv_in with its weight times the mean of c_in = alpha + sigma over `levels` (count,)."""
    weight, bias = _weight_and_bias(base_module(model, "conv_in"))
    return _named(model, {"conv_in": (weight * float(bridge.at(levels).c_in.double().mean()), bias)})


def refit_output(model: Sdxl, pairs: Iterable[tuple[Callable[[], Tensor], Tensor]]) -> dict[str, Tensor]:
    """Return conv_out fitted to the velocities by ridge regression towards its current weights.

    Each pair is a function that runs the network on a batch, and the velocity (batch, channels, h, w) to fit.
    """
    layer = base_module(model, "conv_out")
    assert isinstance(layer, nn.Conv2d)
    features: list[Tensor] = []

    def maps_and_outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for predict, target in pairs:
            features.clear()
            predict()
            yield from zip(features[-1], target, strict=True)

    hook = layer.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
    try:
        fitted = fitted_convolution(layer, maps_and_outputs(), ridge=OUTPUT_RIDGE)
    finally:
        hook.remove()
    return _named(model, {"conv_out": fitted})


def fitted_convolution(
    layer: nn.Conv2d, pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return weight and bias near those of `layer` that map inputs (in, h, w) to outputs (out, h, w).

    `ridge` is relative to the mean squared input. The results are float64, on the CPU.
    """
    weight, bias = _weight_and_bias(layer)
    gram = torch.zeros(weight[0].numel() + 1, weight[0].numel() + 1, dtype=torch.float64)
    cross = torch.zeros(len(gram), len(weight), dtype=torch.float64)
    for maps, output in pairs:
        rows = _with_ones(_patches(maps.float(), layer))  # (h*w, in*kh*kw + 1)
        gram += (rows.T @ rows).cpu().double()
        cross += (rows.T @ output.flatten(1).T.to(rows)).cpu().double()
    before = torch.cat([weight.flatten(1), bias[:, None]], dim=1).T  # (in*kh*kw + 1, out)
    fitted = (before + _ridge(gram, cross - gram @ before, ridge)).T
    return fitted[:, :-1].reshape(weight.shape), fitted[:, -1]


def _refit(inputs: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias near the given ones that map inputs (count, in) to outputs (count, out)."""
    rows = _with_ones(inputs)
    before = torch.cat([weight, bias[:, None]], dim=1).T
    fitted = (before + _ridge(rows.T @ rows, rows.T @ (outputs - rows @ before), TIME_RIDGE)).T
    return fitted[:, :-1], fitted[:, -1]


def _ridge(gram: Tensor, cross: Tensor, share: float) -> Tensor:
    """Return (gram + share * mean(diagonal) * I)^-1 cross, float64."""
    return torch.linalg.solve(gram + share * gram.diagonal().mean() * torch.eye(len(gram)).double(), cross)


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _patches(maps: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return the input patches of a convolution over maps (in, h, w), as (h*w, in*kh*kw)."""
    where: dict[str, Any] = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
    return F.unfold(maps[None], layer.kernel_size, **where)[0].T


def _weight_and_bias(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()


def _named(model: Sdxl, fitted: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    names = {key: view.tensor for key, view in state_views(model.layout, "unet").items()}
    return {
        names[f"{path}.{kind}"]: tensor.float()
        for path, pair in fitted.items()
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }
