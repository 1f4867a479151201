"""Devices by name, with CUDA simulated."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch

from spectune.errors import InputError
from spectune.model import device
from spectune.model.device import (
    build_warning,
    cpu_warnings,
    describe_device,
    drawing_dtype,
    find_cards,
    find_nvidia_driver,
    install_line,
    parse_device,
    send,
    tf32_products,
)


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


def test_copies_to_a_card_go_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("pinned")
        return tensor.clone()

    def to(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.append((*args, options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert torch.equal(send(torch.arange(3), "cuda:1"), torch.arange(3))
    assert calls == ["pinned", ("cuda:1", {"non_blocking": True})]
    calls.clear()
    send(torch.arange(3), "mps")
    assert calls == [("mps", {})]


def test_float32_products_use_tf32_on_a_card_inside_the_block_only() -> None:
    for name, inside in (("cuda", "high"), ("cpu", "highest")):
        with suppress(ZeroDivisionError), tf32_products(torch.device(name)):
            assert torch.get_float32_matmul_precision() == inside
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "highest"


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


def test_pictures_are_drawn_in_16_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cards(monkeypatch, 2)
    asked: list[str] = []

    def current(device: str) -> nullcontext[None]:
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked[-1] == "cuda:1")
    dtypes = [drawing_dtype(device) for device in ("cuda:1", "cuda:0", "mps", "cpu")]
    assert dtypes == [torch.bfloat16, torch.float16, torch.float16, torch.float32]


def test_a_large_model_on_a_cpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "build_warning", lambda: "install CUDA")
    assert cpu_warnings("cpu", 20_000_000) == ["install CUDA"]
    assert cpu_warnings("cpu", 2_567_463_684)[1].startswith("the model is of SDXL's size")
    assert cpu_warnings("cuda", 2_567_463_684) == []


@pytest.mark.parametrize(
    ("capability", "built_for", "has_kernels"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((6, 1), ["sm_75", "sm_80", "compute_90"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_120a"], True),
        ((7, 5), [], True),
    ],
)
def test_a_card_without_kernels_is_found(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built_for: list[str], has_kernels: bool
) -> None:
    with_cards(monkeypatch, 1)
    properties = SimpleNamespace(name="GeForce\x1b[31m", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    (card,) = find_cards()
    assert card.has_kernels is has_kernels
    assert (card.device, card.architecture, card.bf16) == ("cuda:0", "sm_{}{}".format(*capability), False)
    assert "\x1b" not in card.name


@pytest.mark.parametrize(
    ("code", "output", "version", "cards", "failure"),
    [
        (
            0,
            "580.95, NVIDIA GeForce RTX 3060\n580.95, NVIDIA T4\n",
            "580.95",
            ("NVIDIA GeForce RTX 3060", "NVIDIA T4"),
            "",
        ),
        (9, "NVIDIA-SMI has failed\x1b[2J because\nmore", "", (), "NVIDIA-SMI has failed\ufffd[2J because"),
        (0, "No devices were found\n", "", (), "No devices were found"),
        (3, "", "", (), "exit code 3"),
    ],
)
def test_the_driver_is_read_from_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    output: str,
    version: str,
    cards: tuple[str, ...],
    failure: str,
) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda name: "nvidia-smi")
    done = subprocess.CompletedProcess([], code, stdout=output, stderr="")
    monkeypatch.setattr(device.subprocess, "run", lambda *command, **options: done)
    driver = find_nvidia_driver()
    assert driver is not None
    assert (driver.version, driver.cards, driver.failure) == (version, cards, failure)
    assert driver.major == (580 if version else 0)


def test_a_driver_program_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*command: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(device.shutil, "which", lambda name: "nvidia-smi")
    monkeypatch.setattr(device.subprocess, "run", hang)
    driver = find_nvidia_driver()
    assert driver is not None
    assert "timed out after 20 seconds" in driver.failure


@pytest.mark.parametrize(
    ("executable", "start"),
    [
        ("C:\\spectune\\.venv\\Scripts\\python.exe", "C:\\spectune\\.venv\\Scripts\\python.exe -m pip"),
        ("C:\\Program Files\\python.exe", "python -m pip"),  # cmd and PowerShell quote it differently
    ],
)
def test_install_lines_use_this_python(monkeypatch: pytest.MonkeyPatch, executable: str, start: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    line = install_line("cu130")
    assert line.startswith(start)
    assert line.endswith("--index-url https://download.pytorch.org/whl/cu130")
