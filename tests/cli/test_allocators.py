"""The settings of torch's allocators: set on Linux, and never over a value of the user."""

from __future__ import annotations

import os
import sys

import pytest

from spectune.cli.allocators import _CUDA_NAMES, set_allocators


@pytest.fixture(autouse=True)
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("THP_MEM_ALLOC_ENABLE", *_CUDA_NAMES):
        monkeypatch.setenv(name, "")  # so that the value before the test is restored after it
        monkeypatch.delenv(name)


def cuda_values() -> dict[str, str]:
    return {name: os.environ[name] for name in _CUDA_NAMES if name in os.environ}


def test_segments_grow_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    set_allocators()
    assert cuda_values() == {}
    monkeypatch.setattr(sys, "platform", "linux")
    set_allocators()
    assert cuda_values() == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.parametrize("name", _CUDA_NAMES)
def test_values_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    set_allocators()
    assert cuda_values() == {name: "max_split_size_mb:128"}
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
