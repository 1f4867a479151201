"""Test that a killed command leaves no file that looks complete, and that the next run succeeds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.atomic_group import AtomicGroup
from spectune.files.rename import partial_path
from spectune.files.writer import StreamWriter
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.ops.verify import verify

ROOT = Path(__file__).resolve().parents[2]
KILLS = 30  # per command


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with all 2515 tensors at a quarter of SDXL's widths, 0.47 GB."""
    path = tmp_path_factory.mktemp("mid") / "mid.safetensors"
    maker = ROOT / "benchmarks" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(maker), str(path), "--size", "mid"], check=True, capture_output=True)
    return path


def seconds_of(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def kill_at_random(command: list[str], longest: float, chance: random.Random) -> bool:
    """Start a command, kill it, and return whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(chance.uniform(0, longest))
    running = process.poll() is None
    process.kill()
    process.wait()
    return running


@pytest.mark.slow
def test_killed_splits_leave_no_half_pair(mid: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spectune", "split", str(mid), "--rank", "16", "-o"]
    longest = seconds_of([*command, str(tmp_path / "first")])
    chance, out, killed = random.Random(0), tmp_path / "out", 0
    names = {"mid.principal-r16.safetensors", "mid.residual.safetensors"}
    for _ in range(KILLS):
        killed += kill_at_random([*command, str(out)], longest, chance)
        complete = {path.name for path in out.glob("*.safetensors")} if out.is_dir() else set()
        for name in complete:
            open_checkpoint(out / name).close()  # complete: header and size agree
        if complete == names:
            assert verify(mid, out / "mid.residual.safetensors", out / "mid.principal-r16.safetensors").ok
            for name in names:
                (out / name).unlink()
    assert killed > KILLS // 2
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert {path.name for path in out.iterdir()} == names
    assert verify(mid, out / "mid.residual.safetensors", out / "mid.principal-r16.safetensors").ok


@pytest.mark.slow
def test_killed_rebuilds_leave_no_half_model(mid: Path, tmp_path: Path) -> None:
    report = split(mid, tmp_path, rank=16)
    out = tmp_path / "out" / "rebuilt.safetensors"
    out.parent.mkdir()
    command = [sys.executable, "-m", "spectune", "rebuild", str(report.principal), "-o", str(out), "--base"]
    longest = seconds_of([*command, str(report.residual)])
    expected = out.read_bytes()
    out.unlink()
    chance, killed = random.Random(1), 0
    for _ in range(KILLS):
        killed += kill_at_random([*command, str(report.residual)], longest, chance)
        if out.exists():
            assert out.read_bytes() == expected
            out.unlink()
    assert killed > KILLS // 2
    subprocess.run([*command, str(report.residual)], check=True, capture_output=True)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == expected


def test_a_half_renamed_pair_is_removed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = split(tiny_checkpoint, tmp_path, rank=2)
    assert report.residual is not None
    names = {report.principal.name, report.residual.name}
    # As a kill between the two renames leaves it:
    report.residual.unlink()
    partial_path(report.principal, ".journal").write_text(json.dumps(sorted(names)), encoding="utf-8")
    with pytest.raises(InputError, match="exists"):
        split(tiny_checkpoint, tmp_path, rank=2)  # the journal is that of a process that runs
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    split(tiny_checkpoint, tmp_path, rank=2)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_pair_whose_second_file_another_run_wrote_is_removed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StreamWriter.commit

    def late(writer: StreamWriter) -> None:
        commit(writer)
        residual = tmp_path / "tiny.residual.safetensors"
        residual.write_bytes(b"of another run")

    monkeypatch.setattr(StreamWriter, "commit", late)
    with pytest.raises(InputError, match=r"residual.safetensors exists: another program wrote it while"):
        split(tiny_checkpoint, tmp_path, rank=2)
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"of another run"


def test_a_journal_never_leaves_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    journal = partial_path(folder / "x.safetensors", ".journal")
    journal.write_text('["../precious.safetensors", 7]', encoding="utf-8")
    AtomicGroup(folder / "x.safetensors")
    assert journal.exists()  # of a process that runs
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    AtomicGroup(folder / "x.safetensors")
    assert precious.read_bytes() == b"mine"
    assert list(folder.iterdir()) == []


def test_only_leftovers_of_dead_processes_are_removed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rebuilt.safetensors"
    report = split(tiny_checkpoint, tmp_path / "pair", rank=2)
    assert report.residual is not None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr("os.getpid", lambda: ended.pid)
    dead = partial_path(out)
    monkeypatch.undo()
    other = partial_path(tmp_path / "another.safetensors")
    for path in (dead, other):
        path.write_bytes(b"half")
    rebuild(report.residual, report.principal, out)
    assert (dead.exists(), other.exists()) == (False, True)
