from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import LowRank
from spectune.errors import InputError
from spectune.files.weights_hash import weights_hash
from spectune.ops.split import SplitReport
from spectune.ops.verify import verify
from spectune.pairs.round_trip import compare_pair
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

RESIDUALS = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = ("unet.input_blocks.1.0.in_layers.2", "te1.text_model.encoder.layers.0.mlp.fc1")


def pair(base: Path, folder: Path, dtype: torch.dtype) -> tuple[SplitReport, Path]:
    return with_residual(small_split(base, folder, residual_dtype=dtype))


def with_residual(report: SplitReport) -> tuple[SplitReport, Path]:
    assert report.residual is not None
    return report, report.residual


@pytest.mark.parametrize("model", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_matching_pair_passes_in_every_dtype(
    tiny_checkpoint: Path, tmp_path: Path, model: torch.dtype, residual: torch.dtype
) -> None:
    base = recast(tiny_checkpoint, tmp_path / "base.safetensors", model)
    report, rest = pair(base, tmp_path, residual)
    steps: list[tuple[int, int, str]] = []
    verified = verify(base, rest, report.principal, progress=lambda *step: steps.append(step))
    assert verified.problems == ()
    assert verified.ok
    assert (verified.hashes.model, verified.hashes.principal) == (report.base_hash, report.principal_hash)
    if residual == torch.float32:
        assert verified.share > 0.9999 or model == torch.float32
        assert verified.exact or model != torch.float16
    else:
        assert not verified.exact
    assert max(record.excess for record in verified.records) <= 1
    assert steps[-1] == (len(verified.records), len(verified.records), "")
    with open_checkpoint(base) as source:
        assert len(verified.records) == len(source.tensors)


@pytest.mark.parametrize("dtype", RESIDUALS)
@pytest.mark.parametrize("layer", [*LAYERS, "te2.text_model.encoder.layers.1.self_attn.k_proj"])
def test_a_factor_off_by_one_percent_is_detected_and_named(
    tiny_checkpoint: Path, tiny_split: TinySplit, dtype: torch.dtype, layer: str
) -> None:
    report, rest = with_residual(tiny_split(dtype))
    principal = open_principal(tiny_checkpoint, report.principal)
    layers = {name: principal.layers[name] for name in principal.layers}
    factors = layers[layer]
    layers[layer] = LowRank(down=factors.down, up=(factors.up.float() * 1.01).half(), alpha=factors.alpha)
    with open_checkpoint(tiny_checkpoint) as model, open_checkpoint(rest) as residual:
        verified = compare_pair(model, residual, replace(principal, layers=layers))
    assert not verified.ok
    assert verified.wrong_layers == (layer,)
    numbers = [problem for problem in verified.problems if "rounding explains" in problem]
    assert len(numbers) == 1
    assert numbers[0].startswith(f"in 1 of {len(layers)} factored layers the error is larger")
    assert numbers[0].endswith(layer)
    # the hashes differ too, and the message has both
    assert report.principal_hash[:16] in verified.problems[0]
    assert verified.hashes.principal[:16] in verified.problems[0]


@pytest.mark.parametrize("dtype", RESIDUALS)
def test_files_of_two_bases_are_detected_and_both_hashes_named(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = load_file(tiny_checkpoint)
    changed = {name: t * 1.5 for name, t in tensors.items() if name.endswith("to_q.weight")}
    other = changed_copy(tiny_checkpoint, tmp_path / "other.safetensors", changed)
    first, rest = with_residual(tiny_split(dtype))
    second, _ = pair(other, tmp_path, dtype)
    verified = verify(tiny_checkpoint, rest, second.principal)
    assert not verified.ok
    text = "\n".join(verified.problems)
    for digest in (first.base_hash, second.base_hash, first.principal_hash, second.principal_hash):
        assert digest[:16] in text
    assert "tiny.residual.safetensors was made from base" in text
    assert {name.rsplit(".", 1)[1] for name in verified.wrong_layers} == {"to_q"}


def test_another_model_is_detected(tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path) -> None:
    report, rest = with_residual(tiny_split(torch.float16))
    name = "model.diffusion_model.out.0.bias"
    other = changed_copy(
        tiny_checkpoint, tmp_path / "other.safetensors", {name: load_file(tiny_checkpoint)[name] + 1}
    )
    with open_checkpoint(other) as source:
        digest = weights_hash(source)
    problems = verify(other, rest, report.principal).problems
    assert f"{digest[:16]}" in problems[0]
    assert f"{report.base_hash[:16]}" in problems[0]
    assert problems[-1] == f"1 tensor outside the factored layers that changed: {name}"


def test_files_without_metadata_are_compared_by_their_values(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report, rest = with_residual(tiny_split(torch.float16))
    bare_rest, bare_principal = tmp_path / "r.safetensors", tmp_path / "p.safetensors"
    save_file(load_file(rest), bare_rest)
    save_file(load_file(report.principal), bare_principal)
    assert verify(tiny_checkpoint, bare_rest, bare_principal).problems == ()
    name = next(name for name in load_file(rest) if name.endswith("fc1.weight"))
    tensor = load_file(rest)[name]
    tensor.view(-1)[3] += 0.01
    save_file(load_file(rest) | {name: tensor}, bare_rest)
    verified = verify(tiny_checkpoint, bare_rest, bare_principal)
    assert [record.name for record in verified.records if record.wrong_layers] == [name]


def test_missing_surplus_and_misshapen_tensors_are_listed(
    tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path
) -> None:
    report, rest = with_residual(tiny_split(torch.float16))
    tensors = load_file(rest)
    gone = "first_stage_model.decoder.conv_in.bias"
    short = "first_stage_model.decoder.conv_out.bias"
    del tensors[gone]
    tensors[short] = tensors[short][:1].clone()
    tensors["extra"] = torch.ones(1)
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged, metadata=read_metadata(rest))
    problems = "\n".join(verify(tiny_checkpoint, damaged, report.principal).problems)
    assert f"1 tensor of tiny.safetensors missing in damaged.safetensors: {gone}" in problems
    assert "1 tensor of damaged.safetensors not in tiny.safetensors: extra" in problems
    assert f"with a different shape or dtype in tiny.safetensors: {short}" in problems


def test_a_tuned_adapter_is_refused(tiny_checkpoint: Path, tiny_split: TinySplit, tmp_path: Path) -> None:
    report, rest = with_residual(tiny_split(torch.float16))
    tuned = saved_tuned(tuned_from(tiny_checkpoint, report, size=0.1), tmp_path / "tuned.safetensors")
    with pytest.raises(InputError, match=r"tuned\.safetensors is a tuned adapter: expected a principal"):
        verify(tiny_checkpoint, rest, tuned)
