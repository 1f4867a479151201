"""Test slice: layers of adapters and parts of checkpoints, combined into files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.spellings import Spelling
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.ops.options.values import Slice, parse_slice
from spectune.ops.rebuild import rebuild
from spectune.ops.slice import slice
from spectune.ops.split import split
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.loras import distance, products, same_bits, same_tensors, saved_lora
from tests.sample_pairs import changed_copy, read_metadata, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit

BLOCKS = ("te1.0", "te1.1", "te2.0", "te2.1", "down.0", "down.1", "down.2", "mid", "up.0", "up.1", "up.2")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all examples of a property."""
    return tmp_path_factory.mktemp("slices")


def test_blocks_lists_all_blocks(catalogue: Catalogue) -> None:
    assert {layer.block for layer in catalogue} == set(BLOCKS)


@given(
    groups=st.lists(st.integers(0, 3), min_size=len(BLOCKS), max_size=len(BLOCKS)),
    dtype=st.sampled_from(DTYPES),
    alpha=st.sampled_from([None, 1.0, 0.7]),
)
@settings(deadline=None, max_examples=6)
def test_disjoint_slices_restore_the_file_bit_for_bit(
    groups: list[int],
    dtype: torch.dtype,
    alpha: float | None,
    catalogue: Catalogue,
    folder: Path,
    tiny_checkpoint: Path,
) -> None:
    path = saved_lora(folder / "complete.safetensors", catalogue, dtype=dtype, alpha=alpha)
    words = [[block for block, at in zip(BLOCKS, groups, strict=True) if at == group] for group in range(4)]
    slices = [Slice(path, "+".join(blocks)) for blocks in words if blocks]
    report = slice(slices, folder / "again.safetensors", base=tiny_checkpoint, force=True)
    assert same_tensors(load_file(report.path), load_file(path))
    assert (report.error, report.overlaps, report.role) == (0.0, (), Role.LORA)
    assert sum(len(result.kept) for result in report.slices) == len(catalogue)


@given(
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    alphas=st.tuples(st.sampled_from([None, 0.5, 3.0]), st.sampled_from([None, 7.0])),
    weights=st.tuples(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), st.sampled_from([1.0, -0.5])),
)
@settings(deadline=None, max_examples=10)
def test_overlapping_layers_are_the_sum_of_their_products(
    ranks: tuple[int, int],
    alphas: tuple[float | None, float | None],
    weights: tuple[float, float],
    catalogue: Catalogue,
    folder: Path,
    tiny_checkpoint: Path,
) -> None:
    ends = ("layers.0.self_attn.v_proj", "layers.0.mlp.fc1", "middle_block.1.proj_in", "0.skip_connection")
    layers = [layer for layer in catalogue if layer.name.endswith((*ends, "block.0.in_layers.2"))]
    files = [
        saved_lora(folder / f"{name}.safetensors", layers, rank=rank, alpha=alpha, seed=rank + 20 * place)
        for place, (name, rank, alpha) in enumerate(zip("ab", ranks, alphas, strict=True))
    ]
    out = folder / "sum.safetensors"
    slices = [Slice(path, None, weight) for path, weight in zip(files, weights, strict=True)]
    report = slice(slices, out, base=tiny_checkpoint, force=True)
    one, other, actual = products(files[0]), products(files[1]), products(out)
    for layer in layers:
        expected = weights[0] * one[layer.kohya] + weights[1] * other[layer.kohya]
        # terms may cancel, so the float32 error is relative to their size
        terms = abs(weights[0]) * one[layer.kohya].norm() + abs(weights[1]) * other[layer.kohya].norm()
        assert float((actual[layer.kohya] - expected).norm() / terms) < 3e-7
        assert distance(1.01 * actual[layer.kohya], expected) > 1e-3  # a factor off by 1% fails
        down = load_file(out)[f"{layer.kohya}.lora_down.weight"]
        assert down.shape[0] == min(sum(ranks), *_sides(layer.shape))
    assert set(report.overlaps) == {layer.name for layer in layers}
    assert report.error < 1e-6


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], int(torch.tensor(shape[1:]).prod())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_with_weight_1_concatenates_the_factors(
    dtype: torch.dtype, catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    layers = [layer for layer in catalogue if layer.block == "mid"]
    one = saved_lora(tmp_path / "a.safetensors", layers, rank=2, dtype=dtype)
    other = saved_lora(tmp_path / "b.safetensors", layers, rank=3, dtype=dtype, seed=1)
    report = slice([Slice(one), Slice(other)], tmp_path / "c.safetensors", base=tiny_checkpoint)
    left, right, actual = load_file(one), load_file(other), load_file(report.path)
    for layer in layers:
        for side, dim in (("down", 0), ("up", 1)):
            key = f"{layer.kohya}.lora_{side}.weight"
            assert same_bits(actual[key], torch.cat([left[key], right[key]], dim=dim))
        assert actual[f"{layer.kohya}.alpha"].item() == 5
    assert report.error == 0


def test_a_sum_keeps_the_wider_dtype(catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Test a file with one factor in float32 and one in float16, as some programs write it."""
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    path = saved_lora(tmp_path / "a.safetensors", [layer])
    mixed = load_file(path)
    up = f"{layer.kohya}.lora_up.weight"
    save_file(mixed | {up: mixed[up].half()}, path)
    report = slice([Slice(path), Slice(path)], tmp_path / "b.safetensors", base=tiny_checkpoint)
    down = load_file(report.path)[f"{layer.kohya}.lora_down.weight"]
    assert same_bits(down[:3], mixed[f"{layer.kohya}.lora_down.weight"])


def test_overlaps_are_refused_without_overlap(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue)
    slices = [Slice(path, "te1"), Slice(path, "te1.0+mid")]
    with pytest.raises(InputError) as caught:
        slice(slices, tmp_path / "b.safetensors", base=tiny_checkpoint, overlap=False)
    assert caught.value.what == (
        "6 layers are in more than one slice: te1.text_model.encoder.layers.0.self_attn.q_proj, "
        "te1.text_model.encoder.layers.0.self_attn.k_proj, "
        "te1.text_model.encoder.layers.0.self_attn.v_proj (3 more)"
    )
    assert caught.value.hint == "turn `overlap` on to sum them, or choose traits that do not overlap"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    apart = [Slice(path, "te1.1"), Slice(path, "te1.0")]
    made = slice(apart, tmp_path / "b.safetensors", base=tiny_checkpoint, overlap=False)
    assert made.overlaps == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_applied_once_and_alpha_is_kept(
    dtype: torch.dtype, catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    # large enough that a quarter is not subnormal in fp16
    path = saved_lora(tmp_path / "a.safetensors", catalogue, dtype=dtype, alpha=1.5, size=100.0)
    before = load_file(path)
    for weight, rounding in ((0.25, 0.0), (0.7, float(torch.finfo(dtype).eps))):
        out = tmp_path / f"{weight}.safetensors"
        report = slice([Slice(path, "unet", weight)], out, base=tiny_checkpoint)
        after, actual, exact = load_file(out), products(out), products(path)
        assert report.error <= rounding
        for stem in actual:
            assert after[f"{stem}.alpha"].item() == 1.5
            assert same_bits(after[f"{stem}.lora_down.weight"], before[f"{stem}.lora_down.weight"])
            assert distance(actual[stem], weight * exact[stem]) <= max(rounding, 1e-14)
        assert len(actual) == sum(layer.part.value == "unet" for layer in catalogue)


def test_a_rank_above_the_full_rank_is_kept(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue, rank=40)
    out = tmp_path / "b.safetensors"
    report = slice([Slice(path, "te")], out, base=tiny_checkpoint)
    kept = {key: tensor for key, tensor in load_file(path).items() if key.startswith("lora_te")}
    assert same_tensors(load_file(out), kept)
    assert report.error == 0
    doubled = slice([Slice(path), Slice(path)], tmp_path / "c.safetensors", base=tiny_checkpoint)
    assert doubled.error < 1e-6
    exact, actual = products(path), products(doubled.path)
    assert max(distance(actual[stem], 2 * exact[stem]) for stem in exact) < 1e-6


def test_valid_metadata_are_kept(catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path) -> None:
    metadata = {
        "ss_tag_frequency": '{"10_cat": {"cat": 3}}',
        "ss_network_dim": "64",
        "ss_output_name": "cats",
        "modelspec.title": "cats",
        "modelspec.author": "me",
        "modelspec.hash_sha256": "00",
        "sshs_model_hash": "00",
        "ss_network_module": "networks.lora",
    }
    path = saved_lora(tmp_path / "cats.safetensors", catalogue, metadata=metadata)
    dogs = saved_lora(tmp_path / "dogs.safetensors", catalogue, seed=1)
    one = slice([Slice(path, "te1")], tmp_path / "x.safetensors", base=tiny_checkpoint)
    both = slice(
        [Slice(path, "te1"), Slice(dogs, "te2", 0.5)], tmp_path / "y.safetensors", base=tiny_checkpoint
    )
    alone, together = read_metadata(one.path), read_metadata(both.path)
    for actual in (alone, together):
        assert actual["ss_tag_frequency"] == metadata["ss_tag_frequency"]
        assert actual["modelspec.author"] == "me"
        assert actual["ss_network_module"] == "lycoris.kohya"  # its sizes are written in this form
        assert actual["ss_network_dim"] == "3"
        assert "modelspec.hash_sha256" not in actual
        assert len(actual["sshs_model_hash"]) == 64
    assert (alone["modelspec.title"], together["modelspec.title"]) == ("x", "y")
    assert alone["ss_output_name"] == "cats"
    assert "ss_output_name" not in together
    assert json.loads(together["spectune.slices"]) == [
        {"file": "cats.safetensors", "trait": "te1", "weight": 1.0},
        {"file": "dogs.safetensors", "trait": "te2", "weight": 0.5},
    ]
    # files of other programs get no role: their values decide what they are
    assert (Provenance.from_metadata(together).role, both.role) == (None, Role.LORA)


def test_the_report_lists_kept_and_removed_layers(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue)
    seen: list[tuple[int, int, str]] = []
    report = slice(
        [Slice(path, "te2")],
        tmp_path / "b.safetensors",
        base=tiny_checkpoint,
        progress=lambda *step: seen.append(step),
    )
    (result,) = report.slices
    assert (len(result.kept), len(result.removed)) == (12, len(catalogue) - 12)
    assert set(result.kept) | set(result.removed) == set(catalogue.by_name)
    assert all(name.startswith("te2.") for name in result.kept)
    assert (seen[0][:2], seen[-1]) == ((0, 12), (12, 12, ""))
    with open_checkpoint(report.path) as source:
        assert len(source.tensors) == 3 * 12


def test_other_spellings_have_the_same_products(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue, alpha=1.0)
    exact = products(path)
    for spelling in Spelling:
        report = slice(
            [Slice(path, "mid", 0.7)],
            tmp_path / f"{spelling}.safetensors",
            base=tiny_checkpoint,
            keys=spelling,
        )
        with open_adapter(report.path, catalogue) as opened:
            for name in opened.layers:
                actual, stem = change(opened.layers[name]), catalogue.by_name[name].kohya
                assert distance(actual.flatten(1), 0.7 * exact[stem]) < 1e-6


def test_different_scales_give_a_warning(catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path) -> None:
    one = saved_lora(tmp_path / "a.safetensors", catalogue, alpha=1.5)
    other = saved_lora(tmp_path / "b.safetensors", catalogue)
    slices = [Slice(one, "te"), Slice(other, "unet")]
    report = slice(slices, tmp_path / "c.safetensors", base=tiny_checkpoint)
    (warning,) = report.warnings
    unet = sum(layer.part.value == "unet" for layer in catalogue)
    message = f"alpha / rank differs between layers (1 in {unet} layers, 0.5 in 24 layers)"
    assert warning.startswith(message)
    even = slice([Slice(one)], tmp_path / "d.safetensors", base=tiny_checkpoint)
    assert even.warnings == ()


def test_models_of_different_sizes_are_refused(tmp_path: Path) -> None:
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    for name, width in (("a", 8), ("b", 9)):
        tensors = {
            f"{stem}.lora_down.weight": torch.ones(2, width),
            f"{stem}.lora_up.weight": torch.ones(12, 2),
            f"{stem}.alpha": torch.tensor(2.0),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(InputError) as caught:
        slice([Slice(path) for path in files], tmp_path / "c.safetensors")
    assert caught.value.what == (
        "te1.text_model.encoder.layers.0.mlp.fc1 is (12, 9) in b.safetensors and (12, 8) in a.safetensors"
    )
    # a single file needs no base: SDXL has this layer
    alone = slice([Slice(files[1], "te1", 2.0)], tmp_path / "c.safetensors")
    assert torch.equal(products(alone.path)[stem], torch.full((12, 9), 4.0, dtype=torch.float64))


def test_traits_without_layers_are_refused(
    catalogue: Catalogue, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", [layer for layer in catalogue if layer.block == "mid"])
    for word, message in (
        ("te", f"trait `te` selects none of {sum(layer.block == 'mid' for layer in catalogue)} layers"),
        ("midd", "no layer matches `midd`; did you mean `mid`?"),
        ("down.1", "no layer matches `down.1`"),
    ):
        with pytest.raises(InputError) as caught:
            slice([Slice(path, word)], tmp_path / "b.safetensors", base=tiny_checkpoint)
        assert caught.value.what.startswith(message)
    with pytest.raises(InputError, match="is one of the input files"):
        slice([Slice(path)], path, base=tiny_checkpoint, force=True)


def open_deltas(path: Path, catalogue: Catalogue) -> TunedAdapter:
    opened = open_adapter(path, catalogue)
    assert isinstance(opened, TunedAdapter)
    return opened


@pytest.fixture(scope="module")
def steps(tiny_checkpoint: Path, tiny_split: TinySplit, folder: Path) -> tuple[Path, Path]:
    """Return adapters of an early and a late step of one training."""
    report = tiny_split(None)
    early, late = (
        saved_tuned(tuned_from(tiny_checkpoint, report, size=size), folder / f"{name}.safetensors")
        for name, size in (("early", 0.01), ("late", 0.05))
    )
    return early, late


def test_early_encoders_combine_with_a_late_unet(
    steps: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    early, late = steps
    report = slice(
        [Slice(early, "te"), Slice(late, "unet")], tmp_path / "both.safetensors", base=tiny_checkpoint
    )
    assert (report.role, report.layers, report.warnings) == (Role.TUNED, (), ())
    before, after = read_metadata(late), read_metadata(report.path)
    assert {key: after[key] for key in before if key != "spectune.version"} == {
        key: text for key, text in before.items() if key != "spectune.version"
    }
    models = {}
    for name, adapter in (("early", early), ("late", late), ("both", report.path)):
        path = tmp_path / f"{name}-model.safetensors"
        assert not rebuild(tiny_checkpoint, adapter, path).identical
        models[name] = load_file(path)
    for name, tensor in models["both"].items():
        expected = models["early" if name.startswith("conditioner.") else "late"][name]
        assert same_bits(tensor, expected), name
    different = [
        name for name in models["late"] if not same_bits(models["late"][name], models["early"][name])
    ]
    assert {name.startswith("conditioner.") for name in different} == {True, False}


def test_weighted_deltas_become_a_lora(
    steps: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    early, late = steps
    slices = [Slice(early, "te", 0.5), Slice(late, "unet.middle_block.*")]
    out = tmp_path / "x.safetensors"
    report = slice(slices, out, base=tiny_checkpoint, dtype=torch.float32)
    assert report.role is Role.LORA
    assert "spectune.principal_hash" not in read_metadata(out)
    assert read_metadata(out)["spectune.base_hash"] == read_metadata(early)["spectune.base_hash"]
    actual = products(out)
    for path, weight in ((early, 0.5), (late, 1.0)):
        with open_deltas(path, catalogue) as tuned:
            names = (
                [name for name in tuned.layers if name.startswith("te")]
                if path is early
                else [name for name in tuned.layers if name.startswith("unet.middle_block.")]
            )
            for name in names:
                exact = change(tuned.layers[name]).flatten(1)
                assert distance(actual[catalogue.by_name[name].kohya], weight * exact.double()) < 2e-6
    half = slice(slices, tmp_path / "y.safetensors", base=tiny_checkpoint)
    factors = {t.dtype for key, t in load_file(half.path).items() if not key.endswith("alpha")}
    assert factors == {torch.float16}
    assert 1e-5 < half.error < 1e-3


def test_deltas_of_two_models_become_a_lora_with_a_warning(
    steps: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    early, _ = steps
    tensors = load_file(tiny_checkpoint)
    bias = "model.diffusion_model.out.2.bias"
    second = changed_copy(tiny_checkpoint, tmp_path / "second.safetensors", {bias: tensors[bias] + 1})
    other = split(second, tmp_path, rank=2, with_residual=False)
    foreign = saved_tuned(tuned_from(second, other, size=0.05), tmp_path / "foreign.safetensors")
    report = slice(
        [Slice(early, "te"), Slice(foreign, "unet")], tmp_path / "x.safetensors", base=tiny_checkpoint
    )
    hashes = sorted(read_metadata(path)["spectune.base_hash"][:16] for path in (early, foreign))
    assert report.role is Role.LORA
    message = (
        f"the adapters were made for different models ({', '.join(hashes)}): quality may differ; check "
        "samples"
    )
    assert message in report.warnings
    assert "spectune.base_hash" not in read_metadata(report.path)


def test_deltas_refuse_another_dtype_or_spelling(
    steps: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    early, _ = steps
    for options in ({"dtype": torch.bfloat16}, {"keys": Spelling.DIFFUSERS}):
        with pytest.raises(InputError, match="holds trained deltas"):
            slice([Slice(early, "te")], tmp_path / "x.safetensors", base=tiny_checkpoint, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_lora_is_summed_with_trained_deltas(
    steps: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    early, _ = steps
    layer = catalogue.by_name["unet.middle_block.1.proj_in"]
    lora = saved_lora(tmp_path / "lora.safetensors", [layer], alpha=1.0)
    report = slice(
        [Slice(early, layer.name), Slice(lora)],
        tmp_path / "x.safetensors",
        base=tiny_checkpoint,
        dtype=torch.float32,
    )
    with open_deltas(early, catalogue) as tuned:
        exact = change(tuned.layers[layer.name]).double() + products(lora)[layer.kohya]
    assert report.role is Role.LORA
    assert distance(products(report.path)[layer.kohya], exact) < 2e-6


def test_a_principal_cannot_be_combined_with_a_lora(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, catalogue: Catalogue
) -> None:
    principal = tiny_split(None).principal
    lora = saved_lora(tmp_path / "lora.safetensors", catalogue)
    for slices in ([Slice(principal, "te"), Slice(lora)], [Slice(lora), Slice(principal, "te")]):
        with pytest.raises(PairingError) as caught:
            slice(slices, tmp_path / "x.safetensors", base=tiny_checkpoint)
        assert caught.value.what == (
            f"{principal.name} is a principal, which needs a residual, and lora.safetensors is not: "
            "they cannot be combined"
        )
    complete = slice(
        [Slice(principal, "unet"), Slice(principal, "te")], tmp_path / "x.safetensors", base=tiny_checkpoint
    )
    assert (complete.role, complete.warnings) == (Role.PRINCIPAL, ())
    assert same_tensors(load_file(complete.path), load_file(principal))
    half = slice([Slice(principal, None, 0.5)], tmp_path / "y.safetensors", base=tiny_checkpoint)
    assert half.warnings == ("a principal that is weighted or summed no longer fits its residual",)


@pytest.mark.parametrize(
    ("word", "path", "trait", "weight"),
    [
        ("a.safetensors", "a.safetensors", None, 1.0),
        ("a.safetensors:te", "a.safetensors", "te", 1.0),
        ("a.safetensors:te:0.8", "a.safetensors", "te", 0.8),
        ("a.safetensors:-.5", "a.safetensors", None, -0.5),
        ("a.safetensors:1e-1", "a.safetensors", None, 0.1),
        ("a.safetensors::0.3", "a.safetensors", None, 0.3),
        ("a.safetensors:te1.3+mid:2", "a.safetensors", "te1.3+mid", 2.0),
        (r"C:\loras\a.safetensors:unet.*attn2*:.5", r"C:\loras\a.safetensors", "unet.*attn2*", 0.5),
        (r"D:\a b.SAFETENSORS", r"D:\a b.SAFETENSORS", None, 1.0),
        ("a.safetensors.old.safetensors:te", "a.safetensors.old.safetensors", "te", 1.0),
    ],
)
def test_parse_slice(word: str, path: str, trait: str | None, weight: float) -> None:
    assert parse_slice(word) == Slice(Path(path), trait, weight)
    assert parse_slice(word).path.name.lower().endswith(".safetensors")
    assert PureWindowsPath(path).suffix.lower() == ".safetensors"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("te", "cannot parse slice 'te'"),
        ("a.safetensors:te:0.8:x", "cannot parse slice 'a.safetensors:te:0.8:x'"),
        ("a.safetensors:te:strong", "the weight in 'a.safetensors:te:strong' is 'strong'"),
        ("a.safetensors:te:nan", "the weight in 'a.safetensors:te:nan' is 'nan'"),
        ("a.safetensors:te:inf", "the weight in 'a.safetensors:te:inf' is 'inf'"),
    ],
)
def test_parse_slice_refuses(word: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_slice(word)
    assert caught.value.what.startswith(message)


def test_text_of_a_slice() -> None:
    words = ("a.safetensors", "a.safetensors:te", "a.safetensors:te:0.8", "a.safetensors:0.8")
    assert [str(parse_slice(word)) for word in words] == [
        "a.safetensors",
        "a.safetensors:te",
        "a.safetensors:te x 0.8",
        "a.safetensors x 0.8",
    ]


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint: Path, folder: Path) -> Path:
    """Return another model of the same size, with other weights and another latent scale."""
    path = folder / "other.safetensors"
    tensors = {name: _moved(tensor) for name, tensor in load_file(tiny_checkpoint).items()}
    declared = Provenance(role=Role.MODEL, prediction="v", vae_scale=0.2, base_hash="ab" * 32).to_metadata()
    save_file(
        tensors, path, metadata=read_metadata(tiny_checkpoint) | declared | {"modelspec.title": "other"}
    )
    return path


def _moved(tensor: Tensor) -> Tensor:
    return tensor + 1 if tensor.is_floating_point() else tensor


ROOTS = {
    "unet": "model.diffusion_model.",
    "te1": "conditioner.embedders.0.",
    "te2": "conditioner.embedders.1.",
    "vae": "first_stage_model.",
}


def expected_parts(
    tiny: Mapping[str, Tensor], other: Mapping[str, Tensor], foreign: Sequence[str]
) -> dict[str, Tensor]:
    roots = tuple(ROOTS[part] for part in foreign)
    return {name: other[name] if name.startswith(roots) else tiny[name] for name in tiny}


@pytest.mark.parametrize("foreign", [("te1", "te2"), ("unet",), ("vae",), ("te2", "vae")])
def test_parts_of_checkpoints_are_swapped_byte_for_byte(
    foreign: tuple[str, ...], tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    parts = ("unet", "te1", "te2", "vae")
    slices = [Slice(other_checkpoint if part in foreign else tiny_checkpoint, part) for part in parts]
    report = slice(slices, tmp_path / "swapped.safetensors")
    tiny, other = load_file(tiny_checkpoint), load_file(other_checkpoint)
    assert same_tensors(load_file(report.path), expected_parts(tiny, other, foreign))
    assert report.parts == {piece.trait: piece.path.name for piece in slices}
    declared = Provenance.from_metadata(read_metadata(report.path))
    assert declared.prediction == ("v" if "unet" in foreign else None)
    assert declared.vae_scale == (0.2 if "vae" in foreign else None)
    assert (declared.role, declared.base_hash) == (Role.MODEL, None)
    assert read_metadata(report.path)["modelspec.title"] == "swapped"


def test_te_means_both_encoders(tiny_checkpoint: Path, other_checkpoint: Path, tmp_path: Path) -> None:
    slices = [Slice(tiny_checkpoint, "unet"), Slice(other_checkpoint, "te"), Slice(tiny_checkpoint, "vae")]
    report = slice(slices, tmp_path / "x.safetensors")
    tiny, other = load_file(tiny_checkpoint), load_file(other_checkpoint)
    assert same_tensors(load_file(report.path), expected_parts(tiny, other, ("te1", "te2")))
    assert json.loads(read_metadata(report.path)["spectune.slices"])[1] == {
        "file": "other.safetensors",
        "trait": "te",
        "weight": 1.0,
    }


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("unet", "te"), "no file is named for vae", "name a file for each of unet, te1, te2, vae"),
        (("te1",), "no file is named for unet and te2 and vae", "tiny.safetensors:unet"),
        (
            ("unet", "te", "te2", "vae"),
            "te2 is named twice: for tiny.safetensors and for tiny.safetensors",
            "name each part once",
        ),
        (
            ("unett", "te", "vae"),
            "tiny.safetensors is a checkpoint: expected one of its parts, got `unett`; did you mean `unet`?",
            "parts are unet, te1, te2, vae, te",
        ),
        (
            ("unet:0.5", "te", "vae"),
            "tiny.safetensors:unet x 0.5: parts of checkpoints cannot have a weight",
            "",
        ),
    ],
)
def test_wrong_parts_are_refused(
    words: Sequence[str], message: str, hint: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        slice([parse_slice(f"{tiny_checkpoint}:{word}") for word in words], tmp_path / "x.safetensors")
    assert caught.value.what == message
    assert hint in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    residual = tiny_split(None).residual
    assert residual is not None
    with pytest.raises(InputError, match="is a residual: expected a complete model"):
        slice([Slice(residual, "unet"), Slice(tiny_checkpoint, "te"), Slice(residual, "vae")], out)
    bare = {name: t for name, t in load_file(tiny_checkpoint).items() if not name.startswith("first_stage")}
    save_file(bare, tmp_path / "bare.safetensors", metadata=read_metadata(tiny_checkpoint))
    slices = [Slice(tiny_checkpoint, "unet"), Slice(tiny_checkpoint, "te")]
    with pytest.raises(InputError, match=r"bare\.safetensors has no vae"):
        slice([*slices, Slice(tmp_path / "bare.safetensors", "vae")], out)
    assert not out.exists()
