"""Output of `rebuild`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import say
from spectune.cli.report_parts import written
from spectune.ops.options.adapter_files import RebuildOptions
from spectune.ops.rebuild import RebuildReport


def as_json(result: RebuildReport, options: RebuildOptions, seconds: float) -> dict[str, Any]:
    return {**asdict(result), "identical": result.identical}


def show(result: RebuildReport, options: RebuildOptions, seconds: float) -> None:
    say(written(result.path, seconds))
    partly = [f"{held} of {count} {part}" for part, (held, count) in result.layers.items() if held < count]
    if partly:
        say(f"the adapter covers {', '.join(partly)} layers; the others are unchanged")
    if result.identical:
        say(f"all {result.tensors} tensors are bit-identical to the original model")
    elif result.base_hash is None:
        say(f"{result.changed_tensors} of {result.tensors} tensors were changed by the principal")
    else:
        say(
            f"{result.changed_tensors} of {result.tensors} tensors were changed by the adapter, "
            "the others are bit-identical to the base"
        )
    if result.card is not None:
        say(f"wrote {result.card}")
