"""Tuned files that replace some tensors of their base completely."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectune
from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter, open_any_adapter
from spectune.adapters.spellings import sort_keys
from spectune.adapters.writer import delta_tensors, save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.files.provenance import Provenance
from spectune.ops.inspect.summary import AdapterSummary
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.sdxl.names import kohya_stem
from tests.loras import same_bits
from tests.sample_adapters import as_tuned, pairs

BIAS = "model.diffusion_model.time_embed.0.bias"
KERNEL = "model.diffusion_model.input_blocks.0.0.weight"
PROVENANCE = Provenance(base_hash="ab" * 32)


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source, all_layers=True)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path) -> dict[str, Tensor]:
    base = load_file(tiny_checkpoint)
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(base[name].shape, generator=generator) for name in (BIAS, KERNEL)}


@pytest.fixture
def ordinary(catalogue: Catalogue, tmp_path: Path) -> Path:
    """Return a tuned file that replaces no tensors."""
    factors = as_tuned(pairs(catalogue.layers[::40]))
    tensors = {key: tensor.clone() for key, tensor in factors.items()}
    save_file(tensors, tmp_path / "plain.safetensors", metadata=PROVENANCE.to_metadata())
    return tmp_path / "plain.safetensors"


def tuned(path: Path, catalogue: Catalogue, replaced: Mapping[str, Tensor]) -> TunedAdapter:
    with open_adapter(path, catalogue) as opened:
        assert isinstance(opened, TunedAdapter)
        return TunedAdapter(dict(opened.layers), opened.metadata, opened.label, replaced=replaced)


@pytest.fixture
def replacing(ordinary: Path, catalogue: Catalogue, whole: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "tuned.safetensors"
    save_tuned(path, tuned(ordinary, catalogue, whole), PROVENANCE)
    return path


def changed(path: Path, changes: Mapping[str, Tensor], *, drop: str = "none") -> Path:
    """Return a copy of a file with tensors added, and without keys that begin with `drop`."""
    tensors = {key: tensor for key, tensor in load_file(path).items() if not key.startswith(drop)}
    save_file(tensors | dict(changes), path.with_name("x.safetensors"))
    return path.with_name("x.safetensors")


def test_replaced_tensors_round_trip(
    replacing: Path, ordinary: Path, catalogue: Catalogue, whole: dict[str, Tensor]
) -> None:
    with open_any_adapter(replacing, catalogue) as opened, open_adapter(ordinary) as plain:
        assert isinstance(opened, TunedAdapter)
        assert opened.layers.keys() == plain.layers.keys()
        assert opened.replaced.keys() == whole.keys()
        assert all(same_bits(opened.replaced[name], whole[name]) for name in whole)
        assert opened.warnings == ()
    stored = load_file(replacing)
    assert {key for key in stored if key.startswith("replaced.")} == {f"replaced.{name}" for name in whole}


def test_a_file_without_replaced_tensors_is_unchanged(
    ordinary: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    adapter = tuned(ordinary, catalogue, {})
    save_tuned(tmp_path / "again.safetensors", adapter, PROVENANCE)
    expected = {
        key: tensor
        for name, delta in adapter.layers.items()
        for key, tensor in delta_tensors(kohya_stem(name), delta).items()
    }
    found = load_file(tmp_path / "again.safetensors")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)
    with open_any_adapter(tmp_path / "again.safetensors", catalogue) as opened:
        assert isinstance(opened, TunedAdapter)
        assert opened.replaced == {}


def test_replaced_tensors_must_be_weights_to_be_written(
    ordinary: Path, catalogue: Catalogue, tmp_path: Path
) -> None:
    adapter = tuned(ordinary, catalogue, {BIAS: torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(AssertionError, match=r"is torch\.float64"):
        save_tuned(tmp_path / "tuned.safetensors", adapter, PROVENANCE)
    assert not (tmp_path / "tuned.safetensors").exists()


def test_callers_that_would_lose_replaced_tensors_get_an_error(replacing: Path, catalogue: Catalogue) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(replacing, catalogue)
    first = next(key for key in load_file(replacing) if key.startswith("replaced."))
    assert caught.value.what == (
        f"tuned.safetensors replaces 2 tensors of its base (first {first.removeprefix('replaced.')}), "
        "which factors cannot store"
    )
    assert caught.value.hint == (
        "rebuild the checkpoint with `spectune rebuild`, or write the closest LoRA with "
        "`spectune export MODEL FILE`"
    )


def test_a_lora_cannot_replace_tensors(replacing: Path, catalogue: Catalogue) -> None:
    lora = changed(replacing, pairs(catalogue.layers[:2]), drop="lora_")
    with pytest.raises(InputError, match="but is not a tuned adapter: expected frame_down"):
        open_any_adapter(lora, catalogue)


def test_a_dtype_that_is_no_working_dtype_is_an_error(replacing: Path, catalogue: Catalogue) -> None:
    cast = changed(replacing, {f"replaced.{BIAS}": torch.zeros(4, dtype=torch.float64)})
    expected = rf"replaced\.{BIAS} of x\.safetensors is F64: expected F32, BF16, F16"
    with pytest.raises(InputError, match=expected):
        open_any_adapter(cast, catalogue)


def test_replaced_keys_are_neither_layers_nor_foreign() -> None:
    table = sort_keys([f"replaced.{BIAS}", "a.other.weight"], {})
    assert (table.replaced, table.foreign, table.unexpected) == ((BIAS,), ("a",), ())


def test_inspect_counts_replaced_tensors_separately(
    replacing: Path, ordinary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, plain = spectune.inspect(replacing), spectune.inspect(ordinary)
    assert isinstance(found, AdapterSummary)
    assert isinstance(plain, AdapterSummary)
    assert (found.replaced, plain.replaced) == (2, 0)
    for field in ("layers", "ranks", "scales", "parameters", "dtypes", "problems", "spelling"):
        assert getattr(found, field) == getattr(plain, field), field
    assert run(["inspect", str(replacing)]) == 0
    assert "replaced      2 complete tensors of the base, " in capsys.readouterr().err
    assert run(["inspect", str(ordinary)]) == 0
    assert "replaced" not in capsys.readouterr().err
    assert run(["inspect", str(replacing), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replaced"] == 2
