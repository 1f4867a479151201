"""8-bit AdamW whose state can be written to safetensors."""

from __future__ import annotations

from typing import Any

from bitsandbytes.optim import AdamW8bit
from torch.optim import Optimizer

CODE_BOOKS = ("qmap1", "qmap2")  # what the 256 values of a byte stand for


class PlainStateAdamW8bit(AdamW8bit):
    """AdamW8bit with torch's form of a state instead of one that is packed for FSDP."""

    def state_dict(self) -> dict[str, Any]:
        document = Optimizer.state_dict(self)
        # All parameters hold the same code books, and a file takes no tensors that share memory.
        document["state"] = {
            index: {key: value.clone() if key in CODE_BOOKS else value for key, value in state.items()}
            for index, state in document["state"].items()
        }
        return document
