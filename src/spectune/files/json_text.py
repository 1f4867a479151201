"""JSON of files that may come from anybody."""

from __future__ import annotations

import json


def parse_json(text: str) -> object:
    """What a JSON text says; None for one that cannot be read, however it is broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: a thousand opening brackets
        return None
