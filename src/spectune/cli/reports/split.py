"""Output of `split`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from spectune.cli.console import megabytes, print_warning, say
from spectune.errors import counted, some_of
from spectune.model.device import describe_device, parse_device
from spectune.ops.options.model_files import SplitOptions
from spectune.ops.split import SplitForecast, SplitReport


def prepare(options: SplitOptions) -> SplitOptions:
    say(f"splitting on {describe_device(parse_device(options.device))}")
    return options


def show(result: SplitReport, options: SplitOptions, seconds: float) -> None:
    _print_split(result)
    say(f"           {seconds:.1f} s")


def show_dry_run(forecast: SplitForecast, options: SplitOptions) -> None:
    plan = forecast.ranks
    say(f"would factor {len(plan.ranks)} layers of {options.model}")
    if plan.left_out:
        say(f"             {len(plan.left_out)} more stay completely in the residual")
    if plan.energy is not None:
        say(f"             they hold {plan.energy:.1%} of the energy")
    say(f"would write  {forecast.principal}  ({plan.parameters:,} parameters, {megabytes(plan.nbytes)})")
    if forecast.residual is not None:
        say(f"would write  {forecast.residual}")


def as_json(result: SplitReport, options: SplitOptions, seconds: float) -> dict[str, Any]:
    return {
        "principal": result.principal,
        "residual": result.residual,
        "base_hash": result.base_hash,
        "principal_hash": result.principal_hash,
        "ranks": result.label,
        "layers": len(result.layers),
        "energy": result.energy,
        "excess": result.excess,
        "zero_layers": [layer.name for layer in result.zero],
        "methods": Counter(layer.method for layer in result.layers),
        "bit_equal_share": result.share if result.residual else None,
        "exceptions": result.exceptions,
        "seconds": seconds,
    }


def _print_split(result: SplitReport) -> None:
    say(f"principal  {result.principal}  ({megabytes(result.principal.stat().st_size)})")
    ranks = sorted(layer.rank for layer in result.layers)
    spread = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    say(
        f"           {len(result.layers)} layers of rank {spread} hold {result.energy:.1%} of the energy "
        "(squared norm) of their weights"
    )
    if result.excess:
        say(
            f"           estimate: the residual of each layer is at most {result.excess:.3%} larger than "
            "with an exact SVD"
        )
    if result.capped:
        say(
            f"           {len(result.capped)} layers have a full rank below the requested one: the principal "
            "holds all of them"
        )
    if result.zero:
        names = some_of([layer.name for layer in result.zero])
        print_warning(
            f"training cannot change {counted(len(result.zero), 'layer')} with only zero weights, because "
            f"the factors are zero too: {names}"
        )
    if result.residual is None:
        return
    say(f"residual   {result.residual}  ({megabytes(result.residual.stat().st_size)})")
    if result.exact:
        listed = f", {result.exceptions:,} of them from a list of exceptions" if result.exceptions else ""
        say(f"           residual + principal restore every weight bit for bit{listed}")
    else:
        share = f"{result.share:.2%}"
        say(
            f"           residual + principal restore {share} of the factored weights bit for bit, the others"
        )
        say("           up to one rounding (exact: --residual-dtype float32, or float64 for an fp32 model)")
