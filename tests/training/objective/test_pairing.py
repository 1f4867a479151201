"""The assignment of noises to images, by hand and against all orders."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from spectune.model.prediction import Flow
from spectune.training.objective.noising import NoiseOptions, noise_at_random
from spectune.training.objective.pairing import optimal_order
from spectune.training.seeds import derived_generator


def images(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_the_order_by_hand() -> None:
    # squared distances to 1.2 and 1.9: of 1: 0.04, 0.81; of 2: 0.64, 0.01
    assert optimal_order(images(2.0, 1.0), images(1.2, 1.9)) == [1, 0]
    assert optimal_order(images(1.0, 2.0), images(1.2, 1.9)) == [0, 1]
    # the nearest noise of both is the first: 1 + 100 is less than 4 + 121
    assert optimal_order(images(1.0, 2.0), images(0.0, -10.0)) == [1, 0]
    assert optimal_order(images(7.0), images(1.0)) == [0]


def test_the_sum_of_squared_distances_is_the_smallest() -> None:
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(4))
    found = [float((x0 - noise[list(order)]).square().sum()) for order in permutations(range(5))]
    order = optimal_order(x0, noise)
    assert float((x0 - noise[order]).square().sum()) == pytest.approx(min(found))
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_a_batch_keeps_its_noises_and_times() -> None:
    x0 = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, paired, again = (
        noise_at_random(Flow(), x0, derived_generator(1, "n"), noise=NoiseOptions(pairing=pairing))
        for pairing in ("random", "optimal_transport", "optimal_transport")
    )
    assert torch.equal(paired.times, plain.times)
    assert torch.equal(paired.latents, again.latents)
    noises, ordered = plain.target + x0, paired.target + x0
    torch.testing.assert_close(
        noises.flatten(1).sum(1).sort().values, ordered.flatten(1).sum(1).sort().values
    )
    assert float(paired.target.square().mean()) < 0.95 * float(plain.target.square().mean())
