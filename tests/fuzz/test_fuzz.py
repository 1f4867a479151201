"""Try saved inputs again, and a few new ones of every target. `python dev.py fuzz` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.errors import InputError
from tests.fuzz.campaign import Campaign, generated
from tests.fuzz.corpus import CORPUS, LARGEST, LARGEST_TOTAL, save, saved_inputs, smaller
from tests.fuzz.harness import BadOutput, Limits, Outcome, Refused, check_output, examine
from tests.fuzz.targets import TARGETS

# Not the limits of `dev.py fuzz`: a test machine may be slow, and its imports are not warm.
LIMITS = Limits(cpu_seconds=15, nbytes=600_000_000)
NEW_INPUTS = {"models": 2, "folders": 3, "adapters": 5, "metadata": 5, "commands": 10}  # of the slow targets
SAVED = [(name, path) for name in TARGETS for path in saved_inputs(name)]


@pytest.mark.parametrize(("name", "path"), SAVED, ids=[f"{name}-{path.stem}" for name, path in SAVED])
def test_saved_inputs_are_handled(name: str, path: Path, tmp_path: Path) -> None:
    for on_command_line in (False, True):
        trial = examine(
            TARGETS[name],
            path.read_bytes(),
            tmp_path / "input",
            limits=LIMITS,
            on_command_line=on_command_line,
        )
        assert trial.outcome is not Outcome.FINDING, f"{trial.kind}\n{trial.detail}"


@pytest.mark.parametrize("name", TARGETS)
def test_new_inputs_are_handled(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    campaign = Campaign(tmp_path / "input", LIMITS)
    inputs = generated(target.inputs(), 0, NEW_INPUTS.get(name, 20))
    campaign.run(target, inputs)
    tally = campaign.tallies[name]
    assert tally.tried == len(inputs) > 0
    assert {kind: trial.detail for kind, (trial, _) in tally.findings.items()} == {}


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_accepted(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    trial = examine(target, target.seeds()[0], tmp_path / "input", limits=LIMITS)
    assert trial.outcome is Outcome.ACCEPTED, trial.detail


def test_the_same_seed_gives_the_same_inputs() -> None:
    for name in ("safetensors", "kohya", "commands"):
        inputs = TARGETS[name].inputs()
        assert generated(inputs, 3, 10) == generated(TARGETS[name].inputs(), 3, 10)
        assert generated(inputs, 3, 10) != generated(inputs, 4, 10)


class Broken:
    """A target that fails in several ways."""

    name = "broken"

    def write(self, folder: Path, data: bytes) -> None:
        (folder / "x").write_bytes(data)

    def operate(self, folder: Path) -> None:
        data = (folder / "x").read_bytes()
        if b"crash" in data:
            raise KeyError("x")
        if b"large" in data:
            self.kept = bytearray(300_000_000)
            self.kept[::4096] = b"x" * len(self.kept[::4096])
        if b"slow" in data:
            sum(range(3_000_000))
        if b"bad" in data:
            raise InputError("bad")

    def arguments(self, folder: Path) -> None:
        return None


def test_crashes_are_found_and_made_smaller(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "input")
    found = campaign.run(Broken(), [b"fine", b"bad", b"ab crash cd", b"another crash"])  # pyright: ignore
    assert found == [("KeyError in x", b"crash")]
    assert campaign.tallies["broken"].counts == {
        Outcome.ACCEPTED: 1,
        Outcome.REFUSED: 1,
        Outcome.FINDING: 2,
    }


@pytest.mark.parametrize(("data", "kind"), [(b"slow", "slow: "), (b"large", "memory: ")])
def test_costs_are_found(data: bytes, kind: str, tmp_path: Path) -> None:
    limits = Limits(cpu_seconds=0.001) if data == b"slow" else Limits(cpu_seconds=60, nbytes=200_000_000)
    trial = examine(Broken(), data, tmp_path / "input", limits=limits)  # pyright: ignore
    if not Path("/proc/self/clear_refs").exists() and data == b"large":
        pytest.skip("memory is measured on Linux")
    assert trial.kind == kind


@pytest.mark.parametrize(
    ("code", "stderr", "found"),
    [
        (0, "warning: a\n", None),
        (2, "error: a\nhint: b\n", Refused),
        (2, "hint: b\n", BadOutput),
        (2, "error: a\nerror: b\n", BadOutput),
        (0, "error: a\n", BadOutput),
        (2, "error: \x1b[2J\n", BadOutput),
        (3, "", BadOutput),
        (1, "Traceback (most recent call last)\n", BadOutput),
    ],
)
def test_the_output_of_a_command(code: int, stderr: str, found: type[Exception] | None) -> None:
    if found is None:
        check_output(code, stderr)
        return
    with pytest.raises(found):
        check_output(code, stderr)


def test_inputs_are_saved_if_they_are_small(tmp_path: Path) -> None:
    path = save("x", "KeyError in reader.py _span", b"abc", tmp_path)
    assert path is not None
    assert path.name == "keyerror-in-reader-py-span-ba7816bf.bin"
    assert save("x", "k", b"a" * (LARGEST + 1), tmp_path) is None
    assert smaller(b"0123456789", lambda data: b"3" in data and b"7" in data) == b"37"


def test_the_corpus_is_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < LARGEST_TOTAL
    assert {path.parent.name for path in CORPUS.rglob("*.bin")} <= TARGETS.keys()
