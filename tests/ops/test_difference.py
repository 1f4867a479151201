"""Test the export of the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.weights_hash import weights_hash
from spectune.ops.export import export
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.layout import VAE_ROOT
from tests.loras import distance, products
from tests.sample_pairs import changed_copy, read_metadata, recast, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit

MIDDLE = "unet.middle_block"
EXACT = 8  # twice the rank of the tuned adapters in these tests
U32 = 2.0**-24


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


@dataclass(frozen=True)
class TunedModel:
    """The tiny checkpoint in float32 with a tuned adapter of rank 4 in some layers."""

    path: Path
    deltas: TunedAdapter

    def exact(self, name: str) -> Tensor:
        return change(self.deltas.layers[name]).flatten(1).double()


MakeTuned = Callable[[str], TunedModel]


@pytest.fixture(scope="module")
def make_tuned(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path_factory: pytest.TempPathFactory
) -> MakeTuned:
    folder, made = tmp_path_factory.mktemp("models"), dict[str, TunedModel]()

    def make(only: str) -> TunedModel:
        if only not in made:
            deltas = tuned_from(tiny_checkpoint, tiny_split(None), size=0.05, only=only)
            adapter = saved_tuned(deltas, folder / f"adapter{len(made)}.safetensors")
            path = folder / f"model{len(made)}.safetensors"
            rebuild(tiny_checkpoint, adapter, path, dtype=torch.float32)
            made[only] = TunedModel(path, deltas)
        return made[only]

    return make


@pytest.fixture(scope="module")
def weights(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint)


def weight_norm(weights: dict[str, Tensor], layer: Layer) -> float:
    return float(weights[layer.tensor][layer.row_slice].double().norm())


def test_at_twice_the_rank_the_lora_equals_the_change(
    make_tuned: MakeTuned,
    tiny_checkpoint: Path,
    tmp_path: Path,
    catalogue: Catalogue,
    weights: dict[str, Tensor],
) -> None:
    tuned = make_tuned("")
    seen: list[tuple[int, int, str]] = []
    report = export(
        tuned.path,
        tmp_path / "lora.safetensors",
        base=tiny_checkpoint,
        rank=EXACT,
        dtype=torch.float32,
        progress=lambda *step: seen.append(step),
    )
    actual = products(report.path)
    assert len(report.layers) == len(actual) == len(catalogue)
    for reported in report.layers:
        layer, exact = catalogue.by_name[reported.name], tuned.exact(reported.name)
        # W + dW is rounded once to float32, at worst all in dW; factors are rounded relative to their size
        bound = U32 * weight_norm(weights, layer) / float(exact.norm()) + 1e-6
        assert distance(actual[layer.kohya], exact) < bound, layer.name
        assert distance(1.01 * actual[layer.kohya], exact) > bound
        assert reported.norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert reported.error < bound
        assert reported.rank == min(8, layer.full_rank)
        assert reported.full_rank == layer.full_rank
    assert (report.left_out, report.outside, report.outside_share) == ((), {}, 0.0)
    assert (seen[0][0], seen[-1]) == (0, (seen[0][1], seen[0][1], ""))


def test_layers_that_did_not_change_are_left_out(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    tuned = make_tuned(MIDDLE)
    report = export(tuned.path, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert {layer.name for layer in report.layers} == set(tuned.deltas.layers)
    assert set(report.unchanged) == set(catalogue.by_name) - set(tuned.deltas.layers)
    assert report.lost == ()
    assert set(products(report.path)) == {catalogue.by_name[name].kohya for name in tuned.deltas.layers}
    # only the rounding of float16 factors
    assert 1e-5 < report.error < 1e-3
    (part,) = report.parts
    assert (part.part, part.layers, part.truncated) == ("unet", len(tuned.deltas.layers), len(report.layers))


def test_the_file_records_its_origin(make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tuned = make_tuned(MIDDLE)
    report = export(tuned.path, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=EXACT)
    declared = Provenance.from_metadata(read_metadata(report.path))
    with open_checkpoint(tiny_checkpoint) as source:
        assert declared.base_hash == weights_hash(source)
    assert (declared.role, declared.base_name, declared.principal_hash) == (
        Role.LORA,
        "tiny.safetensors",
        None,
    )
    assert (declared.prediction, declared.flow_shift) == ("flow", 2.5)
    # the tuned model predicts flow, the tiny one eps
    assert report.warnings == (
        f"{tuned.path.name} predicts flow, tiny.safetensors predicts eps: with the LoRA, set the sampler "
        "to flow",
    )


def test_original_and_lora_give_the_tuned_model(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    tuned = make_tuned(MIDDLE)
    lora = export(
        tuned.path, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=EXACT, dtype=torch.float32
    )
    again = tmp_path / "again.safetensors"
    report = rebuild(tiny_checkpoint, lora.path, again, dtype=torch.float32)
    assert report.changed_tensors == len({catalogue.by_name[name].tensor for name in tuned.deltas.layers})
    actual, expected = load_file(again), load_file(tuned.path)
    assert max(distance(actual[n], t) for n, t in expected.items() if t.is_floating_point()) < 1e-6


def test_truncation_drops_the_smallest_directions(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = make_tuned(MIDDLE)
    report = export(
        tuned.path, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=3, conv_rank=2, dtype=torch.float32
    )
    for layer in report.layers:
        values = torch.linalg.svdvals(tuned.exact(layer.name))
        best = float((values[layer.rank :].square().sum() / values.square().sum()).sqrt())
        assert layer.error == pytest.approx(best, rel=1e-3)
    assert {layer.rank for layer in report.layers} == {2, 3}


def test_energy_applies_to_the_change_of_each_layer(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = make_tuned(MIDDLE)
    report = export(
        tuned.path, tmp_path / "x.safetensors", base=tiny_checkpoint, energy=0.9, dtype=torch.float32
    )
    assert len(report.layers) == len(tuned.deltas.layers)
    for layer in report.layers:
        held = torch.linalg.svdvals(tuned.exact(layer.name)).square().cumsum(0)
        held = held / held[-1]
        assert held[layer.rank - 1] >= 0.9 - 1e-6
        assert layer.rank == 1 or held[layer.rank - 2] < 0.9 + 1e-6
        assert layer.error**2 == pytest.approx(1 - float(held[layer.rank - 1]), abs=1e-5)


def test_size_is_respected_and_lost_layers_are_counted(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = make_tuned("unet")
    size = 60_000
    report = export(
        tuned.path, tmp_path / "x.safetensors", base=tiny_checkpoint, size=size, dtype=torch.float32
    )
    assert report.path.stat().st_size <= size
    assert len(report.lost) > 5
    assert {layer.name for layer in report.layers} | set(report.lost) == set(tuned.deltas.layers)
    total = sum(float(tuned.exact(name).square().sum()) for name in tuned.deltas.layers)
    lost = sum((layer.error * layer.norm) ** 2 for layer in report.layers)
    lost += sum(float(tuned.exact(name).square().sum()) for name in report.lost)
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_changed_biases_and_norms_are_reported_with_their_share(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    tuned = make_tuned(MIDDLE)
    bias, norm = "model.diffusion_model.middle_block.1.proj_in.bias", "model.diffusion_model.out.0.weight"
    token = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    added = {bias: 0.5, norm: 0.25, token: 2.0**-6}
    changes = {name: weights[name].float() + number for name, number in added.items()}
    model = changed_copy(tuned.path, tmp_path / "model.safetensors", changes)
    report = export(model, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert report.outside is not None
    assert set(report.outside) == set(added)
    for name, number in added.items():
        assert report.outside[name] == pytest.approx(number * weights[name].numel() ** 0.5, rel=1e-5)
    missed = sum(number**2 * weights[name].numel() for name, number in added.items())
    held = sum(float(tuned.exact(name).square().sum()) for name in tuned.deltas.layers)
    assert report.outside_share == pytest.approx(missed / (missed + held), rel=1e-5)
    assert report.error < 1e-3  # error of the layers of the LoRA only


def test_excluded_layers_do_not_count_as_lost(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    tuned = make_tuned("")
    report = export(tuned.path, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=EXACT, layers=["te1"])
    assert {layer.part for layer in report.layers} == {"te1"}
    assert (len(report.layers), report.left_out, report.outside) == (12, (), {})
    end = "model.diffusion_model.out.2.weight"
    changes = {end: weights[end].float() + 0.1}
    model = changed_copy(tuned.path, tmp_path / "model.safetensors", changes)
    default = export(model, tmp_path / "y.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert set(default.outside or {}) == {end}
    complete = export(model, tmp_path / "z.safetensors", base=tiny_checkpoint, rank=EXACT, layers=["all"])
    assert complete.outside == {}
    assert "lora_unet_out_2" in products(complete.path)


def test_16_bit_models_are_subtracted_in_float32(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = make_tuned(MIDDLE)
    half = recast(tuned.path, tmp_path / "half.safetensors", torch.float16)
    report = export(half, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=400, dtype=torch.float32)
    after, before = load_file(half), load_file(tiny_checkpoint)
    with open_checkpoint(tiny_checkpoint) as source:
        layers = build_catalogue(source).by_name
    actual = products(report.path)
    for reported in report.layers:
        layer = layers[reported.name]
        exact = after[layer.tensor].double() - before[layer.tensor].double()
        assert distance(actual[layer.kohya], exact.flatten(1)) < 2e-6


def test_different_autoencoders_give_a_warning(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    tuned = make_tuned(MIDDLE)
    names = [name for name in weights if name.startswith("first_stage_model.decoder.conv_")][:3]
    changes = {name: weights[name] + 1 for name in names}
    model = changed_copy(tuned.path, tmp_path / "model.safetensors", changes)
    report = export(model, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert report.warnings[0] == (
        "3 tensors of the VAEs differ, and a LoRA does not hold them: use the VAE of "
        "model.safetensors together with the LoRA"
    )
    assert report.outside == {}


def test_a_vae_in_only_one_of_the_files(make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tuned = make_tuned(MIDDLE)
    without = {
        path: without_parts(path, tmp_path / f"no-vae-{path.name}", VAE_ROOT)
        for path in (tuned.path, tiny_checkpoint)
    }
    advised = export(tuned.path, tmp_path / "x.safetensors", base=without[tiny_checkpoint], rank=EXACT)
    name = tuned.path.name
    assert advised.warnings[0] == (
        f"{name} has a VAE, no-vae-tiny.safetensors has none, and a LoRA does not hold it: "
        f"use the VAE of {name} together with the LoRA"
    )
    silent = export(without[tuned.path], tmp_path / "y.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert [warning for warning in silent.warnings if "VAE" in warning] == []


def test_encoders_that_one_file_lacks_are_not_compared(
    make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = make_tuned(MIDDLE)
    unet = without_parts(tuned.path, tmp_path / "unet.safetensors", "conditioner.", VAE_ROOT)
    report = export(unet, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert report.warnings[:2] == tuple(
        f"{part} was not compared: unet.safetensors has none" for part in ("te1", "te2")
    )
    complete = export(tuned.path, tmp_path / "y.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert [layer.name for layer in report.layers] == [layer.name for layer in complete.layers]
    assert {*products(report.path)} == {*products(complete.path)}


def without_parts(model: Path, target: Path, *roots: str) -> Path:
    """Write a copy of a model without the tensors whose names begin with `roots`."""
    kept = {name: tensor for name, tensor in load_file(model).items() if not name.startswith(roots)}
    save_file(kept, target, metadata=read_metadata(model))
    return target


def test_equal_models_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_checkpoint.read_bytes())
    with pytest.raises(InputError) as caught:
        export(copy, out, base=tiny_checkpoint)
    assert caught.value.what == "no layer of copy.safetensors differs from tiny.safetensors"
    assert caught.value.hint == "pass the tuned model as `tuned` and the model it was made from as `base`"
    bias = "model.diffusion_model.out.2.bias"
    model = changed_copy(copy, tmp_path / "bias.safetensors", {bias: load_file(copy)[bias] + 1})
    with pytest.raises(InputError, match=r"no layer of bias\.safetensors differs"):
        export(model, out, base=tiny_checkpoint)
    assert not out.exists()


def test_models_with_other_tensors_are_refused(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    out, metadata = tmp_path / "x.safetensors", read_metadata(tiny_checkpoint)
    norm = "model.diffusion_model.middle_block.1.norm.weight"
    fewer = tmp_path / "fewer.safetensors"
    save_file({name: t for name, t in weights.items() if name != norm}, fewer, metadata=metadata)
    for one, other, message in (
        (fewer, tiny_checkpoint, f"1 tensors of tiny.safetensors are not in fewer.safetensors: {norm}"),
        (tiny_checkpoint, fewer, f"1 tensors of tiny.safetensors are not in fewer.safetensors: {norm}"),
    ):
        with pytest.raises(InputError) as caught:
            export(one, out, base=other)
        assert caught.value.what == message
        assert caught.value.hint == "pass two checkpoints of the same architecture"
    wider = changed_copy(tiny_checkpoint, tmp_path / "wider.safetensors", {norm: torch.ones(33)})
    with pytest.raises(InputError) as caught:
        export(wider, out, base=tiny_checkpoint)
    assert caught.value.what == (
        f"1 tensors of wider.safetensors have another shape than in tiny.safetensors: {norm} is (33,), "
        "expected (32,)"
    )
    residual = tiny_split(None).residual
    assert residual is not None
    for one, other in ((residual, tiny_checkpoint), (tiny_checkpoint, residual)):
        with pytest.raises(InputError, match=r"tiny\.residual\.safetensors is a residual"):
            export(one, out, base=other)
    with pytest.raises(InputError, match="is one of the input files"):
        export(wider, wider, base=tiny_checkpoint, force=True)


def test_non_finite_weights_are_refused(make_tuned: MakeTuned, tiny_checkpoint: Path, tmp_path: Path) -> None:
    tuned = make_tuned(MIDDLE)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    broken = load_file(tuned.path)[name].clone()
    broken[0, 0] = float("nan")
    model = changed_copy(tuned.path, tmp_path / "model.safetensors", {name: broken})
    with pytest.raises(InputError, match=r"unet\.middle_block\.1\.proj_in: 1 of 1024 values are NaN"):
        export(model, tmp_path / "x.safetensors", base=tiny_checkpoint, rank=EXACT)
    assert not (tmp_path / "x.safetensors").exists()


def test_8_bit_checkpoints_are_subtracted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # 2 * W is exact in fp8, so the difference is exactly W
    base = recast(tiny_checkpoint, tmp_path / "base.safetensors", torch.float8_e4m3fn)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    doubled = {name: (load_file(base)[name].float() * 2).to(torch.float8_e4m3fn)}
    tuned = changed_copy(base, tmp_path / "tuned.safetensors", doubled)
    report = export(tuned, tmp_path / "lora.safetensors", base=base, rank=32)
    assert [layer.name for layer in report.layers] == ["unet.middle_block.1.proj_in"]
    assert report.error < 1e-3


def test_an_existing_output_is_refused_before_reading(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    out.write_bytes(b"mine")
    missing = tmp_path / "not_even_read.safetensors"
    with pytest.raises(InputError, match="exists"):
        export(missing, out, base=tiny_checkpoint)
    assert out.read_bytes() == b"mine"
