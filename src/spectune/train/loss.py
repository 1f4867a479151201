"""What a wrong answer costs. Each loss maps (answer, target), both (batch, ...) float32, to costs of the
same leading axis; the mean over all other axes is the cost of an image.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def mse(answer: Tensor, target: Tensor) -> Tensor:
    """(answer - target)^2, elementwise (Ho et al. 2020, eq. 14)."""
    return (answer - target).square()


LOSSES: dict[str, Loss] = {"mse": mse}


def per_image(costs: Tensor) -> Tensor:
    """Mean cost of each image, shape (batch,)."""
    return costs.flatten(1).mean(1)
