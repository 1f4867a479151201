"""Prodigy that steps on stacks (see stacks.py) and reads the sums for d from the device once per step."""

from __future__ import annotations

import math
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor

from spectune.training.optim.stacks import StackedOptimizer, State


class StackedProdigy(StackedOptimizer, Prodigy):
    """Prodigy with its arguments, results and saved state.

    The library's step reads two numbers for each tensor, and takes every `slice_p`-th value of a flat tensor.
    The step below has the same formulas (Mishchenko and Defazio 2024, arXiv:2306.06101), in the same order.
    """

    vectors = ("s", "p0")

    def step_stacks(self, closure: Any) -> Any:
        """Update the averages of all stacks, then d, then the stacks."""
        loss = None if closure is None else closure()
        first = self.param_groups[0]
        rate = max(group["lr"] for group in self.param_groups)
        (beta1, beta2), k = first["betas"], first["k"]
        dlr = first["d"] * rate
        if first["use_bias_correction"]:
            dlr *= (1 - beta2 ** (k + 1)) ** 0.5 / (1 - beta1 ** (k + 1))
        stacks = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if rate == 0 or not stacks:
            return loss
        if not self._update_d([self._update_averages(p, group, dlr) for p, group in stacks], dlr):
            return loss
        for p, group in stacks:
            self._update(p, group, dlr)
        for group in self.param_groups:
            group["k"] = k + 1
        return loss

    def _update_averages(self, p: Tensor, group: State, dlr: float) -> Tensor:
        """Update the state of a stack; return the terms of its tensors in the two sums, (2, N)."""
        (beta1, beta2), d, d0, grad = group["betas"], group["d"], group["d0"], p.grad
        assert grad is not None
        if group["weight_decay"] and not group["decouple"]:
            grad.add_(p, alpha=group["weight_decay"])
        state = self.state[p]
        if not state:
            state.update(self._first_state(p, group))
        sliced, s = _sliced(grad, group), state["s"]
        distances = (state["p0"] - _sliced(p, group)).mul_(sliced).view(len(p), -1).sum(dim=1)
        if beta1 > 0:
            state["exp_avg"].mul_(beta1).add_(grad, alpha=d * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=d * d * (1 - beta2))
        s.mul_(_beta3(group)).add_(sliced, alpha=d / d0 * (d if group["safeguard_warmup"] else dlr))
        return torch.stack([distances, s.abs().view(len(p), -1).sum(dim=1)])

    def _first_state(self, p: Tensor, group: State) -> State:
        sliced = _sliced(p, group)
        average = {"exp_avg": torch.zeros_like(p)} if group["betas"][0] > 0 else {}
        start = sliced.clone() if p.any() else torch.zeros((), device=p.device, dtype=p.dtype)
        return {
            "step": 0,
            "s": torch.zeros_like(sliced),
            "p0": start,
            **average,
            "exp_avg_sq": torch.zeros_like(p),
        }

    def _update_d(self, sums: list[Tensor], dlr: float) -> bool:
        """Estimate d anew from the terms of all stacks; return False if all gradients were zero so far."""
        distances, denominators = torch.cat(sums, dim=1).tolist()
        first, denominator = self.param_groups[0], sum(denominators)
        if denominator == 0:
            return False
        d, d0 = first["d"], first["d0"]
        numerator = first["d_numerator"] * _beta3(first) + d / d0 * dlr * sum(distances)
        d_hat = first["d_coef"] * numerator / denominator
        if d == d0:
            d = max(d, d_hat)
        d_max = max(first["d_max"], d_hat)
        d = min(d_max, d * first["growth_rate"])
        for group in self.param_groups:
            group.update(d=d, d_max=d_max, d_hat=d_hat, d_numerator=numerator, d_denom=denominator)
        return True

    def _update(self, p: Tensor, group: State, dlr: float) -> None:
        """Step a stack with the new d in the divisor and the old one in `dlr`, as the library does."""
        state, d = self.state[p], group["d"]
        state["step"] += 1
        divisor = state["exp_avg_sq"].sqrt().add_(d * group["eps"])
        if group["weight_decay"] and group["decouple"]:
            p.add_(p, alpha=-group["weight_decay"] * dlr)
        if group["betas"][0] > 0:
            p.addcdiv_(state["exp_avg"], divisor, value=-dlr)
        else:
            assert p.grad is not None
            p.addcdiv_(p.grad, divisor, value=-dlr * d)


def _sliced(stack: Tensor, group: State) -> Tensor:
    """Return every `slice_p`-th value of each tensor of a stack, as one vector."""
    return stack.detach().flatten(1)[:, :: group["slice_p"]].reshape(-1)


def _beta3(group: State) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]
