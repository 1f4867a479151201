"""Assign the noises of a batch to its images by minibatch optimal transport."""

from __future__ import annotations

from torch import Tensor

from spectune.extras import extras_named


@extras_named("`flow_pairing`")
def optimal_order(x0: Tensor, noise: Tensor) -> list[int]:
    """Return the index of the noise for each image, with the smallest sum of squared distances.

    x0 and noise are (batch, channels, h, w). Each noise is used once. Their straight paths then cross less
    (Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2023, arXiv 2302.00482). The norms are the same in
    every order, so the order maximizes the sum of the inner products.
    """
    from scipy.optimize import linear_sum_assignment

    # on the CPU: every device must find the same order
    products = x0.detach().cpu().double().flatten(1) @ noise.cpu().double().flatten(1).T  # (image, noise)
    _, order = linear_sum_assignment(products.numpy(), maximize=True)
    return order.tolist()
