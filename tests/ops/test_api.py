"""Test the Python API as users import it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spectune
from spectune.checkpoints.open import open_checkpoint
from spectune.ops.inspect.summary import AdapterSummary, ModelSummary
from spectune.ops.options.values import Slice
from spectune.ops.split import SplitReport
from spectune.sdxl.layers import build_catalogue
from tests.loras import products, same_tensors, saved_lora
from tests.sample_pairs import changed_copy, saved_tuned, tuned_from


@pytest.fixture(scope="module")
def split(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitReport:
    folder = str(tmp_path_factory.mktemp("api") / "parts")
    return spectune.split(str(tiny_checkpoint), folder, rank=4, residual_dtype="fp32")


@pytest.fixture(scope="module")
def tuned(split: SplitReport, tiny_checkpoint: Path) -> str:
    deltas = tuned_from(tiny_checkpoint, split, size=0.05)
    return str(saved_tuned(deltas, split.principal.with_name("tuned.safetensors")))


@pytest.fixture
def lora(tiny_checkpoint: Path, tmp_path: Path) -> str:
    with open_checkpoint(tiny_checkpoint) as source:
        return str(saved_lora(tmp_path / "lora.safetensors", build_catalogue(source), alpha=1.5))


def test_split_and_rebuild_restore_the_model(
    split: SplitReport, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    residual, principal = str(split.residual), str(split.principal)
    seen: list[str] = []
    report = spectune.verify(
        str(tiny_checkpoint), residual, principal, progress=lambda done, total, name: seen.append(name)
    )
    assert (report.ok, report.exact) == (True, True)
    assert len(seen) > 100
    rebuilt = spectune.rebuild(residual, principal, str(tmp_path / "again.safetensors"))
    assert rebuilt.identical
    assert same_tensors(load_file(rebuilt.path), load_file(tiny_checkpoint))


def test_options_accept_the_values_of_the_command_line(
    tuned: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = str(tiny_checkpoint)
    rebuilt = spectune.rebuild(
        tuned, base, str(tmp_path / "a.safetensors"), strength={"te": 0.0}, dtype="fp8", cast_all=True
    )
    kinds = {n.partition(".")[0]: t.dtype for n, t in load_file(rebuilt.path).items() if n.endswith("weight")}
    assert kinds["model"] == kinds["conditioner"] == torch.float8_e4m3fn
    assert kinds["first_stage_model"] == torch.float16
    exported = spectune.export(
        tuned, str(tmp_path / "b.safetensors"), base=base, size="100KB", keys="peft", dtype="bf16"
    )
    assert exported.path.stat().st_size <= 100_000
    assert {t.dtype for t in load_file(exported.path).values()} == {torch.bfloat16}
    for call, what in (
        (lambda out: spectune.export(tuned, out, base=base, rank=2, energy=0.5), "exclude each other"),
        (lambda out: spectune.export(tuned, out, base=base, keys="khoya"), "unknown `keys` 'khoya'"),
        (lambda out: spectune.rebuild(base, tuned, out, dtype="fp4"), "unknown `dtype` 'fp4'"),
        (lambda out: spectune.rebuild(base, tuned, out, strength={"vae": 1}), "unknown part 'vae'"),
        (lambda out: spectune.split(base, out, svd="fast"), "unknown `svd` 'fast'"),
        (lambda out: spectune.slice([], out), "`slices` is empty"),
    ):
        with pytest.raises(spectune.InputError, match=what):
            call(str(tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()


def test_export_accepts_an_adapter_or_a_checkpoint(tuned: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = str(tiny_checkpoint)
    model = spectune.rebuild(base, tuned, str(tmp_path / "m.safetensors"), dtype="float32").path
    direct = spectune.export(tuned, str(tmp_path / "a.safetensors"), base=base, dtype="fp32")
    found = spectune.export(str(model), str(tmp_path / "b.safetensors"), base=base, rank=8, dtype="fp32")
    one, other = products(direct.path), products(found.path)
    assert one.keys() == other.keys()
    assert max(float((one[stem] - other[stem]).norm() / one[stem].norm()) for stem in one) < 1e-4
    with pytest.raises(
        spectune.InputError, match="is a checkpoint: its LoRA is the difference from another checkpoint"
    ):
        spectune.export(str(model), str(tmp_path / "c.safetensors"))


def test_slice_accepts_text_slices_and_checkpoints(lora: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = str(tiny_checkpoint)
    by_word = spectune.slice([f"{lora}:te:0.5"], str(tmp_path / "a.safetensors"), base=base)
    by_slice = spectune.slice([Slice(Path(lora), "te", 0.5)], str(tmp_path / "b.safetensors"), base=base)
    assert same_tensors(load_file(by_word.path), load_file(by_slice.path))
    other = changed_copy(
        tiny_checkpoint,
        tmp_path / "other.safetensors",
        {name: t + 1 for name, t in load_file(tiny_checkpoint).items() if name.endswith("proj_in.bias")},
    )
    swapped = spectune.slice([f"{other}:unet", f"{base}:te", f"{base}:vae"], str(tmp_path / "c.safetensors"))
    assert same_tensors(load_file(swapped.path), load_file(other))


def test_convert_accepts_an_adapter_or_a_checkpoint(lora: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = str(tiny_checkpoint)
    away = spectune.convert(lora, str(tmp_path / "a.safetensors"), keys="comfyui", base=base)
    back = spectune.convert(str(away.path), str(tmp_path / "b.safetensors"), base=base)
    assert same_tensors(load_file(back.path), load_file(lora))
    folder = spectune.convert(base, str(tmp_path / "folder"))
    single = spectune.convert(str(folder.path), str(tmp_path / "one.safetensors"))
    assert same_tensors(load_file(single.path), load_file(tiny_checkpoint))
    with pytest.raises(spectune.InputError, match="is a checkpoint: only its file layout can be converted"):
        spectune.convert(base, str(tmp_path / "x.safetensors"), keys="diffusers")


def test_inspect_distinguishes_models_and_adapters(
    lora: str, split: SplitReport, tiny_checkpoint: Path
) -> None:
    model, adapter = spectune.inspect(str(tiny_checkpoint)), spectune.inspect(lora)
    assert isinstance(model, ModelSummary)
    assert (model.role, model.prediction, model.declared) == ("model", "eps", False)
    assert isinstance(adapter, AdapterSummary)
    assert (adapter.role, adapter.spelling, dict(adapter.scales)) == ("lora", "kohya", {0.5: 192})
    principal = spectune.inspect(str(split.principal))
    assert isinstance(principal, AdapterSummary)
    assert (principal.role, dict(principal.ranks)) == ("principal", {4: 192})


def test_imported_packages_do_not_hide_the_functions() -> None:
    import spectune.pairs
    import spectune.training

    assert all(callable(getattr(spectune, name)) for name in spectune.__all__)
    assert set(spectune.__all__) <= set(dir(spectune))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'spectune' has no attribute 'rebild'"):
        spectune.rebild  # type: ignore[attr-defined]  # noqa: B018


def test_errors_have_one_base_class() -> None:
    assert issubclass(spectune.InputError, spectune.SpectuneError)
    assert issubclass(spectune.PairingError, spectune.SpectuneError)
