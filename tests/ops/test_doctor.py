"""Test that the doctor finds what is wrong with simulated machines, and reports this one."""

from __future__ import annotations

import errno
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import default_yaml_config_file

import dev
import spectune
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.model import device
from spectune.model.device import Card, NvidiaDriver
from spectune.ops.doctor import accelerate_file, disk, packages
from spectune.ops.doctor.accelerate_file import AccelerateFile, find_accelerate_file
from spectune.ops.doctor.disk import Disk, measure_disk
from spectune.ops.doctor.machine import Machine, Versions
from spectune.ops.doctor.packages import OptionalPackage, optional_packages, wrong_packages
from spectune.ops.doctor.problems import find_notes, find_problems

CARD = Card("cuda:0", "RTX 3060", "sm_86", True, True, 11_600_000_000, 12_000_000_000)
DRIVER = NvidiaDriver("581.29", ("RTX 3060",))
HEALTHY = Machine(
    versions=Versions("Windows 11 (AMD64)", "3.12.4", "python.exe", "0.1.0", "2.13.0+cu130", "CUDA 13.0"),
    driver=DRIVER,
    cards=(CARD,),
    mps=False,
    free_bytes=20_000_000_000,
    total_bytes=32_000_000_000,
    disk=Disk(Path("pictures"), 200_000_000_000, 500_000_000_000, 1e9, None),
    packages=(OptionalPackage("bitsandbytes", "nf4", None, 'python -m pip install "bitsandbytes>=0.50"'),),
    wrong_packages=(),
    accelerate=None,
    variables={},
)


def changed_card(**values: object) -> Machine:
    return replace(HEALTHY, cards=(replace(CARD, **values),))  # type: ignore[arg-type]


def changed_disk(**values: object) -> Machine:
    return replace(HEALTHY, disk=replace(HEALTHY.disk, **values))  # type: ignore[arg-type]


def with_file(**values: object) -> Machine:
    return replace(HEALTHY, accelerate=AccelerateFile(Path("default_config.yaml"), **values))  # type: ignore[arg-type]


def test_a_healthy_machine_has_no_problem() -> None:
    assert find_problems(HEALTHY) == ()
    assert find_notes(HEALTHY) == ()


@pytest.mark.parametrize(
    ("machine", "problem", "remedy"),
    [
        (changed_card(bf16=False), "has no bf16 in hardware", "run.precision"),
        (changed_card(has_kernels=False), "no kernels for RTX 3060 (sm_86)", "whl/cu126"),
        (changed_card(total_bytes=4_300_000_000), "has 4.3 GB", "spectune plan"),
        (changed_card(free_bytes=3_000_000_000), "only 3.0 of 12.0 GB of RTX 3060", "close programs"),
        (replace(HEALTHY, free_bytes=4_000_000_000), "only 4.0 of 32.0 GB of main memory", "close other"),
        (replace(HEALTHY, wrong_packages=("torch 2.3.1 is not in the range",)), "torch 2.3.1", "range"),
        (changed_disk(free_bytes=5_000_000_000), "only 5.0 GB are free", "another disk"),
        (changed_disk(write_speed=20e6), "20 MB are written per second", "6 minutes"),
        (changed_disk(read_speed=20e6), "20 MB are read per second", "SSD"),
        (changed_disk(failure="Permission denied"), "cannot write to pictures", "another folder"),
        (with_file(failure="bad"), "cannot read default_config.yaml", "accelerate config"),
        (with_file(kind="FSDP"), "requests FSDP", "spectune train"),
        (with_file(compiles=True), "dynamo backend", "run.compile"),
        (replace(HEALTHY, driver=NvidiaDriver("", failure="no devices")), "nvidia-smi fails", "install"),
    ],
)
def test_each_problem_is_one_line_with_its_remedy(machine: Machine, problem: str, remedy: str) -> None:
    (line,) = find_problems(machine)
    assert problem in line
    assert remedy in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (replace(HEALTHY, driver=replace(DRIVER, version="550.54")), "driver 550.54 is older than 580"),
        (replace(HEALTHY, variables={"CUDA_VISIBLE_DEVICES": ""}), "CUDA_VISIBLE_DEVICES='' hides it"),
        (HEALTHY, "nvidia-smi lists RTX 3060: restart the computer"),
        (replace(HEALTHY, driver=None), "there is no GPU that torch can use"),
    ],
)
def test_a_card_that_a_cuda_build_cannot_use(
    machine: Machine, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (line,) = find_problems(replace(machine, cards=()))
    assert expected in line
    assert find_problems(replace(machine, cards=(), mps=True)) == ()


def test_a_cpu_build_beside_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device.shutil, "which", lambda name: "nvidia-smi")
    (line,) = find_problems(replace(HEALTHY, cards=()))
    assert "cannot use the NVIDIA card" in line
    assert "--index-url https://download.pytorch.org/whl/cu130" in line


def test_notes_are_no_problems() -> None:
    linux = replace(HEALTHY, versions=replace(HEALTHY.versions, system="Linux 6 (x86_64)"))
    assert "expandable_segments:True" in find_notes(linux)[0]
    assert find_notes(replace(linux, variables={"PYTORCH_ALLOC_CONF": "expandable_segments:True"})) == ()
    ignored = replace(
        with_file(ignored=("mixed_precision (run.precision counts)",)),
        variables={"ACCELERATE_MIXED_PRECISION": "bf16"},
    )
    assert find_notes(ignored) == (
        "ACCELERATE_MIXED_PRECISION=bf16 is ignored: run.precision in the recipe counts",
        "spectune ignores in default_config.yaml: mixed_precision (run.precision counts)",
    )
    assert find_problems(ignored) == ()


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
dynamo_config: {}
mixed_precision: fp16
num_processes: 2
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONFIG, ("fp16", "2", "NO", False, "")),
        (CONFIG.replace("{}", "{dynamo_backend: INDUCTOR}"), ("fp16", "2", "NO", True, "")),
        (CONFIG.replace("'NO'", '"\\e[31mFSDP"'), ("fp16", "2", "�[31mFSDP", False, "")),
        ("- 1\n", ("no", "1", "NO", False, "expected keys with values")),
        ("a: [", ("no", "1", "NO", False, "while parsing a flow node")),
    ],
)
def test_the_file_of_accelerate_is_read(
    text: str, expected: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_accelerate_file() is None
    path = tmp_path / "accelerate" / "default_config.yaml"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    file = find_accelerate_file()
    assert file is not None
    assert (file.mixed_precision, file.processes, file.kind, file.compiles) == expected[:4]
    assert file.failure.startswith(str(expected[4]))
    assert bool(file.failure) == bool(expected[4])


def test_the_path_is_the_one_that_accelerate_uses() -> None:
    assert str(accelerate_file.default_path()) == default_yaml_config_file


def test_the_speed_of_the_disk_is_measured_without_leaving_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "FILE_BYTES", 2**22)
    found = measure_disk(tmp_path)
    assert found.write_speed is not None
    assert found.write_speed > 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "_bypass_cache", lambda file: False)  # Windows
    assert measure_disk(tmp_path).read_speed is None


def test_a_disk_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FILE_BYTES", 2**22)

    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", refuse)
    assert measure_disk(tmp_path).failure == "No space left on device"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000, total=2000))
    assert measure_disk(tmp_path).failure == "too little free space"


def test_every_extra_for_users_has_a_purpose() -> None:
    extras = tomllib.loads((dev.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert set(packages.PURPOSES) == set(extras) - {"dev", "fuzz"}


def test_packages_out_of_range_and_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.4", "numpy>=1.26", 'bitsandbytes>=0.50; extra == "bnb"', 'mkdocs>=1; extra == "docs"']
    lines += ['transformers>=5.8; extra == "train"', 'diffusers>=0.36; extra == "train"']
    monkeypatch.setattr(packages, "requires", lambda name: lines)
    # the transformers of ComfyUI is not wrong: only with diffusers is it part of an installation for training
    installed = {"torch": "2.3.1+cpu", "numpy": "2.4.6", "transformers": "4.57.6"}
    monkeypatch.setattr(packages, "_installed", installed.get)
    (line,) = wrong_packages()
    assert line.startswith("torch 2.3.1+cpu is not in the range: spectune needs torch>=2.4: ")
    assert line.endswith(' -m pip install "torch>=2.4"')
    train, package = optional_packages()
    assert (train.name, train.version) == ("spectune[train]", None)
    assert train.install.endswith(' -m pip install "spectune[train]"')
    assert (package.name, package.version) == ("bitsandbytes", None)
    assert package.install.endswith(' -m pip install "spectune[bnb]"')
    installed["diffusers"] = "0.42.1"
    assert wrong_packages()[1].startswith("transformers 4.57.6 is not in the range")
    assert optional_packages()[0].version is not None


def test_the_command_reports_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "FILE_BYTES", 2**22)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "\x1b[31m")
    folder = tmp_path / "[bold]"
    folder.mkdir()
    assert run(["doctor", "--folder", str(folder)]) == 0
    text = capfd.readouterr().err
    assert f"torch {torch.__version__}" in " ".join(text.replace("│", " ").split())
    assert "\x1b[31m" not in text
    assert "[bold]" in text
    monkeypatch.setattr(packages, "_installed", lambda name: None)
    assert run(["doctor", "--folder", str(folder)]) == 0
    assert '-m pip install "spectune[bnb]"\n' in capfd.readouterr().err
    assert run(["doctor", "--json", "--folder", str(folder)]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert isinstance(report["problems"], list)
    with pytest.raises(InputError, match="is not a folder"):
        spectune.doctor(str(tmp_path / "missing"))  # type: ignore[arg-type]
