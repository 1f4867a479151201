"""Try bad input on every reader: `python dev.py fuzz 5 --seed 1 --only recipes`."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.campaign import Campaign
    from tests.fuzz.harness import Target


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev.py fuzz", description=__doc__)
    parser.add_argument("minutes", type=float, help="how long to run")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs; default 0")
    parser.add_argument("--only", metavar="TARGET", action="append", help="a target; may be repeated")
    parser.add_argument("--inputs", type=int, default=0, help="stop after this number of inputs per target")
    parser.add_argument(
        "--guided", action="store_true", help="let atheris choose inputs by coverage (Linux, one target)"
    )
    parser.add_argument("--no-save", action="store_true", help="do not add findings to tests/fuzz/corpus")
    options = parser.parse_args(argv)
    if options.guided:
        from tests.fuzz.guided import run_guided

        return run_guided(options)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    import torch

    from tests.fuzz.campaign import Campaign, report, warm_up
    from tests.fuzz.targets import TARGETS

    unknown = sorted(set(options.only or ()) - TARGETS.keys())
    if unknown:
        print(f"error: no target {unknown[0]}\nhint: choose from {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    faulthandler.enable()
    torch.set_num_threads(1)
    targets = [TARGETS[name] for name in options.only or TARGETS]
    with tempfile.TemporaryDirectory(prefix="spectune-fuzz-", ignore_cleanup_errors=True) as scratch:
        campaign = Campaign(Path(scratch) / "input")
        for target in targets:
            warm_up(target, campaign.folder)
        try:
            _try_all(targets, campaign, options)
        finally:  # also after Ctrl-C
            report(campaign.tallies, print)
    return int(any(tally.findings for tally in campaign.tallies.values()))


def _try_all(targets: Sequence[Target], campaign: Campaign, options: argparse.Namespace) -> None:
    """Try inputs until the time is over. Findings are printed and saved as they appear."""
    from tests.fuzz.campaign import batches
    from tests.fuzz.corpus import save

    waiting = {target.name: (target, batches(target, options.seed)) for target in targets}
    deadline = time.monotonic() + 60 * options.minutes
    while waiting and time.monotonic() < deadline:
        # The target that had the least time: fast ones get more inputs.
        name = min(waiting, key=lambda one: campaign.seconds.get(one, 0.0))
        target, inputs = waiting[name]
        for kind, data in campaign.run(target, next(inputs), deadline):
            path = None if options.no_save else save(name, kind, data)
            print(f"{name}: {kind} ({len(data):,} bytes{f', {path.name}' if path else ''})", flush=True)
        if options.inputs and campaign.tallies[name].tried >= options.inputs:
            del waiting[name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
