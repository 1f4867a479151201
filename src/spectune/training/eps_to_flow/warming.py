"""The warm start of a run: its closed forms on the run's own first pictures, and how near they come."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectune.training.data.dataset import Batch
from spectune.training.eps_to_flow.warm_start import Asked, refit_output, refit_time, rescale_input
from spectune.training.objective.requests import Questions
from spectune.training.objective.target import Question

TIME_GRID = 4096  # noise levels that the embedding is fitted at
MEASURED_BATCHES = 4


@torch.no_grad()
def warm_start(asking: Questions, *, images: int, device: torch.device) -> list[str]:
    """Refit the model in place; lines that say how far its velocities are from those of the exact bridge."""
    conversion, model = asking.conversion, asking.prepared.model
    assert conversion is not None
    batches = -(-images // asking.plan.batch)
    pixels = asking.pictures.targets[0].width * asking.pictures.targets[0].height
    levels = asking.prediction.even_times(TIME_GRID, pixels=pixels)
    asking.denoiser.eval()
    before = _distance(asking, device)
    for refit in (refit_time, rescale_input):
        conversion.warm.put(model, refit(model, conversion.bridge, levels))
    between = _distance(asking, device)
    conversion.warm.put(model, refit_output(model, _asked(asking, batches, device)))
    after = _distance(asking, device)
    return [
        f"error of the velocity against the exact bridge: {before:.2f} as it was, {between:.2f} with "
        f"noise levels refit, {after:.2f} with the output refit too"
    ]


def _asked(asking: Questions, count: int, device: torch.device) -> Iterator[Asked]:
    for batch, question in asking.first(count, device):
        taught = asking.taught(question, batch)
        yield Asked(taught.target, lambda b=batch, q=question: _raw(asking, q, b))


def _raw(asking: Questions, question: Question, batch: Batch) -> Tensor:
    return asking.denoiser(question.noised, question.timestep, batch.captions, batch.time_ids)


def _distance(asking: Questions, device: torch.device) -> float:
    """Squared error of the velocities against the teacher's, relative to their squares."""
    error = size = 0.0
    for batch, question in asking.first(MEASURED_BATCHES, device):
        wanted = asking.taught(question, batch).target
        error += float((_raw(asking, question, batch) - wanted).square().sum())
        size += float(wanted.square().sum())
    return error / size
