"""Test split, rebuild and export of tuned adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.core.delta import change
from spectune.errors import InputError, PairingError
from spectune.files.provenance import Provenance, Role, spectune_version
from spectune.files.weights_hash import weights_hash
from spectune.ops.drawing.models import open_model
from spectune.ops.drawing.specs import ModelSpec, Weighted
from spectune.ops.export import export
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.ops.verify import verify
from spectune.sdxl.layers import build_catalogue
from tests.sample_pairs import (
    changed_copy,
    open_principal,
    read_metadata,
    recast,
    saved_tuned,
    small_split,
    tuned_from,
)
from tests.split_fixtures import TinySplit


def same_files(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def with_negative_zeros(base: Path, out: Path) -> Path:
    """Return a copy with negative zeros, which fp16 checkpoints have where negative numbers underflowed."""
    tensors = load_file(base)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel() > 8:
            tensor.view(-1)[::5] = -0.0
    return changed_copy(base, out, tensors)


def test_split_names_its_files_and_records_their_origin(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = split(tiny_checkpoint, tmp_path / "new", rank=4, progress=lambda *step: seen.append(step))
    assert report.residual is not None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "tiny.principal-r4.safetensors",
        "tiny.residual.safetensors",
    ]
    with (
        open_checkpoint(tiny_checkpoint) as base,
        open_checkpoint(report.principal) as principal,
        open_checkpoint(report.residual) as residual,
    ):
        assert report.base_hash == weights_hash(base)
        assert report.principal_hash == weights_hash(principal)
        of_principal = Provenance.from_metadata(principal.metadata)
        of_residual = Provenance.from_metadata(residual.metadata)
        assert list(residual.tensors) == list(base.tensors)
        assert residual.metadata["spectune.layout"] == base.metadata["spectune.layout"]
        assert seen[0] == (0, len(base.tensors), next(iter(base.tensors)))
        assert seen[-1] == (len(base.tensors), len(base.tensors), "")
    assert (of_principal.role, of_principal.base_hash) == (Role.PRINCIPAL, report.base_hash)
    assert (of_residual.role, of_residual.base_hash) == (Role.RESIDUAL, report.base_hash)
    assert (of_principal.principal_hash, of_residual.principal_hash) == (None, report.principal_hash)
    assert of_residual.base_name == "tiny.safetensors"


@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16])
def test_a_float32_residual_restores_every_bit(
    tiny_checkpoint: Path, tmp_path: Path, store: torch.dtype
) -> None:
    base = with_negative_zeros(tiny_checkpoint, tmp_path / "base.safetensors")
    report = split(base, tmp_path, rank=4, dtype=store, residual_dtype=torch.float32)
    assert report.residual is not None
    assert (report.exact, report.share) == (True, 1.0)
    dtypes = json.loads(read_metadata(report.residual)["spectune.base_dtypes"])
    with open_checkpoint(base) as source:
        assert set(dtypes) == set(build_catalogue(source).by_tensor)
        assert set(dtypes.values()) == {"F16"}
    rebuilt = rebuild(report.residual, report.principal, tmp_path / "again.safetensors")
    assert rebuilt.identical
    assert rebuilt.hash == report.base_hash
    assert same_files(tmp_path / "again.safetensors", base)
    again = read_metadata(tmp_path / "again.safetensors")
    assert Provenance.from_metadata(again).role is Role.MODEL
    assert "spectune.base_dtypes" not in again
    assert again["spectune.layout"] == read_metadata(base)["spectune.layout"]
    assert verify(base, report.residual, report.principal).exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_residual_reports_its_share(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = recast(tiny_checkpoint, tmp_path / "base.safetensors", dtype)
    report = small_split(base, tmp_path)
    assert report.residual is not None
    assert 0.5 < report.share < 1.0
    rebuilt = rebuild(report.residual, report.principal, tmp_path / "again.safetensors")
    assert not rebuilt.identical
    verified = verify(base, report.residual, report.principal)
    assert verified.ok
    assert not verified.exact
    factored = [record.agreement for record in verified.records if record.layers]
    assert sum(a.bit_equal for a in factored) / sum(a.numel for a in factored) == report.share
    # tensors that are not factored are copied byte for byte
    with open_checkpoint(base) as source:
        kept = set(source.tensors) - set(build_catalogue(source).by_tensor)
    before, after = load_file(base), load_file(tmp_path / "again.safetensors")
    assert len(kept) > 50
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_each_tensor_gets_its_original_dtype(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint)
    names = [name for name in tensors if name.endswith("to_q.weight")]
    base = changed_copy(
        tiny_checkpoint, tmp_path / "mixed.safetensors", {names[0]: tensors[names[0]].bfloat16()}
    )
    report = small_split(base, tmp_path, residual_dtype=torch.float32)
    assert report.residual is not None
    rebuild(report.residual, report.principal, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again[names[0]].dtype == torch.bfloat16
    assert again[names[1]].dtype == torch.float16
    rebuild(report.residual, report.principal, tmp_path / "w.safetensors", dtype=torch.float32)
    wide = load_file(tmp_path / "w.safetensors")
    assert wide[names[0]].dtype == torch.float32
    assert wide["model.diffusion_model.out.0.weight"].dtype == torch.float16


def test_split_twice_gives_the_same_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = small_split(tiny_checkpoint, tmp_path / "one"), small_split(tiny_checkpoint, tmp_path / "two")
    assert one.principal_hash == two.principal_hash
    assert one.residual is not None
    assert two.residual is not None
    assert one.residual.read_bytes() == two.residual.read_bytes()
    assert one.principal.read_bytes() == two.principal.read_bytes()


def test_split_without_residual_and_with_all_layers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = split(tiny_checkpoint, tmp_path, rank=30, conv_rank=2, with_residual=False, layers=["all"])
    assert report.residual is None
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.principal-r30-c2.safetensors"]
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks["unet.input_blocks.0.0"] == ranks["unet.out.2"] == 2
    assert ranks["unet.time_embed.0"] == 16
    assert {layer.name for layer in report.capped} >= {"unet.time_embed.0"}
    assert 0 < report.energy < 1


def test_layers_of_zeros_are_counted(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    base = changed_copy(tiny_checkpoint, tmp_path / "zero.safetensors", {name: torch.zeros(16, 40).half()})
    assert run(["split", str(base), "-o", str(tmp_path), "--rank", "2", "--layers", "unet.*attn2.to_k"]) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert (
        "training cannot change 1 layer with only zero weights, because the factors are zero too: " in shown
    )
    assert "unet.input_blocks.3.1.transformer_blocks.0.attn2.to_k" in shown


def test_split_refuses_residuals_and_existing_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = small_split(tiny_checkpoint, tmp_path)
    assert report.residual is not None
    with pytest.raises(
        InputError, match=r"tiny\.residual\.safetensors is a residual: expected a complete model"
    ):
        small_split(report.residual, tmp_path)
    with pytest.raises(InputError, match="exists"):
        small_split(tiny_checkpoint, tmp_path)


def test_damaged_weights_leave_no_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint)
    name = next(name for name in tensors if name.endswith("output_blocks.0.0.in_layers.2.weight"))
    tensors[name][0, 0, 0, 0] = float("nan")
    base = changed_copy(tiny_checkpoint, tmp_path / "nan.safetensors", tensors)
    with pytest.raises(InputError, match=r"unet\.output_blocks\.0\.0\.in_layers\.2: 1 of \d+ values are NaN"):
        small_split(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_deltas_change_no_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = with_negative_zeros(tiny_checkpoint, tmp_path / "base.safetensors")
    report = small_split(base, tmp_path)
    tuned = saved_tuned(tuned_from(base, report, size=0.0), tmp_path / "tuned.safetensors")
    rebuilt = rebuild(base, tuned, tmp_path / "again.safetensors")
    assert rebuilt.identical
    assert same_files(tmp_path / "again.safetensors", base)
    exported = export(tuned, tmp_path / "lora.safetensors", base=base)
    assert exported.error == 0.0
    assert not any(t.any() for name, t in load_file(exported.path).items() if not name.endswith("alpha"))


def test_a_tuned_model_is_one_rounding_away_from_float64(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = tuned_from(tiny_checkpoint, report, size=0.05, only="unet.middle_block")
    path = saved_tuned(tuned, tmp_path / "tuned.safetensors")
    rebuilt = rebuild(tiny_checkpoint, path, tmp_path / "full.safetensors")
    assert not rebuilt.identical
    before, after = load_file(tiny_checkpoint), load_file(tmp_path / "full.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    with open_checkpoint(tiny_checkpoint) as source:
        layers = build_catalogue(source).by_name
    assert changed == {layers[name].tensor for name in tuned.layers}
    for name, delta in tuned.layers.items():
        frame = delta.frame
        up, down = (t.flatten(1).double() for t in (delta.up, delta.down))
        exact = up @ (frame.down.flatten(1).double() + down) + frame.up.flatten(1).double() @ down
        expected = before[layers[name].tensor].double() + exact.reshape(layers[name].shape)
        error = (after[layers[name].tensor].double() - expected).abs()
        assert bool((error <= expected.abs() * (2.0**-11 + 2.0**-20) + 2.0**-24).all())
    metadata = Provenance.from_metadata(read_metadata(tmp_path / "full.safetensors"))
    assert (metadata.role, metadata.prediction, metadata.flow_shift) == (Role.MODEL, "flow", 2.5)
    assert metadata.base_hash == report.base_hash


def test_the_tuned_adapter_works_with_the_residual_too(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(torch.float32)
    assert report.residual is not None
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.05), tmp_path / "tuned.safetensors")
    rebuild(tiny_checkpoint, tuned, tmp_path / "a.safetensors")
    rebuild(report.residual, tuned, tmp_path / "b.safetensors")
    # and so does the tuned principal
    replaced = export(
        tuned, tmp_path / "p.safetensors", base=tiny_checkpoint, form="principal", dtype=torch.float32
    )
    rebuild(report.residual, replaced.path, tmp_path / "c.safetensors")
    direct = load_file(tmp_path / "a.safetensors")
    for other in ("b", "c"):
        beside = load_file(tmp_path / f"{other}.safetensors")
        for name, tensor in direct.items():
            torch.testing.assert_close(beside[name], tensor, rtol=2.0**-10, atol=2.0**-20)
    partly = tuned_from(tiny_checkpoint, report, size=0.05, only="unet")
    path = saved_tuned(partly, tmp_path / "unet.safetensors")
    with pytest.raises(PairingError, match=r"lacks the principal of \d+ layers, unet\.safetensors has \d+"):
        rebuild(report.residual, path, tmp_path / "d.safetensors")


def test_rebuild_refuses_another_base_and_names_both_hashes(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.05), tmp_path / "tuned.safetensors")
    tensors = load_file(tiny_checkpoint)
    other = changed_copy(
        tiny_checkpoint,
        tmp_path / "other.safetensors",
        {"model.diffusion_model.out.2.bias": tensors["model.diffusion_model.out.2.bias"] + 1},
    )
    with open_checkpoint(other) as source:
        actual = weights_hash(source)
    with pytest.raises(PairingError) as caught:
        rebuild(other, tuned, tmp_path / "full.safetensors")
    assert report.base_hash[:16] in caught.value.what
    assert actual[:16] in caught.value.what
    assert not (tmp_path / "full.safetensors").exists()
    assert not list(tmp_path.glob("*.partial"))
    with (
        pytest.raises(PairingError, match=report.base_hash[:16]),
        open_model(ModelSpec(other, (Weighted(tuned, 1.0),)), print),
    ):
        pass


def test_rebuild_refuses_files_that_do_not_belong_together(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    assert report.residual is not None
    out = tmp_path / "full.safetensors"
    with pytest.raises(PairingError, match="the principal part would count twice"):
        rebuild(tiny_checkpoint, report.principal, out)
    with pytest.raises(InputError, match=r"expected only its principal at strength 1, got 1 at 0\.5"):
        rebuild(report.residual, report.principal, out, strength=0.5)
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.05), tmp_path / "tuned.safetensors")
    lora = export(tuned, tmp_path / "lora.safetensors", base=tiny_checkpoint)
    with pytest.raises(PairingError, match="which lacks its principal"):
        rebuild(report.residual, lora.path, out)
    with pytest.raises(PairingError, match="is an untrained principal of `split`: it contains no change"):
        export(report.principal, tmp_path / "lora2.safetensors", base=tiny_checkpoint)
    second = small_split(
        changed_copy(
            tiny_checkpoint,
            tmp_path / "second.safetensors",
            {name: t * 2 for name, t in load_file(tiny_checkpoint).items() if name.endswith("to_q.weight")},
        ),
        tmp_path,
    )
    with pytest.raises(PairingError) as caught:
        rebuild(report.residual, second.principal, out)
    assert report.principal_hash[:16] in caught.value.what
    assert second.principal_hash[:16] in caught.value.what


def test_the_exported_lora_gives_the_tuned_model(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = tuned_from(tiny_checkpoint, report, size=0.01)
    path = saved_tuned(tuned, tmp_path / "tuned.safetensors")
    exported = export(path, tmp_path / "lora.safetensors", base=tiny_checkpoint)
    assert exported.error < 1e-3
    assert exported.worst.error == max(layer.error for layer in exported.layers)
    lora = open_principal(tiny_checkpoint, exported.path)
    for layer in exported.layers:
        exact = change(tuned.layers[layer.name])
        actual = float((change(lora.layers[layer.name]) - exact).norm() / exact.norm())
        assert actual == pytest.approx(layer.error, rel=1e-3, abs=1e-7)
        assert lora.layers[layer.name].rank == layer.rank <= 8
    metadata = read_metadata(exported.path)
    assert Provenance.from_metadata(metadata).role is Role.LORA
    assert metadata["ss_network_dim"] == "8"
    rebuild(tiny_checkpoint, path, tmp_path / "a.safetensors")
    rebuilt = rebuild(tiny_checkpoint, exported.path, tmp_path / "b.safetensors")
    assert rebuilt.changed_tensors > 100
    left, right = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(
        float((left[n].float() - right[n].float()).norm()) <= 1e-3 * float(left[n].float().norm())
        for n in left
    )
    # a LoRA can be used with another model
    rebuild(tmp_path / "a.safetensors", exported.path, tmp_path / "c.safetensors", strength=0.5)


def test_a_truncated_export_reports_its_error(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.01), tmp_path / "tuned.safetensors")
    exported = export(tuned, tmp_path / "lora.safetensors", base=tiny_checkpoint, rank=2)
    assert all(layer.rank == 2 and layer.truncated for layer in exported.layers)
    assert 0.1 < exported.error < 1.0
    with open_checkpoint(tiny_checkpoint) as source:
        opened = open_adapter(exported.path, build_catalogue(source))
    assert isinstance(opened, Adapter)
    with pytest.raises(InputError, match="a tuned principal cannot be truncated: it keeps its rank"):
        export(tuned, tmp_path / "p.safetensors", base=tiny_checkpoint, rank=2, form="principal")


def test_a_bf16_principal_loses_most_of_a_small_change(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=1e-3), tmp_path / "tuned.safetensors")
    plain = export(tuned, tmp_path / "a.safetensors", base=tiny_checkpoint, dtype=torch.bfloat16)
    principal = export(
        tuned, tmp_path / "b.safetensors", base=tiny_checkpoint, dtype=torch.bfloat16, form="principal"
    )
    assert plain.error < 0.01
    assert principal.error > 0.5


def test_a_partial_or_unpaired_adapter_is_not_exported_as_a_principal(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report = tiny_split(None)
    out = tmp_path / "p.safetensors"
    part = saved_tuned(
        tuned_from(tiny_checkpoint, report, size=0.01, only="unet"), tmp_path / "a.safetensors"
    )
    with pytest.raises(
        InputError, match=r"a\.safetensors lacks \d+ of \d+ layers of a principal: te1"
    ) as caught:
        export(part, out, base=tiny_checkpoint, form="principal")
    assert caught.value.hint == "leave out `form`: a plain LoRA works with the original model"
    tuned = tuned_from(tiny_checkpoint, report, size=0.01)
    save_tuned(tmp_path / "b.safetensors", tuned, Provenance(base_hash=report.base_hash))
    with pytest.raises(InputError, match="was not trained from the principal of a residual"):
        export(tmp_path / "b.safetensors", out, base=tiny_checkpoint, form="principal")
    assert not out.exists()
    export(tmp_path / "b.safetensors", out, base=tiny_checkpoint, rank=1)
    assert read_metadata(tmp_path / "b.safetensors")["spectune.version"] == spectune_version()


def test_the_report_counts_changed_tensors_and_has_warnings(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.0, only="unet.middle_block")
    path = saved_tuned(tuned, tmp_path / "t.safetensors")
    rebuilt = rebuild(tiny_checkpoint, path, tmp_path / "a.safetensors")
    assert (rebuilt.identical, rebuilt.changed_tensors, rebuilt.warnings) == (True, 0, ())
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.1, only="unet.middle_block")
    path = saved_tuned(tuned, tmp_path / "u.safetensors")
    bare = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    save_file(bare, tmp_path / "v.safetensors", metadata=read_metadata(path))
    rebuilt = rebuild(tiny_checkpoint, tmp_path / "v.safetensors", tmp_path / "b.safetensors")
    assert (rebuilt.identical, rebuilt.changed_tensors) == (False, len(tuned.layers))
    assert rebuilt.warnings[0].startswith(f"{len(tuned.layers)} layers of v.safetensors without alpha")


def test_inputs_are_never_overwritten(tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path) -> None:
    tuned = tuned_from(tiny_checkpoint, tiny_split(None), size=0.0, only="unet.middle_block")
    path = saved_tuned(tuned, tmp_path / "t.safetensors")
    before = path.read_bytes(), tiny_checkpoint.read_bytes()
    for target in (path, tiny_checkpoint):
        with pytest.raises(InputError, match="is one of the input files"):
            rebuild(tiny_checkpoint, path, target, force=True)
        with pytest.raises(InputError, match="is one of the input files"):
            export(path, target, base=tiny_checkpoint, force=True)
    assert (path.read_bytes(), tiny_checkpoint.read_bytes()) == before


def test_quantized_weights_are_refused_before_writing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    small = (load_file(tiny_checkpoint)[name] > 0).to(torch.int8)
    base = changed_copy(tiny_checkpoint, tmp_path / "i8.safetensors", {name: small})
    with pytest.raises(
        InputError, match=r"layer unet\.middle_block\.0\.in_layers\.2 of i8\.safetensors is stored"
    ):
        small_split(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
