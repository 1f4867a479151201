"""Take safetensors files apart, and build them from a header with wrong or odd entries."""

from __future__ import annotations

import json
import math
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2}
SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8}
LARGEST = 1_000_000  # bytes of a changed tensor


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a valid file and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def build(header: Any, body: bytes) -> bytes:
    """Return a file with a header that may be any JSON value."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def assemble(tensors: dict[str, tuple[str, list[int], bytes]], metadata: Any) -> bytes:
    """Return a file with `{name: (dtype, shape, bytes)}`, with valid offsets."""
    header: dict[str, Any] = {"__metadata__": metadata}
    body: list[bytes] = []
    place = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
        body.append(data)
    return build(header, b"".join(body))


def entries(data: bytes) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """Return the tensors of a valid file as {name: (dtype, shape, bytes)}, and its metadata."""
    header, body = parse(data)
    metadata = header.pop("__metadata__", {})
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }, metadata


def filled(dtype: str, shape: list[int], value: float) -> bytes | None:
    """Return the bytes of a tensor of one value; None if it would be too large."""
    count = math.prod(shape) * SIZES.get(dtype, 4)
    if not 0 <= count <= LARGEST:
        return None
    patterns = {"F16": {"nan": b"\x00\x7e", "inf": b"\x00\x7c", "large": b"\xff\x7b"}}
    patterns["BF16"] = {"nan": b"\xc0\x7f", "inf": b"\x80\x7f", "large": b"\x7f\x7f"}
    patterns["F32"] = {name: b"\0\0" + part for name, part in patterns["BF16"].items()}
    word = "nan" if math.isnan(value) else "inf" if math.isinf(value) else "large" if value > 1 else ""
    pattern = patterns.get(dtype, {}).get(word, b"\0")
    return (pattern * (count // len(pattern) + 1))[:count]
