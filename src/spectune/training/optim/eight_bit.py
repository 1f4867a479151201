"""8-bit AdamW that steps on stacks (see stacks.py), with a state that safetensors can store."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.optim import Optimizer

from spectune.training.optim.stacks import StackedOptimizer, State

BLOCK = 256  # values with one scale
CODE_BOOKS = ("qmap1", "qmap2")  # the 256 values that a byte can encode


class PlainStateAdamW8bit(StackedOptimizer, AdamW8bit):  # pyright: ignore[reportIncompatibleMethodOverride]
    """AdamW8bit with a state in torch's format. The format of bitsandbytes packs it for FSDP."""

    vectors = ("absmax1", "absmax2")
    shared = CODE_BOOKS

    def _can_stack(self, p: nn.Parameter, group: State) -> bool:
        # whole blocks, and no small tensors, which have a 32-bit state
        smallest = self.args.min_8bit_size  # pyright: ignore[reportAttributeAccessIssue]
        whole = p.numel() % BLOCK == 0 and p.numel() >= smallest
        return whole and super()._can_stack(p, group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors that share no memory."""
        self._unstack_state()
        document = Optimizer.state_dict(self)
        # All parameters share the code books, but a safetensors file cannot contain shared tensors.
        document["state"] = {
            index: {key: value.clone() if key in CODE_BOOKS else value for key, value in state.items()}
            for index, state in document["state"].items()
        }
        return document
