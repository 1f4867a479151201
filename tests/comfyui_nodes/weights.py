"""Comparing the weights that two models run with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of a weight, relative to the largest magnitude of its tensor."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - weight.double()).abs().max() / weight.double().abs().max())
        for name, weight in expected.items()
        if weight.is_floating_point() and weight.numel() and weight.any()
    )
