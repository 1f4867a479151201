"""Models rebuilt with adapters that replace some tensors of the base completely."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectune
from spectune.adapters.adapter import TunedAdapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.ops.drawing.models import open_model
from spectune.ops.drawing.specs import parse_model
from spectune.ops.rebuild import rebuild
from spectune.pairs.merged import merged, restored
from spectune.sdxl.layers import build_catalogue
from tests.loras import same_bits
from tests.sample_pairs import saved_tuned, tuned_from
from tests.split_fixtures import TinySplit

UNET = "model.diffusion_model."
BIAS, WEIGHT = f"{UNET}time_embed.0.bias", f"{UNET}time_embed.0.weight"
DELTA = "unet.middle_block.0.in_layers.2"  # a layer that is also trained
TRAINED = f"{UNET}middle_block.0.in_layers.2.weight"
TE1 = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
NAMES = (BIAS, WEIGHT, TRAINED, TE1)
HINT = "rebuild the checkpoint with `spectune rebuild`"


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Path, tiny_split: TinySplit, base: dict[str, Tensor]) -> TunedAdapter:
    """Return an adapter with one trained layer and four replaced tensors."""
    made = tuned_from(tiny_checkpoint, tiny_split(None), size=0.05, only=DELTA)
    generator = torch.Generator().manual_seed(7)
    whole = {name: torch.randn(base[name].shape, generator=generator) for name in NAMES}
    return replace(made, replaced=whole)


@pytest.fixture(scope="module")
def path(tuned: TunedAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tuned(tuned, tmp_path_factory.mktemp("replaced") / "tuned.safetensors")


def with_replaced(tuned: TunedAdapter, replaced: Mapping[str, Tensor]) -> TunedAdapter:
    return replace(tuned, replaced=dict(replaced))


def test_replaced_tensors_are_used_instead_of_those_of_the_base(
    path: Path, tuned: TunedAdapter, tiny_checkpoint: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    report = rebuild(tiny_checkpoint, path, tmp_path / "x.safetensors")
    found = load_file(report.path)
    for name in NAMES:
        exact = tuned.replaced[name] + (change(tuned.layers[DELTA]) if name == TRAINED else 0)
        assert found[name].dtype == base[name].dtype == torch.float16
        if name == TRAINED:
            torch.testing.assert_close(found[name].float(), exact, rtol=2.0**-10, atol=1e-6)
            assert not torch.equal(found[name], tuned.replaced[name].half()), "the change is missing"
        else:
            assert same_bits(found[name], exact.half())
    assert all(same_bits(found[name], base[name]) for name in base if name not in NAMES)
    assert report.changed_tensors == len(NAMES)
    assert (report.tensors, report.identical) == (len(base), False)
    assert report.warnings == (
        f"4 complete tensors of tuned.safetensors rounded from float32 to float16, the dtype of "
        f"{tiny_checkpoint.name}; `dtype` float32 keeps every bit",
    )


def test_at_strength_1_in_float32_a_replacement_is_exact(
    path: Path, tuned: TunedAdapter, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = rebuild(tiny_checkpoint, path, tmp_path / "x.safetensors", dtype=torch.float32).path
    found = load_file(out)
    for name in (BIAS, WEIGHT, TE1):
        assert same_bits(found[name], tuned.replaced[name])


def test_half_the_strength_is_the_mean(
    path: Path, tuned: TunedAdapter, tiny_checkpoint: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    rebuild(tiny_checkpoint, path, out, strength=0.5, dtype=torch.float32)
    found = load_file(out)
    for name in NAMES:
        middle = (base[name].double() + tuned.replaced[name].double()) / 2
        if name == TRAINED:
            middle = middle + change(tuned.layers[DELTA]).double() / 2
        torch.testing.assert_close(found[name].double(), middle, rtol=1e-6, atol=1e-6)
        off = base[name].double() + 0.505 * (tuned.replaced[name].double() - base[name].double())
        assert not torch.allclose(found[name].double(), off, rtol=1e-4, atol=1e-4)


def test_replacements_use_the_strength_of_their_part(
    path: Path, tuned: TunedAdapter, tiny_checkpoint: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    report = rebuild(tiny_checkpoint, path, out, strength={"unet": 0.0, "te1": 1.0})
    found = load_file(out)
    assert same_bits(found[TE1], tuned.replaced[TE1].half())
    assert all(same_bits(found[name], base[name]) for name in base if name != TE1)
    assert report.changed_tensors == 1
    report = rebuild(tiny_checkpoint, path, out, strength=0.0, force=True)
    assert (report.identical, report.changed_tensors) == (True, 0)


def test_sample_and_compare_use_the_same_model(path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    rebuilt = load_file(rebuild(tiny_checkpoint, path, tmp_path / "x.safetensors").path)
    with open_model(parse_model(f"{tiny_checkpoint}+{path}"), print) as model:
        assert all(same_bits(model.load(name), rebuilt[name]) for name in NAMES)


def test_two_adapters_cannot_replace_the_same_tensor(tuned: TunedAdapter, tiny_checkpoint: Path) -> None:
    other = replace(with_replaced(tuned, {BIAS: tuned.replaced[BIAS]}), label="other.safetensors")
    with open_checkpoint(tiny_checkpoint) as source:
        with pytest.raises(InputError) as caught:
            merged(source, [(tuned, 1.0), (other, 1.0)])
        assert caught.value.what == (
            f"tuned.safetensors and other.safetensors both replace {BIAS}: expected one adapter"
        )
        merged(source, [(tuned, 1.0), (other, 0.0)])
        apart = with_replaced(other, {f"{UNET}time_embed.2.bias": tuned.replaced[BIAS]})
        model = merged(source, [(tuned, 1.0), (apart, 1.0)])
        assert same_bits(model.load(f"{UNET}time_embed.2.bias"), tuned.replaced[BIAS].half())


def test_tensors_that_do_not_fit_the_base_are_an_error(tuned: TunedAdapter, tiny_checkpoint: Path) -> None:
    bias = tuned.replaced[BIAS]
    vae = "first_stage_model.quant_conv.bias"
    cases = (
        ({f"{UNET}nothing.bias": bias}, "1 of 1 tensors that tuned.safetensors replaces are not in tiny"),
        ({BIAS: bias[1:]}, f"expected shape ({len(bias)},), got ({len(bias) - 1},)"),
        ({vae: bias}, f"replaces {vae}, which belongs to part vae: expected tensors of unet, te1, te2"),
        (
            {BIAS: bias / 0},
            f"the replacement of {BIAS} in tuned.safetensors: {len(bias)} of {len(bias)} values",
        ),
    )
    with open_checkpoint(tiny_checkpoint) as source:
        for replaced, what in cases:
            with pytest.raises(InputError) as caught:
                merged(source, [(with_replaced(tuned, replaced), 1.0)]).load(BIAS)
            assert what in caught.value.what
            assert caught.value.hint


def test_a_residual_as_base_is_refused(
    tiny_checkpoint: Path, tiny_split: TinySplit, tuned: TunedAdapter, tmp_path: Path
) -> None:
    residual = tiny_split(None).residual
    assert residual is not None
    every = replace(tuned_from(tiny_checkpoint, tiny_split(None), size=0.05), replaced=tuned.replaced)
    whole = saved_tuned(every, tmp_path / "whole.safetensors")
    with pytest.raises(
        InputError, match=r"is a residual, and whole\.safetensors replaces 4 tensors"
    ) as caught:
        rebuild(residual, whole, tmp_path / "x.safetensors")
    assert caught.value.hint == "pass the original model as `base`"
    assert not (tmp_path / "x.safetensors").exists()
    with open_checkpoint(residual) as source, pytest.raises(InputError, match="is a residual"):
        restored(source, every)


def test_a_residual_of_another_program_as_base_is_refused(
    tiny_checkpoint: Path, tiny_split: TinySplit, tuned: TunedAdapter, tmp_path: Path
) -> None:
    made = tiny_split(torch.float32).residual
    assert made is not None
    bare = tmp_path / "bare.safetensors"
    save_file({name: t for name, t in load_file(made).items() if "spectune" not in name}, bare)
    every = replace(
        tuned_from(tiny_checkpoint, tiny_split(torch.float32), size=0.02), replaced=tuned.replaced
    )
    with open_checkpoint(bare) as source, pytest.raises(InputError, match=r"bare\.safetensors is a residual"):
        merged(source, [(every, 1.0)])


REFUSED: dict[str, Callable[[Path, Path, Path, Path], object]] = {
    "convert": lambda tuned, base, _, out: spectune.convert(tuned, out, base=base),
    "export as a tuned adapter": lambda tuned, base, _, out: spectune.export(
        tuned, out, base=base, form="tuned"
    ),
}


@pytest.mark.parametrize("command", REFUSED)
def test_commands_that_would_lose_replaced_tensors_refuse_the_file(
    command: str, path: Path, tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    residual = tiny_split(None).residual
    assert residual is not None
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=r"replaces 4 tensors of its base \(first ") as caught:
        REFUSED[command](path, tiny_checkpoint, residual, out)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(HINT)
    assert not out.exists()


def test_the_rebuilt_checkpoint_can_be_exported_as_the_hint_suggests(
    path: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = rebuild(tiny_checkpoint, path, tmp_path / "model.safetensors").path
    report = spectune.export(model, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=4)
    assert {BIAS, TE1} <= set(report.outside or ())
    with open_checkpoint(model) as source:
        assert Provenance.from_metadata(source.metadata).role is Role.MODEL
        assert build_catalogue(source, all_layers=True)
