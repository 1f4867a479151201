"""Test rebuild: strengths by part, dtypes, metadata, and pairs in which one file has no metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.loras import distance, products, same_bits, same_tensors, saved_lora
from tests.sample_pairs import changed_copy, read_metadata, recast, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit

UNET, TE1, TE2, VAE = (
    "model.diffusion_model.",
    "conditioner.embedders.0.",
    "conditioner.embedders.1.",
    "first_stage_model.",
)


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


@pytest.fixture(scope="module")
def deltas(tiny_checkpoint: Path, tiny_split: TinySplit) -> TunedAdapter:
    """Return a tuned adapter with layers in every part."""
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.05)
    some = {
        name: delta
        for name, delta in tuned.layers.items()
        if name.startswith(("unet.middle", "te1.", "te2."))
    }
    return TunedAdapter(some, tuned.metadata, "tuned.safetensors")


@pytest.fixture(scope="module")
def tuned(deltas: TunedAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tuned(deltas, tmp_path_factory.mktemp("adapters") / "tuned.safetensors")


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> dict[str, Tensor]:
    return load_file(tiny_checkpoint)


def bare(path: Path, out: Path, *keep: str) -> Path:
    """Return a copy without metadata except `keep`, as other programs write it."""
    metadata = {key: text for key, text in read_metadata(path).items() if key in keep}
    save_file(load_file(path), out, metadata=metadata)
    return out


def bare_model(path: Path, out: Path) -> Path:
    return bare(
        path, out, "spectune.layout"
    )  # required to find the number of attention heads of the tiny model


@pytest.mark.parametrize(
    ("strength", "by_part"),
    [
        ({"te": 0.0}, {UNET: 1.0, TE1: 0.0, TE2: 0.0}),
        ({"unet": 0.5, "te1": -1.0, "te2": 2.0}, {UNET: 0.5, TE1: -1.0, TE2: 2.0}),
        ("unet=0,te2=0.25", {UNET: 0.0, TE1: 1.0, TE2: 0.25}),
        (0.7, {UNET: 0.7, TE1: 0.7, TE2: 0.7}),
    ],
)
def test_each_part_has_its_strength(
    strength: float | dict[str, float] | str,
    by_part: dict[str, float],
    tuned: Path,
    deltas: TunedAdapter,
    tiny_checkpoint: Path,
    tmp_path: Path,
    catalogue: Catalogue,
    base: dict[str, Tensor],
) -> None:
    out = tmp_path / "x.safetensors"
    report = rebuild(tiny_checkpoint, tuned, out, strength=strength, dtype=torch.float32)
    actual = load_file(out)
    for name, delta in deltas.layers.items():
        layer = catalogue.by_name[name]
        factor = next(number for root, number in by_part.items() if layer.tensor.startswith(root))
        before = base[layer.tensor][layer.row_slice].double()
        exact = before + factor * change(delta).double()
        after = actual[layer.tensor][layer.row_slice].double()
        assert distance(after, exact) < 2e-7
        if factor:
            assert distance(after, before + 1.01 * factor * change(delta).double()) > 1e-5
    for name, tensor in base.items():
        if not by_part.get(next((root for root in by_part if name.startswith(root)), ""), 0.0):
            assert same_bits(actual[name], tensor), name
    roots = tuple(root for root, factor in by_part.items() if factor)
    changed = {catalogue.by_name[name].tensor for name in deltas.layers}
    assert report.changed_tensors == sum(name.startswith(roots) for name in changed)


def test_zero_strength_gives_the_base(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = rebuild(tiny_checkpoint, tuned, tmp_path / "x.safetensors", strength=0.0)
    assert (report.identical, report.changed_tensors) == (True, 0)
    assert same_tensors(load_file(report.path), load_file(tiny_checkpoint))


def test_unknown_parts_are_refused(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown part 'unett'; did you mean `unet`"):
        rebuild(tiny_checkpoint, tuned, tmp_path / "x.safetensors", strength={"unett": 1})
    assert list(tmp_path.iterdir()) == []


UNIT_ROUNDOFFS = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
}


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFFS)
def test_changed_tensors_have_the_requested_dtype_and_one_rounding(
    dtype: torch.dtype,
    tuned: Path,
    deltas: TunedAdapter,
    tiny_checkpoint: Path,
    tmp_path: Path,
    catalogue: Catalogue,
    base: dict[str, Tensor],
) -> None:
    out = tmp_path / "x.safetensors"
    rebuild(tiny_checkpoint, tuned, out, dtype=dtype)
    actual = load_file(out)
    changed = {catalogue.by_name[name].tensor for name in deltas.layers}
    for name, tensor in base.items():
        assert actual[name].dtype == (dtype if name in changed else tensor.dtype)
        assert name in changed or same_bits(actual[name], tensor)
    for name, delta in deltas.layers.items():
        layer = catalogue.by_name[name]
        exact = base[layer.tensor][layer.row_slice].double() + change(delta).double()
        error = (actual[layer.tensor][layer.row_slice].double() - exact).abs()
        smallest = (
            2.0**-24 if dtype == torch.float16 else 2.0**-9 if dtype == torch.float8_e4m3fn else 2.0**-16
        )
        largest = max(UNIT_ROUNDOFFS[dtype], 2.0**-22)  # W + dW is itself a sum in float32
        assert bool((error <= 1.001 * largest * exact.abs() + smallest / 2 + 1e-7).all()), name


def test_cast_all_casts_everything_except_the_autoencoder(
    tuned: Path, tiny_checkpoint: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    out = tmp_path / "x.safetensors"
    report = rebuild(tiny_checkpoint, tuned, out, dtype=torch.bfloat16, cast_all=True)
    actual = load_file(out)
    assert actual.keys() == base.keys()
    for name, tensor in base.items():
        if name.startswith(VAE) or not tensor.is_floating_point():
            assert same_bits(actual[name], tensor), name
        else:
            assert actual[name].dtype == torch.bfloat16, name
    norm = "model.diffusion_model.out.0.weight"
    assert torch.equal(actual[norm], base[norm].bfloat16())
    floats = [n for n, t in base.items() if t.is_floating_point() and not n.startswith(VAE)]
    assert report.changed_tensors == len(floats)


def test_cast_all_without_a_dtype_is_refused(tuned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`cast_all` requires `dtype`"):
        rebuild(tiny_checkpoint, tuned, tmp_path / "x.safetensors", cast_all=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "fits", "does_not"),
    [
        (
            torch.float8_e4m3fn,
            464.0,
            465.0,
        ),  # the largest values are 448 and 57344; numbers that round to them fit
        (torch.float8_e4m3fn, 464.0, 9e9),
        (torch.float8_e5m2, 61439.0, 61440.0),
    ],
)
def test_overflow_of_8_bit_dtypes_is_refused_and_not_clamped(
    dtype: torch.dtype, fits: float, does_not: float, tuned: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    norm, adapter = "model.diffusion_model.out.0.weight", bare(tuned, tmp_path / "bare.safetensors")
    out = tmp_path / "x.safetensors"
    for number in (fits, does_not):
        changes = {norm: torch.full((16,), number)}
        model = changed_copy(tiny_checkpoint, tmp_path / f"{number:g}.safetensors", changes)
        if number == fits:
            rebuild(model, adapter, out, dtype=dtype, cast_all=True)
            assert set(load_file(out)[norm].float().tolist()) == {torch.finfo(dtype).max}
            out.unlink()
        else:
            with pytest.raises(InputError) as caught:
                rebuild(model, adapter, out, dtype=dtype, cast_all=True)
            kind = str(dtype).removeprefix("torch.")
            message = f": 16 of 16 values, up to {number:.3g}, exceed the range of {kind}"
            assert caught.value.what.startswith(norm)
            assert caught.value.what.endswith(message)
    assert not out.exists()


def test_the_file_records_its_origin_and_adapters(
    tuned: Path, tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    added = {"modelspec.author": "me", "modelspec.resolution": "512x512", "modelspec.hash_sha256": "00"}
    base = tmp_path / "base.safetensors"
    save_file(load_file(tiny_checkpoint), base, metadata=read_metadata(tiny_checkpoint) | added)
    report = rebuild(base, tuned, tmp_path / "style-xl.safetensors", strength={"te": 0.5})
    actual = read_metadata(report.path)
    assert {key: text for key, text in actual.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "512x512",
        "modelspec.title": "style-xl",
        "modelspec.author": "me",
    }
    assert json.loads(actual["spectune.adapters"]) == [
        {"file": "tuned.safetensors", "role": "tuned", "strength": "unet=1,te1=0.5,te2=0.5"}
    ]
    origin = Provenance.from_metadata(actual)
    assert (origin.role, origin.prediction, origin.flow_shift) == (Role.MODEL, "flow", 2.5)
    assert (origin.base_hash, origin.base_name) == (tiny_split(None).base_hash, "base.safetensors")


def test_the_report_counts_the_layers_of_each_part(
    tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    layers = [layer for layer in catalogue if layer.block in ("mid", "te2.1")]
    lora = saved_lora(tmp_path / "lora.safetensors", layers)
    report = rebuild(tiny_checkpoint, lora, tmp_path / "x.safetensors")
    counts = {part: sum(layer.part.value == part for layer in catalogue) for part in ("unet", "te1", "te2")}
    assert report.layers == {
        "unet": (len(layers) - 6, counts["unet"]),
        "te1": (0, counts["te1"]),
        "te2": (6, counts["te2"]),
    }
    assert report.warnings == ()


Files = Callable[[Path], tuple[Path, Path]]


def trained_elsewhere(path: Path, out: Path, *, size: float = 0.02) -> Path:
    """Return a principal as another program saves it after training: no metadata, slightly other factors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        key: t if key.endswith("alpha") else t * (1 + size * torch.randn(t.shape, generator=generator)).half()
        for key, t in load_file(path).items()
    }
    save_file(tensors, out)
    return out


def test_a_principal_trained_by_another_program_works_with_its_residual(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, catalogue: Catalogue
) -> None:
    report = tiny_split(torch.float32)
    assert report.residual is not None
    trained = trained_elsewhere(report.principal, tmp_path / "trained.safetensors")
    out = tmp_path / "x.safetensors"
    rebuilt = rebuild(report.residual, trained, out, dtype=torch.float32)
    assert rebuilt.warnings == (
        "trained.safetensors does not declare which principal it was trained from, but its values resemble a "
        "principal: assuming that it was trained from the principal of tiny.residual.safetensors",
    )
    residual, added, actual = load_file(report.residual), products(trained), load_file(out)
    original = load_file(tiny_checkpoint)
    for layer in catalogue:
        exact = residual[layer.tensor][layer.row_slice].double().flatten(1) + added[layer.kohya]
        assert distance(actual[layer.tensor][layer.row_slice].flatten(1), exact) < 1e-7
        before = original[layer.tensor][layer.row_slice].double().flatten(1)
        assert distance(exact, before) > 1e-3  # the trained change is included
    assert not rebuilt.identical


def test_an_untrained_principal_without_metadata_restores_the_model(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(torch.float32)
    assert report.residual is not None
    principal = bare(report.principal, tmp_path / "p.safetensors")
    rebuilt = rebuild(report.residual, principal, tmp_path / "x.safetensors")
    assert rebuilt.hash == report.base_hash
    assert same_tensors(load_file(rebuilt.path), load_file(tiny_checkpoint))


def test_a_lora_without_metadata_is_refused_for_a_residual(
    tiny_split: TinySplit, tmp_path: Path, catalogue: Catalogue
) -> None:
    residual = tiny_split(torch.float32).residual
    assert residual is not None
    lora = saved_lora(tmp_path / "lora.safetensors", catalogue, size=0.05)
    with pytest.raises(PairingError) as caught:
        rebuild(residual, lora, tmp_path / "x.safetensors")
    assert caught.value.what == (
        "lora.safetensors requires a complete model: tiny.residual.safetensors is a residual, which lacks "
        "its principal"
    )
    assert caught.value.hint == "pass the original model as `base`"
    assert not (tmp_path / "x.safetensors").exists()


def test_a_principal_works_with_a_residual_without_metadata(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    report = tiny_split(None)
    assert report.residual is not None
    residual = bare_model(report.residual, tmp_path / "foreign.safetensors")
    rebuilt = rebuild(residual, report.principal, tmp_path / "x.safetensors")
    assert rebuilt.warnings == (
        f"foreign.safetensors does not declare that it is a residual, but it lacks the values of "
        f"{report.principal.name}: assuming that the two are a pair",
    )
    actual = load_file(rebuilt.path)
    for name, tensor in base.items():
        # the residual and the sum are each rounded once to fp16
        torch.testing.assert_close(actual[name], tensor, rtol=2.0**-10, atol=2.0**-12)


def test_a_foreign_principal_is_not_counted_twice(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    principal = tiny_split(None).principal
    model = bare_model(tiny_checkpoint, tmp_path / "model.safetensors")
    for name, adapter in (
        ("stripped", bare(principal, tmp_path / "stripped.safetensors")),
        ("trained", trained_elsewhere(principal, tmp_path / "trained.safetensors")),
    ):
        with pytest.raises(PairingError) as caught:
            rebuild(model, adapter, tmp_path / "x.safetensors")
        assert caught.value.what == (
            f"{name}.safetensors has the values of a principal adapter: model.safetensors is not a residual "
            "of spectune, so the principal part would count twice"
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_a_principal_can_be_subtracted_from_its_model(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, catalogue: Catalogue
) -> None:
    report = tiny_split(None)
    principal = bare(report.principal, tmp_path / "p.safetensors")
    rebuilt = rebuild(tiny_checkpoint, principal, tmp_path / "x.safetensors", strength=-1.0)
    assert report.residual is not None
    left, residual = load_file(rebuilt.path), load_file(report.residual)
    for layer in catalogue:
        one, other = left[layer.tensor], residual[layer.tensor]
        # equal except that the order of a float32 sum may change a rounding to fp16
        torch.testing.assert_close(one, other, rtol=2.0**-10, atol=2.0**-23)
        assert float((one == other).float().mean()) > 0.98


def test_a_lora_of_another_base_gives_a_warning(
    tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue, base: dict[str, Tensor]
) -> None:
    metadata = Provenance(role=Role.LORA, base_hash="ab" * 32, base_name="anime.safetensors").to_metadata()
    lora = saved_lora(tmp_path / "lora.safetensors", catalogue, metadata=metadata)
    rebuilt = rebuild(tiny_checkpoint, lora, tmp_path / "x.safetensors", dtype=torch.float32)
    assert rebuilt.base_hash is not None
    assert rebuilt.warnings == (
        f"lora.safetensors was made for base {'ab' * 8} (anime.safetensors), tiny.safetensors is "
        f"{rebuilt.base_hash[:16]}: quality may differ; check samples",
    )
    added, actual = products(lora), load_file(rebuilt.path)
    for layer in catalogue:
        exact = base[layer.tensor][layer.row_slice].double().flatten(1) + added[layer.kohya]
        assert distance(actual[layer.tensor][layer.row_slice].flatten(1), exact) < 1e-7
    metadata = Provenance(role=Role.LORA, base_hash=rebuilt.base_hash).to_metadata()
    own = saved_lora(tmp_path / "own.safetensors", catalogue, metadata=metadata)
    assert rebuild(tiny_checkpoint, own, tmp_path / "y.safetensors").warnings == ()


def test_an_8_bit_model_from_a_residual_is_as_close_as_a_direct_cast(
    tiny_checkpoint: Path,
    tiny_split: TinySplit,
    tmp_path: Path,
    catalogue: Catalogue,
    base: dict[str, Tensor],
) -> None:
    report = tiny_split(torch.float32)
    assert report.residual is not None
    eight, out = torch.float8_e4m3fn, tmp_path / "x.safetensors"
    rebuild(report.residual, report.principal, out, dtype=eight, cast_all=True)
    actual, direct = load_file(out), load_file(recast(tiny_checkpoint, tmp_path / "e.safetensors", eight))
    for layer in catalogue:
        exact = base[layer.tensor].double()
        off, least = ((file[layer.tensor].double() - exact).abs() for file in (actual, direct))
        # 16-bit numbers are often ties, which may round the other way
        assert bool((off - least <= 1e-6).all())
        assert float((actual[layer.tensor].float() == direct[layer.tensor].float()).float().mean()) > 0.95
    assert {t.dtype for n, t in actual.items() if n.startswith(VAE)} == {torch.float16}
