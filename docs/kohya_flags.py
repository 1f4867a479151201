"""The tables of docs/reference/kohya-flags.md: every flag of sd-scripts that the importer knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spectune.interop.kohya.derived import OPTIMIZER_NAMES
from spectune.interop.kohya.flags.data import DATA
from spectune.interop.kohya.flags.model import MODEL, NETWORK_ARGS
from spectune.interop.kohya.flags.objective import OBJECTIVE
from spectune.interop.kohya.flags.optimizer import OPTIMIZER
from spectune.interop.kohya.flags.run import RUN


def flags_page() -> str:
    """Return the tables of docs/reference/kohya-flags.md."""
    network_args = {name: rule.summary for name, rule in NETWORK_ARGS.items()}
    optimizers = {name: f"`{ours}`" for name, ours in OPTIMIZER_NAMES.items()}
    sections: list[str] = []
    for heading, rules in (
        ("Model", MODEL),
        ("Data", DATA),
        ("Objective and loss", OBJECTIVE),
        ("Optimizer", OPTIMIZER),
        ("Run", RUN),
    ):
        sections += [f"## {heading}", *_table("flag", {name: rule.summary for name, rule in rules.items()})]
        if rules is MODEL:
            sections += ["### Arguments in `--network_args`", *_table("argument", network_args)]
        if rules is OPTIMIZER:
            sections += [
                "### Names in `--optimizer_type`",
                *_table("name, in any case, with or without import path", optimizers),
            ]
    return "\n\n".join(sections) + "\n"


def _table(header: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield "\n".join(
        [f"| {header} | in spectune |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in rows.items())]
    )
