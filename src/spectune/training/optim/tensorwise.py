"""Step on one tensor after the other: in the backward pass, as soon as its gradient is complete, or after it.

A step in the backward pass frees each gradient at once, so that never all of them exist. Both ways give the
same bits: the step of a tensor depends on nothing but the tensor, its gradient and its own state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.rounding import round_stochastically
from spectune.training.optim.stacks import StackedOptimizer
from spectune.training.seeds import derived_seed


class TensorSteps:
    """Steps of an optimizer whose groups share no numbers, one tensor at a time.

    A bf16 tensor is stepped in float32 and rounded stochastically. The random bits depend on the seed, the
    step and the name of the tensor.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], *, seed: int, in_backward: bool
    ) -> None:
        self.optimizer, self.parameters = optimizer, dict(parameters)
        self.in_backward = in_backward
        self._seed, self._step = seed, 0
        self._norms: list[Tensor] = []
        # by number: loading a state replaces the groups
        self._groups = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        if in_backward:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def begin(self, step: int) -> None:
        """Begin a step, after `step` finished ones."""
        self._step = step
        self._norms = []

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the step in the backward pass."""
        return torch.stack(self._norms).norm() if self._norms else torch.zeros(())

    def step_all(self) -> None:
        """Step on all tensors that have a gradient, and free the gradients."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._step_on(name, parameter)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            assert parameter.grad is not None
            self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            self._step_on(name, parameter)

        return hook

    @torch.no_grad()
    def _step_on(self, name: str, parameter: nn.Parameter) -> None:
        if parameter.dtype == torch.float32:
            with self._alone(parameter, parameter):
                self.optimizer.step()
        else:
            self._step_rounded(name, parameter)
        parameter.grad = None

    def _step_rounded(self, name: str, parameter: nn.Parameter) -> None:
        """Step on a float32 copy, which takes the state of the tensor with it, and round the result."""
        assert parameter.grad is not None
        state: Any = self.optimizer.state
        exact = nn.Parameter(parameter.detach().float())
        exact.grad = parameter.grad.float()
        parameter.grad = None
        if parameter in state:
            state[exact] = state.pop(parameter)
        with self._alone(parameter, exact):
            self.optimizer.step()
        if exact in state:
            state[parameter] = state.pop(exact)
        generator = torch.Generator(parameter.device)
        generator.manual_seed(derived_seed(self._seed, "rounding", self._step, name))
        parameter.copy_(round_stochastically(exact.detach(), generator))

    @contextmanager
    def _alone(self, parameter: nn.Parameter, stepped: nn.Parameter) -> Iterator[None]:
        """Let the optimizer see only one tensor, with the options of its group, inside the block."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group = groups[self._groups[id(parameter)]]
        members = group["params"]
        optimizer.param_groups, group["params"] = [group], [stepped]
        try:
            yield
        finally:
            if isinstance(optimizer, StackedOptimizer):
                optimizer.release()
            optimizer.param_groups, group["params"] = groups, members
