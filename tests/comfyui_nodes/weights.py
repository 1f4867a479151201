"""Compare the weights of two models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a weight, relative to the largest magnitude in its tensor."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name].double() - weight.double()).abs().max() / weight.double().abs().max())
        for name, weight in expected.items()
        if weight.is_floating_point() and weight.numel() and weight.any()
    )
