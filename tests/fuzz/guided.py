"""Let atheris choose inputs by the code that they reach, for targets whose input is bytes."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.corpus import LARGEST, save, saved_inputs


def run_guided(options: argparse.Namespace) -> int:
    """Run one target under atheris, which ends the process with exit code 0 when the time is over."""
    try:
        import atheris
    except ImportError:
        print('error: --guided needs atheris (Linux)\nhint: pip install -e ".[fuzz]"', file=sys.stderr)
        return 2
    # Imported here for the first time, so that every function of spectune reports what it reaches.
    with atheris.instrument_imports(include=["spectune"], enable_loader_override=False):
        from tests.fuzz.campaign import Campaign, report, warm_up
        from tests.fuzz.targets import TARGETS

    names = [target.name for target in TARGETS.values() if target.is_for_bytes]
    if len(options.only or ()) != 1 or options.only[0] not in names:
        print(f"error: --guided needs one target\nhint: --only with {', '.join(names)}", file=sys.stderr)
        return 2
    target = TARGETS[options.only[0]]
    scratch = Path(tempfile.mkdtemp(prefix="spectune-fuzz-"))
    campaign = Campaign(scratch / "input")
    warm_up(target, campaign.folder)
    starts = scratch / "seeds"
    starts.mkdir()
    for number, data in enumerate(
        [*target.seeds(), *(path.read_bytes() for path in saved_inputs(target.name))]
    ):
        (starts / str(number)).write_bytes(data)

    deadline = time.monotonic() + 60 * options.minutes
    reported: list[float] = []

    def one_input(data: bytes) -> None:
        for kind, found in campaign.run(target, [data]):
            path = None if options.no_save else save(target.name, kind, found)
            print(f"{target.name}: {kind} ({path.name if path else 'not saved'})", flush=True)
        if time.monotonic() > deadline and not reported:
            reported.append(deadline)  # atheris runs nothing after the last input
            report(campaign.tallies, print)

    limits = [
        f"-max_total_time={round(60 * options.minutes) + 10}",
        f"-seed={options.seed + 1}",
        f"-max_len={LARGEST}",
        *("-timeout=120", "-rss_limit_mb=0", "-verbosity=0"),
    ]
    atheris.Setup(["fuzz", *limits, str(starts)], one_input)
    atheris.Fuzz()
    return 0
