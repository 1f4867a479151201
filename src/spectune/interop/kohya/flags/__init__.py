"""The tables of all known flags of sd-scripts, one row per flag, by subject.

docs/reference/kohya-flags.md is generated from these tables. The kinds of rows:

- `takes(key, parse)`: the flag's value becomes the value of a recipe key.
- `switches(key, value)`: the flag sets a recipe key to `value`.
- `ignores(why)`: the flag changes nothing in spectune.
- `refuses(why)`: spectune has no counterpart; the values in `unless` have no effect and are ignored.
- `custom(summary, convert)`: `convert`, above the table, computes the result.
- `custom_switch(summary, convert)`: the same for a flag without value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spectune.errors import did_you_mean
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.flags.data import DATA
from spectune.interop.kohya.flags.model import MODEL
from spectune.interop.kohya.flags.objective import OBJECTIVE
from spectune.interop.kohya.flags.optimizer import OPTIMIZER
from spectune.interop.kohya.flags.run import RUN
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
