"""Tell adapters from checkpoints."""

from __future__ import annotations

from spectune.files.source import WeightSource

# Substrings of the keys of adapters, also of other models and of other kinds of adapters.
_SIGNS = (".lora_", ".lora.", "_lora.", ".hada_", ".lokr_", ".oft_", ".dora_scale", ".frame_", ".w_norm")
_ENDS = (".diff", ".diff_b")


def is_adapter(source: WeightSource) -> bool:
    """Return whether a file holds factors or differences of layers, not a model."""
    return any(
        name.startswith(("lora_", "lycoris_", "replaced."))
        or name.endswith(_ENDS)
        or any(sign in name for sign in _SIGNS)
        for name in source.tensors
    )
