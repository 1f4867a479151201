"""What other programs load from an adapter and what they leave out, from its header and its alphas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from spectune.adapters.adapter import DELTA_SUFFIXES, DOWN, FRAME_DOWN, LOW_RANK_SUFFIXES, UP
from spectune.adapters.alphas import KOHYA_PREFIXES, Alpha, read_alphas
from spectune.adapters.coverage_rules import ADAPTER_RULES, Fate, Program, Rules, Trait
from spectune.adapters.spellings import is_peft_key, split_adapter_key
from spectune.errors import some_of
from spectune.files.source import WeightSource
from spectune.sdxl.layers import Catalogue, Layer
from spectune.sdxl.names import Part, kohya_stem

PROJECTIONS = ("lora_te1_text_projection", "lora_te2_text_projection")
SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
ATTENTION = (".to_", ".self_attn.")  # in the names of layers
DIFFUSERS_BLOCKS = ("down_blocks", "mid_block", "up_blocks")

BESIDE: Mapping[str, Trait] = {
    "diff": Trait.DIFF_BESIDE,
    "diff_b": Trait.DIFF_B,
    "w_norm": Trait.NORM,
    "b_norm": Trait.NORM,
    "lora_mid.weight": Trait.MID,
    "dora_scale": Trait.DORA,
}
OTHER_KINDS = ("hada_", "lokr_", "oft_", "a1.", "a2.", "b1.", "b2.", "on_input")  # how their suffixes begin
PEFT_PAIR = ("lora_A.weight", "lora_B.weight")
OLD_PEFT_PAIR = ("lora.down.weight", "lora.up.weight")


@dataclass(frozen=True)
class Item:
    """A layer of an adapter or a tensor of a file, with what is special about it."""

    name: str
    traits: frozenset[Trait] = frozenset()
    counted: bool = True  # among what a program can load


@dataclass(frozen=True)
class Finding:
    """Layers or tensors that a program treats alike, and why."""

    names: tuple[str, ...]
    reason: str

    @property
    def text(self) -> str:
        return f"{len(self.names)} ({some_of(self.names, 1)}): {self.reason}"


@dataclass(frozen=True)
class ProgramCoverage:
    """What one program makes of a file."""

    program: Program
    loads: int  # layers of an adapter, tensors of a checkpoint; 0 where it refuses the file
    of: int
    ignores: tuple[Finding, ...]
    raises: tuple[Finding, ...]  # why it refuses the file
    notes: tuple[Finding, ...]  # loaded, but not as it may be meant

    @property
    def complete(self) -> bool:
        """Everything is loaded as the file means it."""
        return self.loads == self.of and not (self.ignores or self.raises or self.notes)


def adapter_coverage(source: WeightSource, catalogue: Catalogue) -> tuple[ProgramCoverage, ...]:
    """What each program loads from an adapter in any spelling.

    `catalogue` holds all layers of the model (`build_catalogue(..., all_layers=True)`); of the tensors only
    the alphas are read.
    """
    return judge(list(_items(source, catalogue)), ADAPTER_RULES)


def judge(items: Sequence[Item], rules: Mapping[Trait, Rules]) -> tuple[ProgramCoverage, ...]:
    """Apply a table to the items of a file; one record per program, in the order of Program."""
    by_trait: dict[Trait, list[str]] = {}
    for item in items:
        for trait in item.traits:
            by_trait.setdefault(trait, []).append(item.name)
    programs = [program for program in Program if all(program in row for row in rules.values())]
    ordered = [trait for trait in rules if trait in by_trait]
    return tuple(_judged(program, items, by_trait, ordered, rules) for program in programs)


def _judged(
    program: Program,
    items: Sequence[Item],
    by_trait: Mapping[Trait, list[str]],
    traits: Sequence[Trait],
    rules: Mapping[Trait, Rules],
) -> ProgramCoverage:
    def findings(fate: Fate) -> tuple[Finding, ...]:
        found: dict[str, list[str]] = {}
        for trait in traits:
            rule = rules[trait][program]
            if rule.fate is fate and rule.reason:
                found.setdefault(rule.reason, []).extend(by_trait[trait])
        return tuple(Finding(tuple(dict.fromkeys(names)), reason) for reason, names in found.items())

    left_out = {trait for trait in traits if rules[trait][program].fate is not Fate.LOADS}
    counted = [item for item in items if item.counted]
    refused = findings(Fate.RAISES)
    return ProgramCoverage(
        program=program,
        loads=0 if refused else sum(not item.traits & left_out for item in counted),
        of=len(counted),
        ignores=findings(Fate.IGNORES),
        raises=refused,
        notes=findings(Fate.LOADS),
    )


def coverage_rows(coverages: Iterable[ProgramCoverage]) -> list[tuple[str, str, str, str]]:
    """Program, what it loads, what it ignores, and what else to know: short texts for a table."""
    return [
        (
            str(coverage.program),
            "refuses the file" if coverage.raises else f"{coverage.loads} of {coverage.of}",
            "; ".join(finding.text for finding in coverage.ignores),
            "; ".join(finding.text for finding in (*coverage.raises, *coverage.notes)),
        )
        for coverage in coverages
    ]


@dataclass(frozen=True)
class _File:
    """What the keys of an adapter have in common."""

    alphas: Mapping[str, Alpha]
    usual_alphas: Mapping[str, float]  # the most frequent one by part, as stems name it
    both_spellings: bool  # of the UNet's blocks
    only_kohya: bool  # every key begins as kohya's do


def _items(source: WeightSource, catalogue: Catalogue) -> Iterator[Item]:
    stems: dict[str, set[str]] = {}
    paths: dict[str, set[str]] = {}
    for key in source.tensors:
        if key.startswith(KOHYA_PREFIXES):
            stem, suffix = split_adapter_key(key)
            stems.setdefault(stem, set()).add(suffix)
        elif is_peft_key(key):
            path, suffix = _split_peft_key(key)
            paths.setdefault(path, set()).add(suffix)
        else:
            yield Item(key, frozenset({Trait.UNKNOWN_KEY}), counted=False)
    alphas = read_alphas(source)
    file = _File(
        alphas=alphas,
        usual_alphas=_usual(alphas),
        both_spellings=all(
            any(word in key for key in source.tensors for word in words)
            for words in (SGM_BLOCKS, DIFFUSERS_BLOCKS)
        ),
        only_kohya=all(key.startswith(KOHYA_PREFIXES) for key in source.tensors),
    )
    by_diffusers = {layer.diffusers: layer for layer in catalogue}
    in_kohya_style = {kohya_stem(path): layer for path, layer in by_diffusers.items()}
    for stem, suffixes in stems.items():
        layer = catalogue.by_kohya.get(stem) or in_kohya_style.get(stem)
        yield from _kohya_items(stem, suffixes, layer, file)
    for path, suffixes in paths.items():
        yield _peft_item(path, suffixes, by_diffusers.get(path))


def _kohya_items(stem: str, suffixes: set[str], layer: Layer | None, file: _File) -> Iterator[Item]:
    body = _body(suffixes)
    if body is not None:
        traits = body | _place(stem, layer) | _spelling(stem, layer, file) | _alpha(stem, layer, file)
        yield Item(stem if layer is None else layer.name, frozenset(traits))
    taken = {*LOW_RANK_SUFFIXES, *DELTA_SUFFIXES} if body is not None else set[str]()
    if body == {Trait.DIFF}:
        taken.add("diff")
    for suffix in sorted(suffixes - taken):
        if body != {Trait.OTHER_KIND} or not suffix.startswith(OTHER_KINDS):
            trait = BESIDE.get(suffix, Trait.UNKNOWN_KEY)
            yield Item(f"{stem}.{suffix}", frozenset({trait}), counted=False)


def _body(suffixes: set[str]) -> set[Trait] | None:
    """What a layer is instead of a pair; empty for a pair, None where nothing makes it a layer."""
    if FRAME_DOWN in suffixes:
        return {Trait.DELTA}
    if {DOWN, UP} <= suffixes:
        return set()
    if DOWN in suffixes:
        return {Trait.LONE_DOWN}
    if UP in suffixes:
        return {Trait.LONE_UP}
    if any(suffix.startswith(OTHER_KINDS) for suffix in suffixes):
        return {Trait.OTHER_KIND}
    return {Trait.DIFF} if "diff" in suffixes else None


def _place(stem: str, layer: Layer | None) -> set[Trait]:
    if layer is not None:
        return set() if layer.default else {Trait.EXTRA}
    return {Trait.PROJECTION if stem in PROJECTIONS else Trait.UNKNOWN_LAYER}


def _spelling(stem: str, layer: Layer | None, file: _File) -> set[Trait]:
    traits: set[Trait] = set() if file.only_kohya else {Trait.KOHYA_BESIDE_OTHERS}
    if file.both_spellings and any(word in stem for word in SGM_BLOCKS):
        traits.add(Trait.SGM_BESIDE_DIFFUSERS)
    if layer is not None and layer.default and layer.kohya != stem:
        traits.add(Trait.DIFFUSERS_SPELLING)
    return traits


def _alpha(stem: str, layer: Layer | None, file: _File) -> set[Trait]:
    alpha = file.alphas.get(stem)
    if alpha is None:
        return set()
    usual = file.usual_alphas.get(_part(stem))
    if alpha.value is None:
        return {Trait.NO_ALPHA if usual is None else Trait.SOME_NO_ALPHA}
    traits: set[Trait] = set()
    if alpha.value != alpha.rank:
        traits.add(Trait.ALPHA_ROUNDED if alpha.rounded else Trait.ALPHA_NOT_RANK)
    if alpha.value != usual and layer is not None and any(word in layer.name for word in ATTENTION):
        traits.add(Trait.ALPHA_VARIES)
    return traits


def _usual(alphas: Mapping[str, Alpha]) -> Mapping[str, float]:
    values: dict[str, Counter[float]] = {}
    for alpha in alphas.values():
        if alpha.value is not None:
            values.setdefault(_part(alpha.stem), Counter())[alpha.value] += 1
    return {part: counted.most_common(1)[0][0] for part, counted in values.items()}


def _part(stem: str) -> str:
    """`unet`, `te1` or `te2` out of a kohya stem."""
    return stem.split("_", 2)[1]


def _split_peft_key(key: str) -> tuple[str, str]:
    for suffix in (*PEFT_PAIR, *OLD_PEFT_PAIR):
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    return key, ""


def _peft_item(path: str, suffixes: set[str], layer: Layer | None) -> Item:
    traits: set[Trait] = {Trait.OLD_DIFFUSERS} if suffixes & set(OLD_PEFT_PAIR) else set()
    if layer is None:
        traits.add(Trait.UNKNOWN_LAYER)
    else:
        attention = layer.part is Part.UNET and ".to_" in layer.name
        traits.add(Trait.PEFT_ATTENTION if attention else Trait.PEFT_OTHER)
    if len(suffixes) == 1:
        traits.add(Trait.LONE_DOWN if suffixes <= {PEFT_PAIR[0], OLD_PEFT_PAIR[0]} else Trait.LONE_UP)
    return Item(path if layer is None else layer.name, frozenset(traits))
