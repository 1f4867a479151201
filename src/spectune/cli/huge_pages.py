"""Memory in larger pieces, where the system has them."""

from __future__ import annotations

import os


def use_huge_pages() -> None:
    """Ask torch for huge pages on Linux: a fresh tensor then costs a five hundredth of the page faults.

    torch reads the wish when it allocates its first large tensor; somebody else's wish stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
