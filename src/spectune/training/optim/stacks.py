"""Optimizers that step on many tensors of one shape at once.

Libraries loop over the tensors. For the 2,104 trained tensors of SDXL that is 16,000 to 74,000 kernel
launches per step, more than the forward and backward passes together. Here tensors of one shape that follow
each other in memory (see model/joined_factors.py) form a stack (N, ...), and the library's code runs on the
stacks. Code that works element by element needs no change. Reductions of a tensor to a number must reduce
each of the N; the classes of such optimizers override them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# A step makes up to four temporary tensors of the size of a stack. They must not need more memory than the
# activations, which are free by then: 0.2 GB for SDXL at 512 px with checkpointing.
STACK_BYTES = 64 << 20

_AXES = "exp_avg_sq_metadata"  # state of ProdigyPlus: the two axes of a factored average square

State = dict[str, Any]


@cache
def stacked_class(library_class: type[Optimizer]) -> type[Optimizer]:
    """Return the class of an elementwise optimizer that steps on stacks."""
    return type(f"Stacked{library_class.__name__}", (StackedOptimizer, library_class), {})


class StackedOptimizer(Optimizer):
    """Comes before the class of a library, which then sees stacks; the saved state has the library's format.

    Results differ from the library's by the order of sums over tensors. A tensor takes part from the step in
    which it first has a gradient; in a later step, a missing gradient counts as zero.
    """

    # Options that need numbers of single tensors in more places: with them each tensor is its own stack.
    unstacked_options: ClassVar[tuple[str, ...]] = ()
    vectors: ClassVar[tuple[str, ...]] = ()  # keys of state that is flat, or a single zero
    shared: ClassVar[tuple[str, ...]] = ()  # keys of state that is the same for all tensors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._members: dict[Tensor, list[nn.Parameter]] = {}  # the tensors of each stack
        self._stack_state: dict[Tensor, State] = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step on all tensors that have a gradient."""
        with self.stacked():
            self._stack_gradients()
            try:
                return self.step_stacks(closure)
            finally:
                for stack in self._members:
                    stack.grad = None

    def step_stacks(self, closure: Callable[[], float] | None) -> Any:
        """Run the library's step, in which all tensors are stacks."""
        return super().step(closure)

    def _stack_gradients(self) -> None:
        """Give each stack its gradient. Those of its tensors become views of it: nothing is stored twice."""
        for stack, members in self._members.items():
            stack.grad = torch.stack([torch.zeros_like(m) if m.grad is None else m.grad for m in members])
            for member, gradient in zip(members, stack.grad, strict=True):
                if member.grad is not None:
                    member.grad = gradient

    def state_dict(self) -> State:
        """Return the state of each tensor, in the library's format."""
        self._unstack_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: State) -> None:
        """Load the state of each tensor."""
        super().load_state_dict(state_dict)
        self._members = {}
        self._stack_state = defaultdict(dict)

    @contextmanager
    def stacked(self) -> Iterator[None]:
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

    def release(self) -> None:
        """Give all tensors their state back and forget the stacks."""
        self._unstack_state()
        self._members, self._stack_state = {}, defaultdict(dict)

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
                self._stack_state[stack] = self._stacked_state(states)

    def _runs(self, group: State) -> list[list[nn.Parameter]]:
        """Return the tensors of a group in runs of one shape that follow each other in memory."""
        alike: dict[object, list[nn.Parameter]] = {}
        for p in group["params"]:
            if self._takes_part(p):
                kind = tuple((key, _kind(value)) for key, value in self.state.get(p, {}).items())
                alike.setdefault((p.untyped_storage().data_ptr(), p.shape, p.dtype, kind), []).append(p)
        runs: list[list[nn.Parameter]] = []
        for tensors in alike.values():
            end = None
            for p in sorted(tensors, key=lambda p: p.storage_offset()):
                follows = p.storage_offset() == end and len(runs[-1]) < most_members(p)
                if not follows or not self._can_stack(p, group):
                    runs.append([])
                runs[-1].append(p)
                end = p.storage_offset() + p.numel()
        return runs

    def _can_stack(self, p: nn.Parameter, group: State) -> bool:
        """Return whether a tensor can follow another one in a stack."""
        return p.is_contiguous() and not any(group[option] for option in self.unstacked_options)

    def _unstack_state(self) -> None:
        """Give each tensor its part of the state of its stack."""
        for stack, members in self._members.items():
            state = self._stack_state[stack]
            for index, member in enumerate(members):
                if state:
                    self.state[member] = {
                        key: self._part(key, value, index, len(members)) for key, value in state.items()
                    }

    def _stacked_state(self, states: Sequence[State]) -> State:
        """Return the state of a stack. Inverse: `_part` for each of its tensors."""

        def stacked(key: str, value: Any) -> Any:
            if key == _AXES:
                return tuple(axis + 1 for axis in value)
            if not isinstance(value, Tensor) or key in self.shared:
                return value
            if key in self.vectors and value.dim() == 0:
                return value
            values = torch.stack([state[key] for state in states])
            return values.flatten() if key in self.vectors else values

        return {key: stacked(key, value) for key, value in states[0].items()}

    def _part(self, key: str, value: Any, index: int, count: int) -> Any:
        """Return the part of a stack's state that belongs to one of its `count` tensors."""
        if key == _AXES:
            return tuple(axis - 1 for axis in value)
        if not isinstance(value, Tensor) or key in self.shared:
            return value
        if key in self.vectors:
            return value.clone() if value.dim() == 0 else value.view(count, -1)[index]
        return value[index]


def most_members(p: Tensor) -> int:
    """Return the largest number of tensors like `p` in a stack."""
    return max(1, STACK_BYTES // p.nbytes)


def _kind(value: Any) -> object:
    """Return what a value of state must share with that of another tensor in the same stack."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value
