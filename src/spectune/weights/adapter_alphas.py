"""The alphas that PEFT keeps beside the weights: in the metadata of a file or in adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError

CONFIG_FILE = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # as diffusers writes it: {"unet.r": 8, "unet.lora_alpha": 16, ...}
_PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class PeftAlphas:
    """What PEFT's configurations say of the scale of each module; empty for a file without one."""

    configs: Mapping[str, Mapping[str, Any]]  # by the root of the modules: unet, text_encoder, text_encoder_2

    def alpha(self, diffusers: str, rank: int) -> float | None:
        """The alpha of a layer by its path in a pipeline, None where no configuration covers it.

        PEFT's scale is alpha / rank, with `use_rslora` alpha / sqrt(rank).
        """
        root, _, module = diffusers.partition(".")
        config = self.configs.get(root)
        if config is None:
            return None
        patterns = cast(dict[str, float], config.get("alpha_pattern") or {})
        own = [value for pattern, value in patterns.items() if _matches(pattern, module)]
        alpha = float(own[0] if own else config.get("lora_alpha", rank))
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def read_peft_alphas(path: Path, metadata: Mapping[str, str]) -> PeftAlphas:
    """The configurations that belong to an adapter file; raises InputError for one that cannot be read."""
    text = metadata.get(METADATA_KEY)
    if text is not None:
        return _split_by_part(_parsed(text, f"metadata {METADATA_KEY} of {path.name}"))
    beside = path.with_name(CONFIG_FILE)
    if path.name == "adapter_model.safetensors" and beside.is_file():
        # one configuration, for whatever module the file is of
        config = _parsed(beside.read_text(encoding="utf-8"), str(beside))
        return PeftAlphas(dict.fromkeys(_PARTS, config))
    return PeftAlphas({})


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object: {text[:60]}")
    found = cast(dict[str, Any], config)
    for key, value in found.items():
        if key.endswith(("lora_alpha", "alpha_pattern")) and not _numbers(value):
            raise InputError(f"{where}: {key} is {value!r}: expected numbers")
    return found


def _numbers(value: object) -> bool:
    numbers = list(cast(dict[str, object], value).values()) if isinstance(value, dict) else [value]
    return all(n is None or (isinstance(n, int | float) and math.isfinite(n)) for n in numbers)


def _split_by_part(flat: Mapping[str, Any]) -> PeftAlphas:
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        if part in _PARTS:
            configs.setdefault(part, {})[name] = value
    return PeftAlphas(configs)


def _matches(pattern: str, module: str) -> bool:
    """Whether a key of alpha_pattern means a module: as PEFT matches it, at the end of the path.

    A file may come from anybody: what is no plain name is compared letter by letter, not as an expression.
    """
    name = re.escape(pattern.removeprefix("^"))
    return re.search(rf"(?:^|\.){name}$", module) is not None
