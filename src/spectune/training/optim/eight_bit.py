"""8-bit AdamW with a state that safetensors can store."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim import AdamW8bit
from torch.optim import Optimizer

CODE_BOOKS = ("qmap1", "qmap2")  # the 256 values that a byte can encode


class PlainStateAdamW8bit(AdamW8bit):
    """AdamW8bit with a state in torch's format. The format of bitsandbytes packs it for FSDP."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state in tensors that share no memory."""
        document = Optimizer.state_dict(self)
        # All parameters share the code books, but a safetensors file cannot contain shared tensors.
        document["state"] = {
            index: {key: value.clone() if key in CODE_BOOKS else value for key, value in state.items()}
            for index, state in document["state"].items()
        }
        return document
