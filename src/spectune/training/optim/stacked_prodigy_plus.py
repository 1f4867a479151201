"""ProdigyPlusScheduleFree that steps on many tensors of one shape at once.

The library loops over the tensors. For the 2,104 trained tensors of SDXL that is 48,400 kernel launches per
step, more than the forward and backward passes together. Here tensors of one shape that follow each other
in memory (see model/joined_factors.py) form a stack (N, ...), and the library's code runs on the stacks. Most
of it works element by element and needs no change. Reductions of a matrix to a number reduce each of the N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor, nn

# These options reduce each tensor to a number in more places; with them each tensor is a stack of its own.
_UNSTACKED_OPTIONS = ("use_speed", "use_cautious", "use_orthograd")
# State that the library stores as a vector of some of a tensor's values.
_SLICED = ("s", "p0")
_DIMENSIONS = "exp_avg_sq_metadata"  # the two axes of a factored average square

State = dict[str, Any]


class StackedProdigyPlus(ProdigyPlusScheduleFree):
    """ProdigyPlusScheduleFree with its arguments, results and saved state, in far fewer kernel launches.

    Results differ from the library's by the order of sums over tensors. A tensor takes part from the step in
    which it first has a gradient; in a later step, a missing gradient counts as zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._members: dict[Tensor, list[nn.Parameter]] = {}  # the tensors of each stack
        self._stack_state: dict[Tensor, State] = defaultdict(dict)
        self._sums_on_host = False

    # ------------------------------------------------------------ the library's methods, on stacks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step on all tensors that have a gradient."""
        with self._stacked():
            return super().step(closure)

    def step_param(self, p: Tensor, group: State) -> None:
        """Step on one stack."""
        members = self._members.get(p)
        if members is None:
            super().step_param(p, group)
            return
        zero = torch.zeros((), dtype=p.dtype, device=p.device)
        p.grad = torch.stack([zero.expand_as(m) if m.grad is None else m.grad for m in members])
        try:
            super().step_param(p, group)
        finally:
            p.grad = None

    def set_train_mode(self, train: bool) -> None:
        """Put the trained weights or their average into the tensors."""
        with self._stacked():
            super().set_train_mode(train)

    def get_sliced_tensor(self, tensor: Tensor, slice_p: int = 11) -> Tensor:
        """Return every `slice_p`-th value of each tensor of a stack, as one vector."""
        return tensor.flatten(1)[:, ::slice_p].reshape(-1)

    def update_prodigy(self, state: State, group: State, grad: Tensor, data: Tensor) -> None:
        """Add the terms of a stack to the sums that d is estimated from."""
        if group["use_speed"] or 0 < group["prodigy_steps"] <= group["k"]:
            super().update_prodigy(state, group, grad, data)
            return
        _, _, beta3 = self.get_betas(group)
        weight = group["d"] ** 2 / group["d0"] ** 0.5
        numerator, denominator = self.get_running_values_for_group(group)
        gradient = self.get_sliced_tensor(grad)
        s = state["s"].mul_(beta3).add_(gradient, alpha=weight)
        # The library rounds the sum of each tensor to the dtype of s, bf16.
        denominator.add_(s.abs().view(len(grad), -1).sum(dim=1).float().sum())
        numerator.add_(torch.dot(gradient, state["p0"] - self.get_sliced_tensor(data)), alpha=weight)

    def on_end_step(self) -> None:
        """Estimate d after the last stack of a step; the sums of all groups are read at once."""
        if self.parameters_to_process != 1:
            super().on_end_step()
            return
        owners = self.param_groups if self.param_groups[0]["split_groups"] else self.param_groups[:1]
        names = ("running_d_numerator", "running_d_denom")
        sums = torch.stack([group[name] for group in owners for name in names]).cpu()
        for index, group in enumerate(owners):
            group[names[0]], group[names[1]] = sums[2 * index], sums[2 * index + 1]
        self._sums_on_host = True
        try:
            super().on_end_step()
        finally:
            self._sums_on_host = False

    def get_running_values_for_group(self, group: State) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of d, on the device of the tensors except at the end of a step."""
        if not self._sums_on_host:
            return super().get_running_values_for_group(group)
        owner = group if group["split_groups"] else self.param_groups[0]
        return owner["running_d_numerator"], owner["running_d_denom"]

    def factored_dims(
        self, shape: Sequence[int], factored: bool, min_dim_size_to_factor: int
    ) -> tuple[int, int] | None:
        """Return the axes of a stack that are factored."""
        axes = super().factored_dims(shape[1:], factored, min_dim_size_to_factor)
        return None if axes is None else (axes[0] + 1, axes[1] + 1)

    def rms_clip_(self, tensor: Tensor) -> Tensor:
        """Scale each tensor of a stack down by the root of its root mean square, if that is above 1."""
        axes = tuple(range(1, tensor.dim()))
        norms = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
        return tensor.mul_(norms.div_(tensor[0].numel() ** 0.5).clamp_min_(1.0).rsqrt_())

    # ------------------------------------------------------------ saving

    def state_dict(self) -> State:
        """Return the state of each tensor, in the library's format."""
        self._unstack_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Load the state of each tensor."""
        super().load_state_dict(state_dict)
        self._members = {}
        self._stack_state = defaultdict(dict)

    # ------------------------------------------------------------ stacks

    @contextmanager
    def _stacked(self) -> Iterator[None]:
        """Let the library's code see stacks instead of tensors inside the block."""
        if not self._is_current():
            self._unstack_state()
            self._build_stacks()
        tensors, state = [group["params"] for group in self.param_groups], self.state
        stack_of = {member: stack for stack, members in self._members.items() for member in members}
        for group in self.param_groups:
            stacks = dict.fromkeys(stack_of[p] for p in group["params"] if p in stack_of)
            group["params"] = list(stacks) or group["params"]
        self.state = self._stack_state  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            self.state = state
            for group, own in zip(self.param_groups, tensors, strict=True):
                group["params"] = own

    def _is_current(self) -> bool:
        """Return whether the stacks hold all tensors to step on, where these are now."""
        stacked = {member for members in self._members.values() for member in members}
        return all(
            member.data_ptr() == stack.data_ptr() + index * member.nbytes
            for stack, members in self._members.items()
            for index, member in enumerate(members)
        ) and all(
            p in stacked or not self._takes_part(p) for group in self.param_groups for p in group["params"]
        )

    def _takes_part(self, p: nn.Parameter) -> bool:
        return p.grad is not None or bool(self.state.get(p))

    def _build_stacks(self) -> None:
        self._members, self._stack_state = {}, defaultdict(dict)
        for group in self.param_groups:
            for run in self._runs(group):
                first = run[0].detach()
                stack = first.as_strided((len(run), *first.shape), (first.numel(), *first.stride()))
                self._members[nn.Parameter(stack)] = run
        for stack, members in self._members.items():
            states = [self.state.pop(member, {}) for member in members]
            if states[0]:
                self._stack_state[stack] = _stacked_state(states)

    def _runs(self, group: State) -> list[list[nn.Parameter]]:
        """Return the tensors of a group in runs of one shape that follow each other in memory."""
        alike: dict[object, list[nn.Parameter]] = {}
        for p in group["params"]:
            if self._takes_part(p):
                state = self.state.get(p, {})
                kinds = tuple((key, key in _SLICED and state[key].dim()) for key in sorted(state))
                alike.setdefault((p.untyped_storage().data_ptr(), p.shape, p.dtype, kinds), []).append(p)
        single = any(group[option] for option in _UNSTACKED_OPTIONS)
        runs: list[list[nn.Parameter]] = []
        for tensors in alike.values():
            end = None
            for p in sorted(tensors, key=lambda p: p.storage_offset()):
                if single or not p.is_contiguous() or p.storage_offset() != end:
                    runs.append([])
                runs[-1].append(p)
                end = p.storage_offset() + p.numel()
        return runs

    def _unstack_state(self) -> None:
        """Give each tensor its part of the state of its stack."""
        for stack, members in self._members.items():
            state = self._stack_state[stack]
            for index, member in enumerate(members):
                if state:
                    self.state[member] = {
                        key: _part(key, value, index, len(members)) for key, value in state.items()
                    }


def _stacked_state(states: Sequence[State]) -> State:
    """Return the state of a stack. Inverse: `_part` for each of its tensors."""

    def stacked(key: str, value: Any) -> Any:
        if key == _DIMENSIONS:
            return tuple(axis + 1 for axis in value)
        if not isinstance(value, Tensor) or (key in _SLICED and value.dim() == 0):
            return value
        values = torch.stack([state[key] for state in states])
        return values.flatten() if key in _SLICED else values

    return {key: stacked(key, value) for key, value in states[0].items()}


def _part(key: str, value: Any, index: int, count: int) -> Any:
    """Return the part of a stack's state that belongs to one of its `count` tensors."""
    if key == _DIMENSIONS:
        return tuple(axis - 1 for axis in value)
    if not isinstance(value, Tensor):
        return value
    if key in _SLICED:
        return value.clone() if value.dim() == 0 else value.view(count, -1)[index]
    return value[index]
