"""Output of `verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import print_warning, say, table
from spectune.cli.report_parts import loading_json, loading_table
from spectune.ops.options.model_files import VerifyOptions
from spectune.pairs.round_trip import VerifyReport


def exit_code(result: VerifyReport) -> int:
    return 0 if result.ok else 1


def as_json(result: VerifyReport, options: VerifyOptions, seconds: float) -> dict[str, Any]:
    return {
        "ok": result.ok,
        "exact": result.exact,
        "tensors": len(result.records),
        "exact_tensors": result.exact_tensors,
        "bit_equal_share": result.share,
        "max_ulp": result.max_ulp,
        "relative_error": result.relative_error,
        "model_hash": result.hashes.model,
        "rebuilt_hash": result.hashes.rebuilt,
        "principal_hash": result.hashes.principal,
        "problems": result.problems,
        "wrong_layers": result.wrong_layers,
        "inexact": {
            record.name: asdict(record.agreement) | {"share": record.agreement.share}
            for record in result.records
            if not record.agreement.exact
        },
        "programs": {name: loading_json(programs) for name, programs in result.programs.items()},
        "seconds": seconds,
    }


def show(result: VerifyReport, options: VerifyOptions, seconds: float) -> None:
    say(
        f"{result.exact_tensors} of {len(result.records)} tensors are bit-identical "
        f"({result.share:.4%} of the weights)"
    )
    say(f"weights of the model          sha256 {result.hashes.model}")
    say(f"weights of the restored model sha256 {result.hashes.rebuilt}")
    if not result.exact:
        worst = sorted(result.records, key=lambda record: record.agreement.share)[:5]
        rows = [
            (
                r.name,
                f"{r.agreement.share:.2%}",
                f"{r.agreement.max_ulp}",
                f"{r.agreement.relative_error:.1e}",
            )
            for r in worst
        ]
        table(
            "tensors with the largest differences", ("tensor", "bit-equal", "max ulp", "relative error"), rows
        )
    for name, programs in result.programs.items():
        loading_table(f"what other programs load from {name}", programs)
    for problem in result.problems:
        print_warning(problem)
    say(_verdict(result, "base + tuned adapter" if not result.hashes.principal else "residual + principal"))


def _verdict(result: VerifyReport, pair: str) -> str:
    if not result.ok:
        return f"FAILED: {pair} do not restore the model"
    exactly = "bit for bit" if result.exact else "up to rounding"
    return f"OK: {pair} restore the model {exactly}"
