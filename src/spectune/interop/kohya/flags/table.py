"""The tables of all known flags of sd-scripts, one row per flag.

docs/reference/kohya-flags.md is generated from this table. The kinds of rows:

- `takes(key, parse)`: the flag's value becomes the value of a recipe key.
- `switches(key, value)`: the flag sets a recipe key to `value`.
- `ignores(why)`: the flag changes nothing in spectune.
- `refuses(why)`: spectune has no counterpart; the values in `unless` have no effect and are ignored.
- `custom(summary, convert)`: the result depends on other flags; see the converters.
- `custom_switch(summary, convert)`: the same for a flag without value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from spectune.errors import did_you_mean
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.derived import OPTIMIZER_NAMES
from spectune.interop.kohya.flags.data import DATA
from spectune.interop.kohya.flags.model import MODEL, NETWORK_ARGS
from spectune.interop.kohya.flags.run import RUN
from spectune.interop.kohya.flags.training import OBJECTIVE, OPTIMIZER
from spectune.interop.kohya.rules import FlagResult, FlagRule, Results

RULES: Mapping[str, FlagRule] = {**MODEL, **DATA, **OBJECTIVE, **OPTIMIZER, **RUN}

# Defaults of sd-scripts that differ from those of spectune.
DEFAULTS: Mapping[str, str] = {
    "caption_extension": ".caption",
    "learning_rate": "2e-6",
    "max_train_steps": "1600",
    "network_dim": "4",
    "output_name": "last",
}


def convert_flag(flag: Flag, command: Command) -> Results:
    """Return the results of a flag. For an unknown flag, suggest the closest known one."""
    rule = RULES.get(flag.name)
    if rule is None:
        return (FlagResult(flag, "unknown", did_you_mean(flag.name, RULES)),)
    results = rule.convert(flag, command)
    if rule.max_values is None or len(flag.values) <= rule.max_values:
        return results
    note = f"extra values ignored: {' '.join(flag.values[rule.max_values :])}"
    return tuple(
        replace(result, why=f"{result.why}; {note}" if result.why else note)
        if result.verdict == "taken"
        else result
        for result in results
    )


# ---------------------------------------------------------------- the page


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
