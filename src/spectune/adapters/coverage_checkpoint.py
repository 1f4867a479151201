"""What other programs load from a checkpoint and what they leave out, from its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spectune.adapters.coverage import Item, ProgramCoverage, judge
from spectune.adapters.coverage_rules import Program, Rule, Rules, Trait, ignores, loads, raises
from spectune.errors import InputError
from spectune.files.provenance import V_KEY, ZERO_SNR_KEY, Role
from spectune.files.source import WeightSource, declared_prediction
from spectune.sdxl.inference import layout_of
from spectune.sdxl.layout import (
    TE1_SHORT_ROOT,
    TE2_ROOT,
    UNET_ROOT,
    VAE_ROOT,
    Layout,
    PartName,
    TextLayout,
    te1_root,
)
from spectune.sdxl.names import modules_of

PARTS: Mapping[PartName, str] = {
    "unet": UNET_ROOT,
    "te1": TE1_SHORT_ROOT,
    "te2": TE2_ROOT,
    "vae": VAE_ROOT,
}
MARKERS = (V_KEY, ZERO_SNR_KEY)  # keys by which ComfyUI recognises a prediction
UNTRAINED = (".position_ids", ".logit_scale")  # in the file, in no module


def checkpoint_rules(
    *, comfyui: Rule | None = None, sd_scripts: Rule | None = None, diffusers: Rule | None = None
) -> Rules:
    """The row of a trait; LyCORIS leaves checkpoints to sd-scripts."""
    return {
        Program.COMFYUI: comfyui or loads(),
        Program.SD_SCRIPTS: sd_scripts or loads(),
        Program.DIFFUSERS: diffusers or loads(),
    }


_NEEDS_PRINCIPAL = loads("a residual: pictures come only with its principal beside it, at strength 1")
_SAID_OUTSIDE = ignores("the prediction is said on the command line or in the scheduler")

CHECKPOINT_RULES: Mapping[Trait, Rules] = {
    Trait.EXTRA_KEY: checkpoint_rules(
        comfyui=ignores("belongs to no part"),
        sd_scripts=ignores("belongs to no part"),
        diffusers=ignores("belongs to no part"),
    ),
    Trait.MARKER: checkpoint_rules(sd_scripts=_SAID_OUTSIDE, diffusers=_SAID_OUTSIDE),
    Trait.SPARE: checkpoint_rules(
        comfyui=ignores("SDXL has no such tensor"),
        sd_scripts=raises("the parts must have exactly SDXL's tensors"),
        diffusers=ignores("SDXL has no such tensor"),
    ),
    Trait.MISSING: checkpoint_rules(
        comfyui=loads("what is missing keeps the numbers that happen to be there"),
        sd_scripts=raises("the parts must have exactly SDXL's tensors"),
        diffusers=raises("what is missing stays without numbers"),
    ),
    Trait.NO_VAE: checkpoint_rules(
        comfyui=loads("has to be loaded by a node of its own"),
        sd_scripts=raises("it reads the VAE of the checkpoint even where --vae gives another"),
        diffusers=raises("has to be passed to from_single_file"),
    ),
    Trait.NO_ENCODER: checkpoint_rules(
        comfyui=loads("has to be loaded by a node of its own"),
        sd_scripts=raises("the parts must have exactly SDXL's tensors"),
        diffusers=raises("has to be passed to from_single_file"),
    ),
    Trait.SHORT_TE1: checkpoint_rules(
        comfyui=ignores("the first encoder is known only with `text_model.` in its names"),
        sd_scripts=raises("the first encoder is known only with `text_model.` in its names"),
        diffusers=raises("the first encoder is known only with `text_model.` in its names"),
    ),
    Trait.FOREIGN_SIZE: checkpoint_rules(
        comfyui=raises("recognises SDXL by its widths and depths"),
        sd_scripts=raises("has the sizes of SDXL built in"),
        diffusers=loads("only with a folder of configurations of these sizes"),
    ),
    Trait.RESIDUAL: checkpoint_rules(
        comfyui=_NEEDS_PRINCIPAL, sd_scripts=_NEEDS_PRINCIPAL, diffusers=_NEEDS_PRINCIPAL
    ),
    Trait.FLOW: checkpoint_rules(
        comfyui=loads("a file cannot say that it predicts flow: add ModelSamplingSD3 with its shift"),
        sd_scripts=loads("has no flow objective for SDXL"),
        diffusers=loads("a file cannot say that it predicts flow: pass a flow scheduler with its shift"),
    ),
    Trait.V_UNMARKED: checkpoint_rules(
        comfyui=loads("takes it for eps: it looks for the key v_pred, or add ModelSamplingDiscrete"),
        sd_scripts=loads("needs --v_parameterization"),
        diffusers=loads("needs prediction_type v_prediction in its scheduler"),
    ),
}


def checkpoint_coverage(source: WeightSource) -> tuple[ProgramCoverage, ...]:
    """What ComfyUI, sd-scripts and diffusers load from a single file; nothing but the header is read.

    Raises InputError for a file without the UNet of an SDXL.
    """
    return judge([*_tensors(source), *_whole(source)], CHECKPOINT_RULES)


def _tensors(source: WeightSource) -> Iterator[Item]:
    """One item for each tensor there is, and for each that should be there."""
    missing_parts = [part for part in PARTS if not _has(source, part)]
    layout = None if {"te1", "te2"} & set(missing_parts) else layout_of(source.tensors, label=source.label)
    if "unet" in missing_parts:
        layout_of(source.tensors, label=source.label)  # says what the file is instead
        raise InputError(f"{source.label} has no UNet")
    expected = None if layout is None else _expected(layout, source)
    short = te1_root(source.tensors) == TE1_SHORT_ROOT
    for name in source.tensors:
        yield Item(name, frozenset(_traits(name, expected, short_te1=short)))
    for part in missing_parts:
        yield Item(part, frozenset({Trait.NO_VAE if part == "vae" else Trait.NO_ENCODER}), counted=False)
    for name in sorted((expected or frozenset[str]()) - source.tensors.keys()):
        yield Item(name, frozenset({Trait.MISSING}), counted=False)
    if layout is not None and not is_sdxl_size(layout):
        yield Item(source.label, frozenset({Trait.FOREIGN_SIZE}), counted=False)


def _whole(source: WeightSource) -> Iterator[Item]:
    """What is said of the file as a whole."""
    traits: set[Trait] = set()
    if source.provenance.role is Role.RESIDUAL:
        traits.add(Trait.RESIDUAL)
    prediction = declared_prediction(source)
    if prediction == "flow":
        traits.add(Trait.FLOW)
    if prediction == "v" and "v_pred" not in source.tensors:
        traits.add(Trait.V_UNMARKED)
    yield Item(source.label, frozenset(traits), counted=False)


def _has(source: WeightSource, part: PartName) -> bool:
    if part == "unet":
        return f"{UNET_ROOT}label_emb.0.0.weight" in source.tensors  # what no other model of this root has
    return any(name.startswith(PARTS[part]) for name in source.tensors)


def _expected(layout: Layout, source: WeightSource) -> frozenset[str]:
    """The tensors of all modules of this layout."""
    root = te1_root(source.tensors)
    modules = (module for part in PARTS for module in modules_of(layout, part, te1=root))
    return frozenset(view.tensor for module in modules for _, view in module.parameters)


def _traits(name: str, expected: frozenset[str] | None, *, short_te1: bool) -> set[Trait]:
    if name in MARKERS:
        return {Trait.MARKER}
    if not name.startswith(tuple(PARTS.values())):
        return {Trait.EXTRA_KEY}
    if expected is not None and name not in expected and not name.endswith(UNTRAINED):
        return {Trait.SPARE}
    return {Trait.SHORT_TE1} if short_te1 and name.startswith(TE1_SHORT_ROOT) else set()


def is_sdxl_size(layout: Layout) -> bool:
    """Whether it has the sizes by which other programs recognise SDXL; heads follow from them."""
    unet = layout.unet
    return (
        (unet.channels, unet.depths, unet.mid_depth, unet.resnets) == ((320, 640, 1280), (0, 2, 10), 10, 2)
        and (unet.context, unet.pooled + 6 * unet.time_id_channels) == (2048, 2816)
        and _size(layout.te1) == (768, 3072, 12)
        and _size(layout.te2) == (1280, 5120, 32)
        and (layout.vae is None or layout.vae.channels == (128, 256, 512, 512))
    )


def _size(text: TextLayout) -> tuple[int, int, int]:
    return text.width, text.mlp, text.layers
