"""All known flags of sd-scripts: one table, by subject."""

from spectune.interop.kohya.flags.table import DEFAULTS, NETWORK_ARGS, RULES, convert_flag, flags_page

__all__ = ["DEFAULTS", "NETWORK_ARGS", "RULES", "convert_flag", "flags_page"]
