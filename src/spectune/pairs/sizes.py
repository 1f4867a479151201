"""Parse and format file sizes: `600MB` is 600,000,000 bytes, `600MiB` is 629,145,600.

pydantic.ByteSize is not exact: it reads 4.1 GB as 4,099,999,999 bytes and drops fractions of a byte.
"""

from __future__ import annotations

import re
from decimal import Decimal

from spectune.errors import InputError, did_you_mean

# Largest first: format_bytes takes the first unit that divides a size.
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "kB": 10**3, "KiB": 2**10, "B": 1}
_MOST_DIGITS = 18  # an exabyte; Decimal is exact up to 28 digits
_WRITE = "write it like 600MB or 1.5GB; MB is 1,000,000 bytes, MiB 1,048,576"


def parse_bytes(word: str) -> int:
    """Parse a size such as `600MB`, `1.5 GB` or `512MiB` into bytes; a number without a unit is in bytes.

    Raises InputError for other text and for a fraction of a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", word)
    if match is None:
        raise InputError(f"unreadable size {word!r}", hint=_WRITE)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    unit = match[2].lower() or "b"
    if unit not in units:
        raise InputError(f"unknown unit {match[2]!r} in {word!r}{did_you_mean(match[2], UNITS)}", hint=_WRITE)
    if len(match[1]) > _MOST_DIGITS:
        raise InputError(f"the size {word!r} has more than {_MOST_DIGITS} digits", hint=_WRITE)
    # Decimal: in binary floats, 0.7 GB is not an integer number of bytes
    nbytes = Decimal(match[1]) * units[unit]
    if nbytes != int(nbytes):
        raise InputError(f"{word!r} is {nbytes} bytes: expected a whole number", hint=_WRITE)
    return int(nbytes)


def format_bytes(nbytes: int) -> str:
    """Return a size in the largest unit that divides it, as in file names; inverse of `parse_bytes`."""
    unit = next(unit for unit, size in UNITS.items() if nbytes % size == 0 and nbytes >= size)
    return f"{nbytes // UNITS[unit]}{unit}"
