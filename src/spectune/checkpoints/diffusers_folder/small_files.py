"""Collect the small files of a diffusers folder (configurations, tokenizers) from a template or new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from spectune.checkpoints.diffusers_folder.config import (
    SCHEDULER,
    VAE,
    Schedule,
    parse_config,
    per_level,
    read_schedule,
)
from spectune.checkpoints.diffusers_folder.default_configs import (
    COMPONENTS,
    NO_COMPONENT,
    PIPELINE,
    model_configs,
    scheduler_config,
)
from spectune.errors import InputError, some_of
from spectune.files.reader import MODEL_INDEX, PICKLES
from spectune.sdxl.layout import Layout, UNetLayout, VaeLayout
from spectune.sdxl.vocabulary import EOS, clip_vocabulary, tokenizer_files

Files = Mapping[str, bytes]  # by path in the folder, separated by `/`

_LARGEST_BYTES = 20_000_000  # of a file to copy from a template; a vocabulary has 1 MB
_WEIGHTS = frozenset({".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf", *PICKLES})

# These have one value per level; values of levels without transformers are not used.
_LEVELS = ("attention_head_dim", "transformer_layers_per_block")
# Entries that must match the weights.
_SIZES = (
    *_LEVELS,
    "addition_time_embed_dim",
    "block_out_channels",
    "cross_attention_dim",
    "hidden_act",
    "hidden_size",
    "in_channels",
    "intermediate_size",
    "latent_channels",
    "layers_per_block",
    "max_position_embeddings",
    "norm_num_groups",
    "num_attention_heads",
    "num_hidden_layers",
    "out_channels",
    "projection_class_embeddings_input_dim",
    "use_linear_projection",
    "vocab_size",
)


def read_template(folder: Path) -> dict[str, bytes]:
    """Return the files of a diffusers folder except the weights, byte for byte.

    Raises InputError if it is not a diffusers folder, or if its pipeline has components that SDXL lacks.
    """
    if not (folder / MODEL_INDEX).is_file():
        raise InputError(
            f"{folder} is not a diffusers folder: it has no {MODEL_INDEX}",
            hint="pass the folder of an SDXL pipeline as `template`",
        )
    files = {MODEL_INDEX: (folder / MODEL_INDEX).read_bytes()}
    index = parse_config(files[MODEL_INDEX], str(folder / MODEL_INDEX))
    others = [name for name, kind in index.items() if _is_component(kind) and name not in COMPONENTS]
    if others:
        raise InputError(
            f"{folder} has components that SDXL does not have: {some_of(others)}",
            hint="use the folder of a plain SDXL as `template`: the new one cannot contain these components",
        )
    for name in COMPONENTS:
        for path in sorted((folder / name).glob("*")):
            if path.is_file() and not _is_weight(path):
                files[f"{name}/{path.name}"] = path.read_bytes()
    for path in sorted(folder.glob("LICENSE*")):
        files[path.name] = path.read_bytes()
    return files


def small_files(layout: Layout, schedule: Schedule, template: Files | None = None) -> dict[str, bytes]:
    """Return all files of a folder except its weights: those of the template, and new files for the rest.

    Files of the template are copied byte for byte. Only entries that contradict the prediction, the VAE's
    factors or its presence are changed. Raises InputError if a configuration of the template has other sizes
    than the model.
    """
    template = template or {}
    files = {name: raw for name, raw in template.items() if layout.vae or not name.startswith("vae/")}
    for name, config in model_configs(layout).items():
        if name in files:
            _check_sizes(name, parse_config(files[name], f"{name} of the template"), config, layout)
        else:
            files[name] = _json(config)
    if layout.vae is not None:
        files[VAE] = _with_factors(files[VAE], layout.vae)
    files[SCHEDULER] = _scheduler(files.get(SCHEDULER), schedule)
    vocabulary = clip_vocabulary().words
    if len(vocabulary) == layout.te1.vocab == layout.te2.vocab:
        for name, pad in (("tokenizer", EOS), ("tokenizer_2", vocabulary[0])):
            if not any(path.startswith(f"{name}/") for path in files):
                files |= tokenizer_files(name, pad=pad, context=layout.te1.context)
    files[MODEL_INDEX] = _model_index(files, template)
    return files


def _is_component(kind: Any) -> bool:
    return isinstance(kind, list) and kind != NO_COMPONENT


def _is_weight(path: Path) -> bool:
    """Return whether a file holds weights in any format, or is an index of weights."""
    large = path.stat().st_size > _LARGEST_BYTES
    return large or ".index." in path.name or path.suffix.lower() in _WEIGHTS


def _check_sizes(name: str, template: Mapping[str, Any], expected: Mapping[str, Any], layout: Layout) -> None:
    """Raise InputError if a configuration of the template has other sizes than the weights."""
    for key in _SIZES:
        actual, value = template.get(key), expected.get(key)
        if actual is None or value is None:
            continue
        if key in _LEVELS:
            actual, value = _used_levels(actual, layout.unet), _used_levels(value, layout.unet)
        if actual != value:
            raise InputError(
                f"{name} of the template belongs to another model: {key} is {actual}, expected {value}",
                hint="use the folder of the model that the weights come from as `template`",
            )


def _used_levels(value: Any, unet: UNetLayout) -> Any:
    """Return the values of the levels with transformers; the last value also applies to the middle."""
    used = [*(depth > 0 for depth in unet.depths[:-1]), True]
    entries: Any = per_level(value, len(used))
    if not isinstance(entries, list) or len(cast(list[Any], entries)) != len(used):
        return cast(Any, entries)
    return [entry for entry, needed in zip(cast(list[Any], entries), used, strict=True) if needed]


def _with_factors(raw: bytes, vae: VaeLayout) -> bytes:
    config = parse_config(raw, VAE)
    changes: dict[str, float] = {}
    if config.get("scaling_factor") != vae.scale:
        changes["scaling_factor"] = vae.scale
    if (config.get("shift_factor") or 0.0) != vae.shift:
        changes["shift_factor"] = vae.shift
    return _json(config | changes) if changes else raw


def _scheduler(raw: bytes | None, expected: Schedule) -> bytes:
    """Return the template's scheduler, adapted to the expected prediction if necessary, or a new one."""
    if raw is None:
        return _json(scheduler_config(expected))
    config = parse_config(raw, f"{SCHEDULER} of the template")
    template = read_schedule(config, f"{SCHEDULER} of the template")
    # Not every single file marks that its last timestep is pure noise.
    expected = Schedule(
        expected.prediction or template.prediction,
        expected.flow_shift or template.flow_shift,
        expected.zero_snr or template.zero_snr,
    )
    if template == expected:
        return raw
    new = scheduler_config(expected)
    if "flow" in (template.prediction, expected.prediction):
        return _json(new)
    return _json(config | {key: new[key] for key in ("prediction_type", "rescale_betas_zero_snr")})


def _model_index(files: Files, template: Files) -> bytes:
    """Return the template's index, or a new one, with the components in `files`."""
    scheduler = _class_of(files[SCHEDULER])
    kinds: dict[str, Any] = {**COMPONENTS, "scheduler": ["diffusers", scheduler]}
    present = {path.partition("/")[0] for path in files}
    expected = {name: kind if name in present else NO_COMPONENT for name, kind in kinds.items()}
    if MODEL_INDEX not in template:
        return _json({**PIPELINE, **expected})
    index = parse_config(template[MODEL_INDEX], f"{MODEL_INDEX} of the template")
    changed = [name for name in expected if _is_component(index.get(name)) != (name in present)]
    if SCHEDULER not in template or _class_of(template[SCHEDULER]) != scheduler:
        changed.append("scheduler")
    return _json(index | {name: expected[name] for name in changed}) if changed else template[MODEL_INDEX]


def _class_of(scheduler: bytes) -> Any:
    return parse_config(scheduler, SCHEDULER).get("_class_name")


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
