"""The text of a model card. What is not recorded is called unknown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from spectune.errors import printable
from spectune.files.provenance import ADAPTERS_KEY, Role, parse_json, spectune_version
from spectune.files.reader import Checkpoint
from spectune.ops.model_card.run_facts import RunFacts

UNKNOWN = "unknown"
LICENSE_KEY = "modelspec.license"
_WRITTEN_BY_TRAINERS = {"steps": "ss_steps", "pictures": "ss_num_train_images", "base": "ss_sd_model_name"}
_TAGS = ("stable-diffusion-xl", "text-to-image", "spectune")

# The keys of a recipe that a card shows. Paths are left out: they name folders of the author's computer.
_RECIPE_KEYS = (
    *("model.rank", "model.conv_rank", "model.frame", "model.form", "model.parts", "model.quantize"),
    *("data.resolution_px", "data.flip_probability", "data.random_crop"),
    *("data.caption.shuffle", "data.caption.dropout_probability"),
    *("objective.kind", "objective.flow_shift", "objective.zero_terminal_snr"),
    *("loss.kind", "loss.weighting", "loss.min_snr_gamma"),
    *("optimizer.name", "optimizer.learning_rate", "optimizer.part_learning_rates"),
    *("optimizer.schedule", "optimizer.warmup_steps"),
    *(
        "run.steps",
        "run.epochs",
        "run.batch",
        "run.accumulation",
        "run.precision",
        "run.ema_decay",
        "run.seed",
    ),
)


def card_text(
    written: Checkpoint, source: Checkpoint, run: RunFacts, *, folder: Path, weights_hash: str
) -> str:
    """Return the Markdown text for a `written` model that was made from `source`, for a card in `folder`."""
    is_adapter = written.provenance.role in (Role.LORA, Role.PRINCIPAL, Role.TUNED)
    kind = "lora" if is_adapter else "checkpoint"
    front = ["---", f"license: {UNKNOWN}", "tags:", *(f"- {tag}" for tag in (*_TAGS, kind)), "---"]
    what = "An adapter (LoRA) for SDXL" if is_adapter else "An SDXL checkpoint"
    base_license = written.metadata.get(LICENSE_KEY) or source.metadata.get(LICENSE_KEY)
    lines = [
        *front,
        "",
        f"# {_code(written.label)}",
        "",
        f"{what}, written by spectune {spectune_version()}.",
        "",
        *_table(_model_rows(written, source, weights_hash)),
        "## Training",
        "",
        *_table(_training_rows(source, run)),
        "## Recipe",
        "",
        *(_table(_recipe_rows(run.recipe)) if run.recipe else [f"{UNKNOWN.capitalize()}.", ""]),
        "## Previews",
        "",
        *(_picture(path, folder) for path in run.previews),
        *([] if run.previews else [f"{UNKNOWN.capitalize()}."]),
        "",
        "## License",
        "",
        f"{UNKNOWN.capitalize()}: set it here and in the first lines.",
        f"License of the base: {_code(base_license)}.",
    ]
    return "\n".join(lines) + "\n"


def _model_rows(written: Checkpoint, source: Checkpoint, weights_hash: str) -> Iterator[tuple[str, object]]:
    facts = written.provenance
    base = facts.base_name or source.provenance.base_name or source.metadata.get(_WRITTEN_BY_TRAINERS["base"])
    yield "base", base
    yield "SHA-256 of the base's weights", facts.base_hash or source.provenance.base_hash
    yield "SHA-256 of these weights", weights_hash
    yield "made from", source.label
    yield "prediction", facts.prediction or source.provenance.prediction
    for label, value in (("flow shift", facts.flow_shift), ("noise schedule", facts.noise_schedule)):
        if value is not None:
            yield label, value
    adapters = parse_json(written.metadata.get(ADAPTERS_KEY, "[]"))
    for entry in cast("list[Any]", adapters) if isinstance(adapters, list) else []:
        if isinstance(entry, dict):
            record = cast("Mapping[str, Any]", entry)
            yield "adapter", f"{record.get('file')}, strength {record.get('strength')}"


def _training_rows(source: Checkpoint, run: RunFacts) -> Iterator[tuple[str, object]]:
    metadata = source.metadata
    yield "steps", metadata.get(_WRITTEN_BY_TRAINERS["steps"]) if run.step is None else run.step
    yield "pictures", metadata.get(_WRITTEN_BY_TRAINERS["pictures"]) if run.images is None else run.images
    for label, value in run.losses:
        yield label, f"{value:.4f}"
    if not run.losses:
        yield "losses", None


def _recipe_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key in _RECIPE_KEYS:
        value: Any = recipe
        for word in key.split("."):
            value = cast("Mapping[str, Any]", value).get(word) if isinstance(value, dict) else None
        if value is not None and value != {}:
            yield key, value


def _table(rows: Iterator[tuple[str, object]]) -> Sequence[str]:
    return ["| | |", "| --- | --- |", *(f"| {label} | {_code(value)} |" for label, value in rows), ""]


def _code(value: object) -> str:
    """Return a value as a code span, in which Markdown and HTML have no effect; None is unknown."""
    if value is None or value == "":
        return UNKNOWN
    text = ", ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value)
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def _picture(path: Path, folder: Path) -> str:
    try:
        relative = Path(os.path.relpath(path, folder))
    except ValueError:  # another drive
        return _code(path.name)
    return f"![preview]({quote(relative.as_posix())})"
