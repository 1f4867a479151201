"""Generate inputs, try them, and count the results."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz.corpus import smaller
from tests.fuzz.harness import Limits, Outcome, Target, Trial, examine

BATCH = 100  # inputs that are generated at once
COMMAND_LINES = 20  # one of so many inputs also goes through the command line
UNLIMITED = Limits(math.inf, sys.maxsize)
_MINIMISE_SECONDS = 20


@dataclass
class Tally:
    """The results of one target."""

    counts: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    command_lines: int = 0
    slowest_seconds: float = 0.0
    largest_nbytes: int = 0
    findings: dict[str, tuple[Trial, bytes]] = field(default_factory=dict)  # the first input of each kind

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    def add(self, trial: Trial, data: bytes) -> bool:
        """Count a trial; return whether it is the first finding of its kind."""
        self.counts[trial.outcome] += 1
        self.slowest_seconds = max(self.slowest_seconds, trial.cpu_seconds)
        self.largest_nbytes = max(self.largest_nbytes, trial.nbytes)
        if trial.outcome is not Outcome.FINDING or trial.kind in self.findings:
            return False
        self.findings[trial.kind] = trial, data
        return True


def batches(target: Target, seed: int, *, size: int = BATCH) -> Iterator[list[bytes]]:
    """Yield lists of inputs without end. The same seed gives the same inputs."""
    strategy = target.inputs()
    for number in itertools.count(seed * 1_000_003):
        yield generated(strategy, number, size)


def generated(strategy: SearchStrategy[bytes], seed: int, count: int) -> list[bytes]:
    """Return up to `count` different inputs."""
    made: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(data: bytes) -> None:
        made.append(data)

    collect()
    return made


def warm_up(target: Target, folder: Path) -> None:
    """Run the valid inputs, so that no input pays for imports. They must be accepted."""
    for data in target.seeds():
        examine(target, data, folder, on_command_line=True, limits=UNLIMITED)
        trial = examine(target, data, folder, limits=UNLIMITED)
        if trial.outcome is not Outcome.ACCEPTED:
            raise AssertionError(
                f"{target.name}: a valid input was not accepted: {trial.detail} {data[:200]!r}"
            )


class Campaign:
    """Tries inputs of targets in a folder."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self.limits = folder, limits or Limits()
        self.tallies: dict[str, Tally] = {}
        self.seconds: dict[str, float] = {}  # by target

    def run(
        self, target: Target, inputs: list[bytes], deadline: float = float("inf")
    ) -> list[tuple[str, bytes]]:
        """Try inputs until a time; return the new findings as (kind, input), made smaller."""
        tally = self.tallies.setdefault(target.name, Tally())
        started = time.monotonic()
        found: list[tuple[str, bytes]] = []
        for data in inputs:
            if time.monotonic() > deadline:
                break
            ways = [False, True] if tally.tried % COMMAND_LINES == 0 else [False]
            for on_command_line in ways:
                trial = self.trial(target, data, on_command_line=on_command_line)
                if on_command_line:
                    tally.command_lines += 1
                    if trial.outcome is not Outcome.FINDING:
                        continue  # it is counted once
                if tally.add(trial, data):
                    found.append((trial.kind, self._smaller(target, data, trial, on_command_line)))
        self.seconds[target.name] = self.seconds.get(target.name, 0.0) + time.monotonic() - started
        return found

    def trial(self, target: Target, data: bytes, *, on_command_line: bool = False) -> Trial:
        return examine(target, data, self.folder, limits=self.limits, on_command_line=on_command_line)

    def _smaller(self, target: Target, data: bytes, trial: Trial, on_command_line: bool) -> bytes:
        started = time.monotonic()

        def is_same(candidate: bytes) -> bool:
            if time.monotonic() - started > _MINIMISE_SECONDS:
                return False
            try:
                other = self.trial(target, candidate, on_command_line=on_command_line)
            except ValueError:  # no input of this target
                return False
            return other.kind == trial.kind

        return smaller(data, is_same)


def report(tallies: dict[str, Tally], say: Callable[[str], object]) -> None:
    """Print a table of the results, and each finding."""
    say(f"{'target':12}{'tried':>8}{'refused':>9}{'accepted':>9}{'findings':>9}{'slowest':>10}{'memory':>10}")
    for name, tally in tallies.items():
        counts = tally.counts
        say(
            f"{name:12}{tally.tried:8,}{counts[Outcome.REFUSED]:9,}{counts[Outcome.ACCEPTED]:9,}"
            f"{counts[Outcome.FINDING]:9,}{tally.slowest_seconds:8.2f} s{tally.largest_nbytes / 1e6:7.1f} MB"
        )
    tried = sum(tally.tried for tally in tallies.values())
    lines = sum(tally.command_lines for tally in tallies.values())
    say(f"{tried:,} inputs; {lines:,} of them also through the command line")
    for name, tally in tallies.items():
        for kind, (trial, _) in tally.findings.items():
            end = trial.detail.strip().splitlines()[-6:]
            say(f"finding in {name}: {kind}; {trial.cpu_seconds:.1f} s, {trial.nbytes / 1e6:.0f} MB")
            for line in end:
                say(f"    {line[:200]!r}")
