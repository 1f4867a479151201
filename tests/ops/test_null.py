"""Test the zero model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spectune.ops.null as null_module
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import Provenance, Role
from spectune.files.source import MemorySource
from spectune.ops.null import null
from spectune.sdxl.layout import TE1_ROOT, TE2_ROOT, VAE_ROOT

KEPT = (f"{TE1_ROOT}embeddings.position_ids", f"{TE2_ROOT}logit_scale")


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def stamped(path: Path, out: Path, **fields: object) -> Path:
    """Return a copy with other provenance in its metadata."""
    with open_checkpoint(path) as source:
        metadata = {**source.metadata, **replace(Provenance(), **fields).to_metadata()}
    save_file(load_file(path), out, metadata=metadata)
    return out


def test_the_header_is_copied_and_the_weights_are_zero(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "null.safetensors"
    report = null(tiny_checkpoint, out)
    assert header(out) == header(tiny_checkpoint)
    assert out.stat().st_size == tiny_checkpoint.stat().st_size == report.nbytes
    before, after = load_file(tiny_checkpoint), load_file(out)
    assert before.keys() == after.keys()
    assert (report.path, report.tensors) == (out, len(before))
    assert set(report.kept) == set(KEPT)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) if name in KEPT else not tensor.any(), name
    assert before[f"{VAE_ROOT}decoder.conv_in.weight"].any()
    assert [path.name for path in tmp_path.iterdir()] == ["null.safetensors"]


def test_original_minus_null_is_the_original(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Subtract as ComfyUI's ModelSubtract and CLIPSubtract do, which skip two kinds of tensors."""
    null(tiny_checkpoint, tmp_path / "null.safetensors")
    before, zero = load_file(tiny_checkpoint), load_file(tmp_path / "null.safetensors")
    difference = {
        name: tensor if name.endswith((".position_ids", ".logit_scale")) else tensor - zero[name]
        for name, tensor in before.items()
    }
    assert all(torch.equal(difference[name], tensor) for name, tensor in before.items())
    zero[f"{VAE_ROOT}quant_conv.bias"] += 0.01
    assert not torch.equal(
        before[f"{VAE_ROOT}quant_conv.bias"] - zero[f"{VAE_ROOT}quant_conv.bias"],
        before[f"{VAE_ROOT}quant_conv.bias"],
    )


def test_offsets_are_read_from_the_header(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Test tensors in another order, a header with spaces, and metadata of other programs."""
    entries = json.loads(header(tiny_checkpoint)[8:])
    entries["__metadata__"]["modelspec.title"] = "käse"
    text = json.dumps(dict(reversed(entries.items())), ensure_ascii=False).encode() + b"   "
    unusual = tmp_path / "unusual.safetensors"
    start = len(header(tiny_checkpoint))
    unusual.write_bytes(len(text).to_bytes(8, "little") + text + tiny_checkpoint.read_bytes()[start:])
    null(unusual, tmp_path / "null.safetensors")
    assert header(tmp_path / "null.safetensors") == header(unusual)
    original = load_file(unusual)
    for name, tensor in load_file(tmp_path / "null.safetensors").items():
        assert torch.equal(tensor, original[name]) == (name in KEPT), name


def test_a_failing_write_leaves_no_file(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        null(tiny_checkpoint, tmp_path / "null.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_existing_file(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "null.safetensors"
    out.write_bytes(b"precious")
    monkeypatch.setattr(null_module, "_copy", stop)
    with pytest.raises(KeyboardInterrupt):
        null(tiny_checkpoint, out, force=True)
    assert out.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [out]


def test_existing_files_and_the_original_are_not_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "null.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match=re.escape(f"{out} exists")):
        null(tiny_checkpoint, out)
    with pytest.raises(InputError, match="is one of the input files"):
        null(tiny_checkpoint, tiny_checkpoint, force=True)
    assert out.read_bytes() == b"precious"
    null(tiny_checkpoint, out, force=True)
    assert out.stat().st_size == tiny_checkpoint.stat().st_size


@pytest.mark.parametrize("role", [Role.RESIDUAL, Role.PRINCIPAL])
def test_other_roles_are_refused(tiny_checkpoint: Path, tmp_path: Path, role: Role) -> None:
    model = stamped(tiny_checkpoint, tmp_path / "model.safetensors", role=role)
    with pytest.raises(InputError) as caught:
        null(model, tmp_path / "null.safetensors")
    assert caught.value.what == (f"model.safetensors is a {role.value}: expected a complete model")
    assert caught.value.hint == "pass the original model"
    assert not (tmp_path / "null.safetensors").exists()


def test_a_model_of_spectune_keeps_its_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = stamped(tiny_checkpoint, tmp_path / "model.safetensors", role=Role.MODEL, prediction="flow")
    null(model, tmp_path / "null.safetensors")
    with open_checkpoint(tmp_path / "null.safetensors") as source:
        assert Provenance.from_metadata(source.metadata).prediction == "flow"


def test_sharded_checkpoints_and_adapters_are_refused(source: MemorySource, tmp_path: Path) -> None:
    shard, rest = {}, dict(source.values)
    for name in list(rest)[:5]:
        shard[name] = rest.pop(name)
    weight_map: dict[str, str] = {}
    for file, tensors in (("a.safetensors", shard), ("b.safetensors", rest)):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        with pytest.raises(InputError) as caught:
            null(path, tmp_path / "null.safetensors")
        assert "is stored in several files: expected a single .safetensors file" in caught.value.what
        assert caught.value.hint == "write a single file with `spectune convert` first"
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_out_2.lora_down.weight": torch.zeros(1, 4)}, lora)
    with pytest.raises(InputError, match=r"lora\.safetensors is not an SDXL checkpoint but an adapter"):
        null(lora, tmp_path / "null.safetensors")
