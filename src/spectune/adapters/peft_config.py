"""The alphas that PEFT keeps beside the weights: in the metadata of a file or in adapter_config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from spectune.errors import InputError
from spectune.files.provenance import parse_json

CONFIG_FILE = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"  # as diffusers writes it: {"unet.r": 8, "unet.lora_alpha": 16, ...}
MOST = 1e30  # a whole number of JSON may have any number of digits
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
        own = [patterns[end] for end in _ends(module) if end in patterns]
        stated = own[0] if own else config.get("lora_alpha")
        alpha = float(rank if stated is None else stated)
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def read_peft_alphas(path: Path, metadata: Mapping[str, str]) -> PeftAlphas:
    """The configurations that belong to an adapter file; raises InputError for one that cannot be read."""
    text = metadata.get(METADATA_KEY)
    if text is not None:
        return _split_by_part(_parsed(text, f"metadata {METADATA_KEY} of {path.name}"))
    beside = path.with_name(CONFIG_FILE)
    if path.name == "adapter_model.safetensors" and beside.is_file():
        # one configuration, for whatever module the file is of
        config = _parsed(beside.read_text(encoding="utf-8", errors="replace"), str(beside))
        return PeftAlphas(dict.fromkeys(_PARTS, config))
    return PeftAlphas({})


def _parsed(text: str, where: str) -> dict[str, Any]:
    config = parse_json(text)
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a JSON object: {text[:60]}")
    found = cast(dict[str, Any], config)
    for key, value in found.items():
        if value is not None and key.endswith("lora_alpha") and not _is_number(value):
            raise InputError(f"{where}: {key} is {value!r}: expected a number")
        if value is not None and key.endswith("alpha_pattern") and not _are_numbers(value):
            raise InputError(f"{where}: {key} is {value!r}: expected numbers by name")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, cast(dict[str, object], value).values()))


def _split_by_part(flat: Mapping[str, Any]) -> PeftAlphas:
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        if part in _PARTS:
            configs.setdefault(part, {})[name] = value
    return PeftAlphas(configs)


def _ends(module: str) -> Iterator[str]:
    """The keys of alpha_pattern that mean a module: the whole path, with or without `^`, and its ends.

    PEFT reads keys as regular expressions. A file may come from anybody, so here they are plain names.
    """
    yield f"^{module}"
    while module:
        yield module
        module = module.partition(".")[2]
