"""Test conversion to another spelling, dtype or form, without loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.spellings import Spelling
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role
from spectune.ops.convert import convert
from spectune.ops.export import export
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.loras import distance, products, same_bits, same_tensors, saved_lora
from tests.sample_pairs import read_metadata, saved_tuned, tuned_from
from tests.split_fixtures import TinySplit


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source, all_layers=True)


@pytest.mark.parametrize("key", ["diff_b", "dora_scale", "reg_dims"])
def test_only_named_keys_are_dropped(
    key: str, catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stem = catalogue.by_name["unet.middle_block.1.proj_in"].kohya
    path = saved_lora(tmp_path / "a.safetensors", catalogue)
    plain = load_file(path)
    save_file(plain | {f"{stem}.{key}": torch.ones(32)}, path)
    out = tmp_path / "b.safetensors"
    if key == "reg_dims":
        with pytest.raises(InputError, match=rf"1 key of no known kind of adapter: {stem}\.{key}"):
            convert(path, out, base=tiny_checkpoint)
        assert not out.exists()
    else:
        assert convert(path, out).count == len(plain) + 1
    report = convert(path, out, base=tiny_checkpoint, drop=[f"*.{key}"], force=True)
    assert report.dropped == (f"{stem}.{key}",)
    assert (report.count, report.error) == (len(catalogue), 0.0)
    assert same_tensors(load_file(out), plain)
    assert any("is another adapter" in warning for warning in report.warnings) == (key == "dora_scale")


def test_drop_patterns_remove_complete_layers(
    catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue)
    out = tmp_path / "b.safetensors"
    report = convert(path, out, base=tiny_checkpoint, drop=["lora_te2_*", "lora_te1_*_layers_0_*"])
    kept = {
        key: t
        for key, t in load_file(path).items()
        if not key.startswith("lora_te2_") and "te1_text_model_encoder_layers_0" not in key
    }
    assert same_tensors(load_file(out), kept)
    assert len(report.dropped) == 3 * (12 + 6)
    with pytest.raises(InputError) as caught:
        convert(path, tmp_path / "c.safetensors", base=tiny_checkpoint, drop=["lora_te3_*"])
    assert caught.value.what == (
        f"`drop` 'lora_te3_*' matches none of the {3 * len(catalogue)} keys of a.safetensors"
    )
    with pytest.raises(InputError, match=r"has no `lora_up\.weight`"):
        convert(path, tmp_path / "c.safetensors", base=tiny_checkpoint, drop=["*.lora_up.weight"])
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16, torch.float32])
def test_the_error_is_the_rounding_of_the_dtype(
    store: torch.dtype, catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue, alpha=0.5, size=1.0)
    report = convert(path, tmp_path / "b.safetensors", base=tiny_checkpoint, dtype=store)
    before, after = load_file(path), load_file(report.path)
    for key, tensor in before.items():
        assert same_bits(after[key], tensor if key.endswith("alpha") else tensor.to(store))
    exact, actual = products(path), products(report.path)
    total = sum(float(t.square().sum()) for t in exact.values())
    lost = sum(float((actual[stem] - t).square().sum()) for stem, t in exact.items())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-12)
    assert bool(report.error) == (store != torch.float32) == bool(report.rounded)


def test_values_that_overflow_are_refused(
    catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue.layers[:3], size=1e5)
    with pytest.raises(InputError, match=r"unet\.time_embed\.0: .* exceed the range of float16") as caught:
        convert(path, tmp_path / "b.safetensors", base=tiny_checkpoint, dtype=torch.float16)
    assert caught.value.hint == "store in bfloat16 or float32"
    assert not (tmp_path / "b.safetensors").exists()


def test_even_alphas_keep_the_products(catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = saved_lora(tmp_path / "a.safetensors", catalogue, rank=5, alpha=3.0)
    even = convert(path, tmp_path / "b.safetensors", base=tiny_checkpoint, even_alphas=True)
    file, exact, actual = load_file(even.path), products(path), products(even.path)
    assert {t.item() for key, t in file.items() if key.endswith("alpha")} == {5.0}
    assert max(distance(actual[stem], exact[stem]) for stem in exact) < 1e-7
    assert 0 < even.error < 1e-7
    downs = {key: t for key, t in load_file(path).items() if ".lora_down." in key}
    assert same_tensors({key: file[key] for key in downs}, downs)
    again = convert(even.path, tmp_path / "c.safetensors", base=tiny_checkpoint, even_alphas=True)
    assert again.error == 0
    assert same_tensors(load_file(again.path), file)


def test_convert_without_a_base(tmp_path: Path) -> None:
    stem = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 7),
        f"{stem}.lora_up.weight": torch.randn(9, 2),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    away = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", keys=Spelling.COMFYUI)
    path = "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1"
    assert set(load_file(away.path)) == {f"{path}.{key.partition('.')[2]}" for key in tensors}
    back = convert(away.path, tmp_path / "c.safetensors")
    assert same_tensors(load_file(back.path), tensors)


@pytest.fixture(scope="module")
def trained(
    tiny_split: TinySplit, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """Return a principal as another program saves it after training: float32, without spectune's metadata."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        key: t
        if key.endswith("alpha")
        else t.float() * (1 + 0.01 * torch.randn(t.shape, generator=generator))
        for key, t in load_file(tiny_split(None).principal).items()
    }
    path = tmp_path_factory.mktemp("trained") / "trained.safetensors"
    save_file(tensors, path, metadata={"ss_comment": "kohya"})
    return path, tensors


def test_a_trained_principal_becomes_trained_deltas(
    trained: tuple[Path, dict[str, Tensor]],
    tiny_split: TinySplit,
    tiny_checkpoint: Path,
    tmp_path: Path,
    catalogue: Catalogue,
) -> None:
    path, after = trained
    report = tiny_split(None)
    out = tmp_path / "tuned.safetensors"
    made = convert(path, out, principal=report.principal, base=tiny_checkpoint)
    declared = Provenance.from_metadata(read_metadata(out))
    assert (declared.role, declared.base_hash) == (Role.TUNED, report.base_hash)
    assert declared.principal_hash == report.principal_hash
    assert read_metadata(out)["ss_comment"] == "kohya"
    before = load_file(report.principal)
    with open_adapter(out, catalogue) as opened:
        assert isinstance(opened, TunedAdapter)
        assert made.count == len(opened.layers) == len(report.layers)
        for name in opened.layers:
            delta, stem = opened.layers[name], catalogue.by_name[name].kohya
            for side, actual, frame in (
                ("down", delta.down, delta.frame.down),
                ("up", delta.up, delta.frame.up),
            ):
                key = f"{stem}.lora_{side}.weight"
                assert same_bits(frame, before[key])
                assert torch.equal(actual, after[key] - before[key].float())
    # with the original it gives the same model as the trained principal with the residual
    direct = rebuild(tiny_checkpoint, out, tmp_path / "a.safetensors", dtype=torch.float32)
    exact, start = products(path), products(report.principal)
    actual, original = load_file(direct.path), load_file(tiny_checkpoint)
    for layer in catalogue:
        if layer.default:
            weight = original[layer.tensor][layer.row_slice].double().flatten(1)
            expected = weight + exact[layer.kohya] - start[layer.kohya]
            assert distance(actual[layer.tensor][layer.row_slice].flatten(1), expected) < 1e-6
    lora = export(
        path,
        tmp_path / "lora.safetensors",
        base=tiny_checkpoint,
        principal=report.principal,
        dtype=torch.float32,
    )
    added = products(lora.path)
    for layer in catalogue:
        if layer.default:
            change = exact[layer.kohya] - start[layer.kohya]
            assert distance(added[layer.kohya], change) < 1e-5
            assert distance(1.01 * added[layer.kohya], change) > 9e-3


def test_trained_deltas_refuse_other_spellings_dtypes_and_scales(
    trained: tuple[Path, dict[str, Tensor]], tiny_split: TinySplit, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    tuned = saved_tuned(tuned_from(tiny_checkpoint, tiny_split(None), size=0.1), tmp_path / "t.safetensors")
    for options in ({"keys": Spelling.DIFFUSERS}, {"dtype": torch.float16}, {"even_alphas": True}):
        with pytest.raises(
            InputError, match=r"t\.safetensors holds trained deltas: these have only one spelling"
        ):
            convert(tuned, out, base=tiny_checkpoint, **options)
    principal = tiny_split(None).principal
    with pytest.raises(InputError, match=r"trained\.safetensors holds trained deltas"):
        convert(trained[0], out, principal=principal, base=tiny_checkpoint, dtype=torch.float16)
    with pytest.raises(InputError, match=r"t\.safetensors is a tuned adapter: expected a trained principal"):
        convert(tuned, out, principal=principal, base=tiny_checkpoint)
    assert not out.exists()
    same = convert(tuned, out, base=tiny_checkpoint)
    assert same_tensors(load_file(same.path), load_file(tuned))


def test_a_lora_is_not_a_trained_principal(
    tiny_split: TinySplit, tiny_checkpoint: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    default = [layer for layer in catalogue if layer.default]
    lora = saved_lora(tmp_path / "lora.safetensors", default, rank=4)
    with pytest.raises(PairingError, match=r"lora\.safetensors does not look like tiny\.principal-r4"):
        convert(lora, tmp_path / "x.safetensors", principal=tiny_split(None).principal, base=tiny_checkpoint)


def test_inputs_are_never_overwritten(
    trained: tuple[Path, dict[str, Tensor]], tiny_split: TinySplit, tiny_checkpoint: Path
) -> None:
    principal = tiny_split(None).principal
    before = principal.read_bytes()
    for target in (trained[0], principal, tiny_checkpoint):
        with pytest.raises(InputError, match="is one of the input files"):
            convert(trained[0], target, principal=principal, base=tiny_checkpoint, force=True)
    assert principal.read_bytes() == before
    with pytest.raises(InputError, match="is one of the input files"):
        convert(tiny_checkpoint, tiny_checkpoint, force=True)


def test_a_checkpoint_keeps_every_bit_in_every_layout(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint)
    metadata = read_metadata(tiny_checkpoint) | {"modelspec.author": "me", "modelspec.hash_sha256": "00"}
    first = tmp_path / "first.safetensors"
    save_file(tensors, first, metadata=metadata)
    seen: list[tuple[int, int, str]] = []
    source = first
    for name in ("shards.safetensors.index.json", "one.safetensors", "folder", "again", "two.safetensors"):
        report = convert(source, tmp_path / name, progress=lambda *step: seen.append(step))
        source = tmp_path / name
        with open_checkpoint(source) as made:
            actual = {key: made.load(key) for key in made.tensors}
        assert same_tensors(actual, tensors), name
        assert (report.count, report.error, report.dropped) == (len(tensors), 0.0, ())
    assert (tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert seen[-1] == (len(tensors), len(tensors), "")
    one = read_metadata(tmp_path / "one.safetensors")
    assert one["modelspec.author"] == "me"
    assert "modelspec.hash_sha256" not in one  # valid for the first file only
    assert same_tensors(load_file(tmp_path / "two.safetensors"), tensors)


def test_a_folder_keeps_the_small_files_of_its_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = convert(tiny_checkpoint, tmp_path / "folder").path
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("{", '{"mine": 1,', 1))
    again = convert(folder, tmp_path / "again").path
    assert '"mine": 1' in (again / "scheduler" / "scheduler_config.json").read_text()
    assert (again / "tokenizer" / "merges.txt").read_bytes() == (
        folder / "tokenizer" / "merges.txt"
    ).read_bytes()
