"""Find out what other programs load from a file: look up its features in the table of programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spectune.adapters.adapter import DELTA_SUFFIXES, DOWN, FRAME_DOWN, LOW_RANK_SUFFIXES, UP
from spectune.adapters.alphas import KOHYA_PREFIXES, Alpha, read_alphas
from spectune.adapters.detect import is_adapter
from spectune.adapters.programs import ADAPTER_PROGRAMS, CHECKPOINT_PROGRAMS, Fate, Feature, Program
from spectune.adapters.spellings import COMFYUI_ROOTS, PEFT_ROOT, stem_and_factor, stems
from spectune.errors import some_of
from spectune.files.provenance import V_KEY, ZERO_SNR_KEY, Role
from spectune.files.reader import Checkpoint
from spectune.files.source import WeightSource, declared_prediction
from spectune.sdxl.inference import part_layouts
from spectune.sdxl.layers import Catalogue
from spectune.sdxl.layout import (
    PART_ROOTS,
    PARTS,
    SDXL,
    TE1_ROOT,
    TIME_IDS,
    PartLayouts,
)
from spectune.sdxl.names import Part, diffusers_name, kohya_stem, modules_of
from spectune.sdxl.state_dicts import state_views

WHOLE_FILE = ""  # name of the item that stands for the file itself


class Item(NamedTuple):
    """A layer of an adapter or a tensor of a file."""

    name: str
    features: set[Feature]
    counted: bool  # whether it counts as a layer or tensor that a program can load


class Finding(NamedTuple):
    """Layers or tensors that a program treats in the same way, and why."""

    names: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        if self.names == (WHOLE_FILE,):
            return self.reason
        return f"{len(self.names)} ({some_of(self.names, 1)}): {self.reason}"


@dataclass(frozen=True)
class Loading:
    """What one program loads from a file."""

    program: Program
    loads: int  # number of layers (adapter) or tensors (checkpoint); 0 if it refuses the file
    of: int  # number of all layers or tensors
    ignores: tuple[Finding, ...]
    refuses: tuple[Finding, ...]  # why it refuses the file
    notes: tuple[Finding, ...]  # loaded, but possibly not as intended

    @property
    def complete(self) -> bool:
        """Whether the program loads everything as intended."""
        return self.loads == self.of and not (self.ignores or self.refuses or self.notes)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Return the cells of a table row: program, what it loads, what it ignores, notes."""
        count = "refuses the file" if self.refuses else f"{self.loads} of {self.of}"
        ignored, notes = ("; ".join(map(str, items)) for items in (self.ignores, self.refuses + self.notes))
        return str(self.program), count, ignored, notes


def loading_table(source: WeightSource, catalogue: Catalogue | None = None) -> tuple[Loading, ...]:
    """Return what each program loads from an adapter in any spelling or from a single-file checkpoint.

    Reads only the header and the alphas. `catalogue` lists all layers of the model that an adapter is for, by
    default those of SDXL. Raises InputError for a checkpoint without an SDXL UNet.
    """
    if is_adapter(source):
        items, programs = list(_layers(source, catalogue)), ADAPTER_PROGRAMS
    else:
        items, programs = [*_tensors(source), _whole_file(source)], CHECKPOINT_PROGRAMS
    return tuple(_loading(program, items) for program in programs)


def _loading(program: Program, items: Sequence[Item]) -> Loading:
    names_by_fate: dict[Fate, dict[str, list[str]]] = {fate: {} for fate in Fate}  # names by reason
    not_loaded: set[Feature] = set()
    for feature, cell in ((row, cell) for row in Feature for cell in row.value if program in cell.programs):
        names = [item.name for item in items if feature in item.features]
        if names:
            names_by_fate[cell.fate].setdefault(cell.reason, []).extend(names)
        if cell.fate is not Fate.LOADS:
            not_loaded.add(feature)
    notes, ignores, refuses = (
        tuple(Finding(tuple(dict.fromkeys(names)), reason) for reason, names in names_by_fate[fate].items())
        for fate in Fate
    )
    counted = [item for item in items if item.counted]
    loads = 0 if refuses else sum(not item.features & not_loaded for item in counted)
    return Loading(program, loads, len(counted), ignores, refuses, notes)


_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
_DIFFUSERS_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
# Beginnings of the suffixes of LoHa, LoKr, OFT, GLoRA and (IA)^3.
_OTHER_KINDS = ("hada_", "lokr_", "oft_", "a1.", "a2.", "b1.", "b2.", "on_input")
_WITH_PAIR: Mapping[str, Feature] = {
    "diff": Feature.DIFF,
    "diff_b": Feature.DIFF_B,
    "w_norm": Feature.NORM,
    "b_norm": Feature.NORM,
    "lora_mid.weight": Feature.MID,
    "dora_scale": Feature.DORA,
}


class _Known(NamedTuple):
    """A layer that an adapter can have."""

    name: str
    diffusers: str
    default: bool


def _layers(source: WeightSource, catalogue: Catalogue | None) -> Iterator[Item]:
    """Yield each layer of an adapter, and each key that belongs to no layer."""
    if catalogue is not None:
        layers = [_Known(layer.name, layer.diffusers, layer.default) for layer in catalogue]
    else:
        modules = [module for part in Part for module in modules_of(SDXL, part.value) if module.factorable]
        layers = [_Known(m.layer, diffusers_name(m.layer, SDXL.unet), m.default) for m in modules]
    known = {stem: layer for layer in layers for stem in stems(layer.name, layer.diffusers)}
    kohya: dict[str, set[str]] = {}  # suffixes by stem
    paths: dict[str, dict[str, str]] = {}  # factor -> key by stem
    for key in source.tensors:
        stem, factor = stem_and_factor(key)
        if key.startswith(KOHYA_PREFIXES):
            kohya.setdefault(stem, set()).add(key.partition(".")[2])
        elif factor in LOW_RANK_SUFFIXES:
            paths.setdefault(stem, {})[factor] = key
        else:
            yield Item(key, {Feature.UNKNOWN_KEY}, counted=False)
    for stem, keys in paths.items():
        layer = known.get(stem)
        yield Item(layer.name if layer else stem, _halves(keys) | _path(keys, layer), counted=True)
    alphas, in_file = read_alphas(source), _spellings_of(source)
    usual = _usual_alphas(alphas.values())
    for stem, suffixes in kohya.items():
        layer = known.get(stem)
        content, used = _content(suffixes)
        if used:
            features = content | _names(stem, layer, in_file) | _alpha(alphas.get(stem), usual, layer)
            yield Item(layer.name if layer else stem, features, counted=True)
        for suffix in sorted(suffixes - used):
            yield Item(f"{stem}.{suffix}", {_WITH_PAIR.get(suffix, Feature.UNKNOWN_KEY)}, counted=False)


def _halves(factors: Collection[str]) -> set[Feature]:
    if DOWN in factors and UP in factors:
        return set()
    return {Feature.LONE_DOWN if DOWN in factors else Feature.LONE_UP}


def _path(keys: Mapping[str, str], layer: _Known | None) -> set[Feature]:
    """Return the spelling features of a layer whose keys are paths, not kohya stems."""
    key = next(iter(keys.values()))
    old = {Feature.OLD_DIFFUSERS} if ".lora.down." in key or ".lora.up." in key else set[Feature]()
    if layer is None:
        return {Feature.UNKNOWN_LAYER} | old
    if key.startswith(COMFYUI_ROOTS):
        return {Feature.COMFYUI_NAMES}
    if key.startswith(PEFT_ROOT):
        return {Feature.PEFT_MODEL}
    if ".processor." in key:
        return {Feature.PEFT}
    if key.startswith(f"{layer.diffusers}.") and (old or key.endswith((".lora_A.weight", ".lora_B.weight"))):
        return {Feature.PEFT_ATTENTION if ".to_" in layer.name else Feature.PEFT} | old
    return {Feature.OTHER_SPELLING}


def _content(suffixes: set[str]) -> tuple[set[Feature], set[str]]:
    """Return the features of a layer with these suffixes, and the suffixes it uses; empty without a layer."""
    factors = {*LOW_RANK_SUFFIXES, *DELTA_SUFFIXES}
    if FRAME_DOWN in suffixes:
        return {Feature.DELTA}, factors
    if DOWN in suffixes or UP in suffixes:
        return _halves(suffixes), factors
    kind = {suffix for suffix in suffixes if suffix.startswith(_OTHER_KINDS)} or suffixes & {"diff"}
    return ({Feature.OTHER_KIND}, factors | kind) if kind else (set(), set())


def _spellings_of(source: WeightSource) -> set[Feature]:
    """Return the features of a file that mixes spellings; they apply to some of its layers."""
    blocks = ((word in key for key in source.tensors for word in w) for w in (_SGM_BLOCKS, _DIFFUSERS_BLOCKS))
    mixed = {Feature.SGM_WITH_DIFFUSERS} if all(map(any, blocks)) else set[Feature]()
    only_kohya = all(key.startswith(KOHYA_PREFIXES) for key in source.tensors)
    return mixed if only_kohya else mixed | {Feature.KOHYA_WITH_OTHERS}


def _names(stem: str, layer: _Known | None, in_file: set[Feature]) -> set[Feature]:
    sgm = any(word in stem for word in _SGM_BLOCKS)
    features = in_file if sgm else in_file - {Feature.SGM_WITH_DIFFUSERS}
    if layer is None:
        projection = stem.endswith("_text_projection")
        return features | {Feature.PROJECTION if projection else Feature.UNKNOWN_LAYER}
    if not layer.default:
        return features | {Feature.EXTRA}
    return features if stem == kohya_stem(layer.name) else features | {Feature.DIFFUSERS_NAMES}


def _usual_alphas(alphas: Iterable[Alpha]) -> Mapping[str, float]:
    """Return the most frequent alpha of each part, by `unet`, `te1`, `te2`."""
    counts: dict[str, Counter[float]] = {}
    for alpha in alphas:
        if alpha.value is not None:
            counts.setdefault(_part(alpha), Counter())[alpha.value] += 1
    return {part: values.most_common(1)[0][0] for part, values in counts.items()}


def _part(alpha: Alpha) -> str:
    return alpha.stem.split("_", 2)[1]


def _alpha(alpha: Alpha | None, usual: Mapping[str, float], layer: _Known | None) -> set[Feature]:
    if alpha is None:
        return set()
    if alpha.value is None:
        return {Feature.SOME_NO_ALPHA if _part(alpha) in usual else Feature.NO_ALPHA}
    features: set[Feature] = set()
    if alpha.value != alpha.rank:
        features.add(Feature.ALPHA_ROUNDED if alpha.rounded else Feature.ALPHA_NOT_RANK)
    attention = layer is not None and (".to_" in layer.name or ".self_attn." in layer.name)
    if attention and alpha.value != usual[_part(alpha)]:
        features.add(Feature.ALPHA_VARIES)
    return features


def _tensors(source: WeightSource) -> Iterator[Item]:
    """Yield each tensor of a checkpoint, and each tensor and part that is missing."""
    layout = part_layouts(source.tensors, label=source.label)
    expected = _expected(layout)
    file_names = source.file_names if isinstance(source, Checkpoint) else {}
    for name in source.tensors:
        yield Item(name, _tensor(name, expected, file_names.get(name, name)), counted=True)
    for part in layout.lacks:
        yield Item(part, {Feature.NO_VAE if part == "vae" else Feature.NO_ENCODER}, counted=False)
    for name in sorted(expected - source.tensors.keys()):
        yield Item(name, {Feature.MISSING}, counted=False)
    if not _has_sdxl_sizes(layout):
        yield Item(WHOLE_FILE, {Feature.OTHER_SIZE}, counted=False)
    elif layout.unet.out_channels != SDXL.unet.out_channels:
        yield Item(WHOLE_FILE, {Feature.OTHER_LATENTS}, counted=False)


def _whole_file(source: WeightSource) -> Item:
    prediction = declared_prediction(source)
    present = {
        Feature.RESIDUAL: source.provenance.role is Role.RESIDUAL,
        Feature.FLOW: prediction == "flow",
        Feature.V_UNMARKED: prediction == "v" and V_KEY not in source.tensors,
    }
    return Item(WHOLE_FILE, {feature for feature, holds in present.items() if holds}, counted=False)


def _expected(layout: PartLayouts) -> set[str]:
    return {view.tensor for part in PARTS for view in state_views(layout, part).values()}


def _tensor(name: str, expected: set[str], file_name: str) -> set[Feature]:
    if name in (V_KEY, ZERO_SNR_KEY):
        return {Feature.MARKER}
    if not name.startswith(tuple(PART_ROOTS.values())):
        return {Feature.OUTSIDE}
    if name not in expected and not name.endswith((".position_ids", ".logit_scale")):
        return {Feature.SURPLUS}
    short_te1 = name.startswith(TE1_ROOT) and not file_name.startswith(TE1_ROOT)
    return {Feature.SHORT_TE1} if short_te1 else set()


def _has_sdxl_sizes(layout: PartLayouts) -> bool:
    """Return whether all parts have the sizes by which other programs recognize SDXL.

    These sizes determine the numbers of heads.
    """
    sizes, expected = _sizes(layout), _sizes(SDXL)
    return all(size in (None, sdxl) for size, sdxl in zip(sizes, expected, strict=True))


def _sizes(layout: PartLayouts) -> tuple[object, ...]:
    unet, vae = layout.unet, layout.vae
    added = unet.pooled + TIME_IDS * unet.time_id_channels
    texts = [
        None if text is None else (text.width, text.mlp, text.layers) for text in (layout.te1, layout.te2)
    ]
    depths = (unet.channels, unet.depths, unet.mid_depth, unet.resnets)
    return *depths, unet.context, added, *texts, None if vae is None else vae.channels
