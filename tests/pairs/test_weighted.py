"""Test weighted sums of checkpoints: values, copies, weights by part, and what cannot be summed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.pairs.strength import ModelWeights, parse_weights
from spectune.pairs.weighted import WeightedSum, weighted_sum

PROJ = "model.diffusion_model.input_blocks.3.1.proj_in.weight"
NORM = "model.diffusion_model.input_blocks.3.1.norm.weight"
MID = "model.diffusion_model.middle_block.1.proj_in.weight"
FUSED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
TE1 = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
VAE = "first_stage_model.decoder.conv_in.weight"


def changed(source: MemorySource, label: str, seed: int, **tensors: Tensor | None) -> MemorySource:
    """Return another model of the same size, without the tensors that are None."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: (t.float() + 0.1 * torch.randn(t.shape, generator=generator)).half()
        if t.is_floating_point()
        else t
        for name, t in source.values.items()
    }
    kept = {name: t for name, t in (values | tensors).items() if t is not None}
    return MemorySource(kept, source.metadata, label)


@pytest.fixture(scope="module")
def models(source: MemorySource) -> tuple[MemorySource, MemorySource, MemorySource]:
    return source, changed(source, "b", 1), changed(source, "c", 2)


def summed(
    models: tuple[MemorySource, ...], *words: str | None, dtype: torch.dtype | None = None
) -> WeightedSum:
    summands = [(i, None if word is None else parse_weights(word)) for i, word in enumerate(words)]
    return weighted_sum(models[: len(words)], summands, dtype=dtype)


def exact(models: tuple[MemorySource, ...], name: str, *weights: float) -> Tensor:
    return sum((w * m.values[name].double() for w, m in zip(weights, models, strict=False)), torch.zeros(()))


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (("0.3", "0.7"), (0.3, 0.7)),
        ((None, "0.3"), (0.7, 0.3)),
        ((None, "1", "-1"), (1, 1, -1)),
        (("1", "-1"), (1, -1)),
        (("0.5", "0.25", "0.5"), (0.5, 0.25, 0.5)),
    ],
)
def test_a_sum_is_rounded_once(
    models: tuple[MemorySource, ...], words: tuple[str | None, ...], weights: tuple[float, ...]
) -> None:
    model = summed(models, *words)
    for name in (PROJ, NORM, FUSED, TE1, VAE):
        expected = exact(models, name, *weights)
        half_step = expected.abs() * 2**-11 + 2**-25  # half the distance of two float16 values
        error = (model.load(name).double() - expected).abs() / half_step
        assert float(error.max()) <= 1.001
        wrong = exact(models, name, *(weights[0] * 1.01, *weights[1:]))
        assert float(((wrong - expected).abs() / half_step).max()) > 2


@pytest.mark.parametrize("weight", [0.1, 0.333, -1.7])
def test_equal_values_keep_their_bits_at_all_weights(source: MemorySource, weight: float) -> None:
    values = {**source.values, NORM: -torch.zeros_like(source.values[NORM])}
    same = (MemorySource(values, {}, "a"), MemorySource(dict(values), {}, "same"))
    model = summed(same, None, str(weight))
    for name in (PROJ, NORM, TE1):
        assert torch.equal(model.load(name).view(torch.int16), values[name].view(torch.int16))


def test_the_difference_of_equal_models_changes_nothing(models: tuple[MemorySource, ...]) -> None:
    a, b, _ = models
    model = weighted_sum(
        [a, b, changed(a, "b again", 1)], [(0, None), (1, ModelWeights(0.3)), (2, ModelWeights(-0.3))]
    )
    assert all(torch.equal(model.load(name), a.values[name]) for name in (PROJ, NORM, TE1, VAE))


def test_weights_apply_to_parts_blocks_and_patterns(models: tuple[MemorySource, ...]) -> None:
    a, b, _ = models
    model = summed(models, None, "te=0,te2=1,unet=0.25,unet.*proj_in=0.75,mid=1,vae=0")
    assert torch.equal(model.load(FUSED), b.values[FUSED])
    assert torch.equal(model.load(MID), b.values[MID])
    for name in (TE1, VAE):
        assert model.load(name) is a.values[name]
    for name, weight in ((NORM, 0.25), (PROJ, 0.75)):
        assert torch.equal(model.load(name), exact(models, name, 1 - weight, weight).half())
    assert model.warnings == ()
    other = summed(models, None, "0.5,unet.down.1=0.25")
    assert torch.equal(other.load(NORM), exact(models, NORM, 0.75, 0.25).half())
    assert torch.equal(other.load(VAE), exact(models, VAE, 0.5, 0.5).half())


def test_dtype_applies_to_everything_but_the_vae(models: tuple[MemorySource, ...]) -> None:
    model = summed(models, None, "unet=0.5", dtype=torch.bfloat16)
    assert torch.equal(model.load(PROJ), exact(models, PROJ, 0.5, 0.5).float().bfloat16())
    assert torch.equal(model.load(TE1), models[0].values[TE1].bfloat16())
    assert model.load(VAE).dtype == torch.float16


def test_a_missing_part_is_copied_with_a_warning(source: MemorySource) -> None:
    without = MemorySource(
        {n: t for n, t in changed(source, "", 1).values.items() if not n.startswith("first_stage_model")},
        {},
        "no_vae",
    )
    for pair in ((source, without), (without, source)):
        model = summed(pair, "0.5", "0.5")
        assert model.load(VAE) is source.values[VAE]
        assert model.warnings == (f"no_vae has no vae: it is copied from {source.label}",)
    assert summed((source, without), None, "0.5,vae=0").warnings == ()


def test_tensors_that_cannot_be_summed_are_named_in_one_error(source: MemorySource) -> None:
    wrong = {
        PROJ: torch.ones(2, 3),
        MID: torch.ones(2, 3),
        NORM: None,
        FUSED: source.values[FUSED].to(torch.int8),
    }
    with pytest.raises(InputError) as caught:
        summed((source, changed(source, "b", 1, **wrong)), None, "0.5")
    what = caught.value.what
    assert f"b has other shapes than {source.label}: 2 tensors, {PROJ} (2, 3), not " in what
    assert f"b lacks: 1 tensor, {NORM}" in what
    assert f"b has no float weights up to 32 bits in: 1 tensor, {FUSED}" in what
    # parts without weight are not compared
    assert (
        summed((source, changed(source, "b", 1, **{VAE: torch.ones(2, 3, 3, 3)})), None, "0.5,vae=0").summed
        > 100
    )


def test_other_settings_and_sums_are_warnings(models: tuple[MemorySource, ...]) -> None:
    a, b, _ = models
    of_v = MemorySource({**b.values, "v_pred": torch.empty(0)}, {"spectune.vae_scale": "0.2"}, "v")
    model = summed((a, of_v), "0.5", "0.4")
    assert model.warnings == (
        "the weights do not sum to 1: "
        + ", ".join(f"0.9 for {n} tensors of {p}" for p, n in counts(a).items()),
        f"the checkpoints have different prediction types: eps ({a.label}), v (v); the result declares the "
        "first one: check samples",
        f"the checkpoints have different latents: scale 0.13025, shift 0, padding zeros ({a.label}), scale "
        "0.2, shift 0, padding zeros (v); the result declares the first one: check samples",
        "left out, because they belong to no module of SDXL: 1 tensor of v, v_pred",
    )
    assert model.provenance.prediction is None
    assert summed((of_v, a), "0.5", "0.5").provenance.prediction == "v"
    assert summed((a, b), "1", "-1").warnings == ()
    assert summed((a, b), "1", "-1").provenance.role is None


def counts(source: MemorySource) -> Mapping[str, int]:
    roots = {
        "unet": "model.",
        "te1": "conditioner.embedders.0.",
        "te2": "conditioner.embedders.1.",
        "vae": "first_stage_model.",
    }
    merged = [name for name in source.values if not name.endswith(("position_ids", "logit_scale"))]
    return {part: sum(name.startswith(root) for name in merged) for part, root in roots.items()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((None, "dwn.1=1"), "no tensor matches `dwn.1` in the weights; did you mean `down.1`?"),
        (("unet=1", "unet=0,te=1"), "no checkpoint has a weight for vae: "),
        ((None, "te2.*q_proj=1"), f"{FUSED} contains 3 layers with different weights"),
    ],
)
def test_weights_that_fit_no_tensor_are_refused(
    models: tuple[MemorySource, ...], words: tuple[str | None, ...], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        summed(models, *words)
    assert caught.value.what.startswith(message)


def test_bad_values_name_their_tensor(source: MemorySource) -> None:
    broken = source.values[PROJ].clone()
    broken.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    model = summed((source, changed(source, "b", 1, **{PROJ: broken})), None, "0.5")
    with pytest.raises(InputError, match=f"{PROJ} of b: 2 of .* values are NaN or infinite"):
        model.load(PROJ)
    with pytest.raises(InputError, match=f"{NORM} of the sum: .* exceed the range of float16"):
        summed((source, source), "1e5", "1e5").load(NORM)
