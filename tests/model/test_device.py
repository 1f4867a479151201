"""Devices by name, with CUDA simulated."""

from __future__ import annotations

import pytest
import torch

from spectune.errors import InputError
from spectune.model import device
from spectune.model.device import build_warning, describe_device, parse_device


def with_cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (11_600_000_000, 12_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")


def test_cards_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, 2)
    assert [parse_device(word) for word in ("auto", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]
    with pytest.raises(InputError, match="no device cuda:2: torch finds 2 CUDA devices"):
        parse_device("cuda:2")


def test_a_card_is_described_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, 1)
    expected = f"NVIDIA GeForce RTX 3060 (cuda), 11.6 of 12.0 GB free, torch {torch.__version__}"
    assert describe_device("cuda") == expected
    assert describe_device("cpu").startswith("cpu, ")


@pytest.mark.parametrize(
    ("cuda", "card", "warns"), [(None, True, True), ("13.0", True, False), (None, False, False)]
)
def test_a_cpu_build_beside_an_nvidia_card_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, card: bool, warns: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if card else None)
    warning = build_warning()
    assert (warning is not None) == warns
    assert warning is None or "install a CUDA build of torch" in warning
