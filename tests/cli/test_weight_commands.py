"""Test split, verify, null and rebuild through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectune.cli.app import run
from spectune.core.rank import BudgetRank, EnergyRank, FixedRank
from spectune.errors import InputError
from spectune.files.dtypes import parse_residual_dtype
from spectune.model import device
from spectune.model.device import parse_device
from spectune.ops.options.model_files import SplitOptions
from spectune.pairs.rank_plan import rank_request
from tests.sample_pairs import recast


def test_only_one_option_may_set_the_ranks() -> None:
    assert rank_request(None, None, None, None) == FixedRank(64)
    assert rank_request(32, 8, None, None) == FixedRank(32, 8)
    assert rank_request(None, None, 0.9, None) == EnergyRank(0.9)
    assert rank_request(None, None, None, "600MB") == BudgetRank(600_000_000)
    with pytest.raises(InputError, match="`rank` and `energy` exclude each other"):
        SplitOptions(Path("m"), rank=8, energy=0.9)
    with pytest.raises(InputError, match="`conv_rank` and `budget` exclude each other"):
        SplitOptions(Path("m"), conv_rank=8, budget="1MB")


def test_messages_name_fields_in_python_and_flags_on_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--conv-rank", "8", "--budget", "1MB", "-o", str(tmp_path)]
    assert run(["split", str(tiny_checkpoint), *words]) == 2
    shown = capfd.readouterr().err
    assert "error: --conv-rank and --budget exclude each other" in shown
    assert "hint: leave out --conv-rank" in shown


def test_split_names_the_device_and_warns_of_an_unused_card(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device.shutil, "which", lambda name: "nvidia-smi")
    words = ["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "2", "--no-residual", "--force"]
    assert run(words) == 0
    first, second, *_ = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"splitting on cpu, .* GB free, torch {re.escape(torch.__version__)}", first)
    assert second.startswith("warning: ")
    assert "cannot use the NVIDIA card of this machine" in second
    assert run([*words, "--device", "cpu"]) == 0  # the CPU was requested
    assert "warning: " not in capfd.readouterr().err


def test_missing_devices_are_refused() -> None:
    assert parse_device("cpu") == "cpu"
    assert parse_residual_dtype("fp64") == torch.float64
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        parse_device("gpu")
    with pytest.raises(InputError, match="no device cuda:99"):
        parse_device("cuda:99")


@pytest.mark.parametrize(
    ("model", "residual"),
    [
        (torch.float16, "float32"),
        (torch.bfloat16, "float32"),
        (torch.float32, "float64"),
        (torch.float8_e4m3fn, "float32"),
    ],
)
@pytest.mark.slow
def test_a_wider_residual_is_exact_for_every_dtype(
    tiny_checkpoint: Path,
    tmp_path: Path,
    model: torch.dtype,
    residual: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = recast(tiny_checkpoint, tmp_path / "m.safetensors", model)
    out = ["-o", str(tmp_path), "--rank", "4"]
    assert run(["split", str(base), *out, "--residual-dtype", residual, "--json"]) == 0
    split = json.loads(capfd.readouterr().out)
    assert split["bit_equal_share"] == 1.0
    assert run(["verify", str(base), split["residual"], split["principal"], "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["ok"], report["exact"]) == (True, True)
    assert report["rebuilt_hash"] == report["model_hash"] == split["base_hash"]
    rebuilt = tmp_path / "rebuilt.safetensors"
    assert run(["rebuild", split["principal"], "--base", split["residual"], "-o", str(rebuilt)]) == 0
    before, after = load_file(base), load_file(rebuilt)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(tensor.view(bits), after[name].view(bits)), name


def test_the_share_of_a_16_bit_residual_equals_an_independent_count(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "4", "--json"]) == 0
    split = json.loads(capfd.readouterr().out)
    assert run(["verify", str(tiny_checkpoint), split["residual"], split["principal"], "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    model, residual, principal = (
        load_file(path) for path in (tiny_checkpoint, split["residual"], split["principal"])
    )
    # Independent of spectune: numpy and key names only, for UNet layers that are not fused.
    equal = total = 0
    for name, weight in model.items():
        stem = "lora_unet_" + name.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(
            ".", "_"
        )
        if not name.startswith("model.diffusion_model.") or f"{stem}.alpha" not in principal:
            continue
        up, down = principal[f"{stem}.lora_up.weight"], principal[f"{stem}.lora_down.weight"]
        product = (up.flatten(1).double().numpy() @ down.flatten(1).double().numpy()).astype("float32")
        again = (residual[name].flatten(1).float().numpy() + product).astype("float16")
        same = again.view("int16") == weight.flatten(1).numpy().view("int16")
        total += same.size
        equal += int(same.sum())
        stated = report["inexact"].get(name, {"bit_equal": same.size})
        # spectune sums in float32; the order depends on the processor, so a few ties may round differently
        assert stated["bit_equal"] == pytest.approx(int(same.sum()), abs=1 + 1e-4 * same.size), name
    assert 0.5 < equal / total < 1
    assert split["bit_equal_share"] == pytest.approx(equal / total, abs=0.05)


def test_verify_lists_what_other_programs_load(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "2"]) == 0
    pair = [str(tmp_path / name) for name in ("tiny.residual.safetensors", "tiny.principal-r2.safetensors")]
    capfd.readouterr()
    assert run(["verify", str(tiny_checkpoint), *pair]) == 0
    output = capfd.readouterr().err
    for word in (
        "what other programs load from tiny.principal-r2.safetensors",
        "ComfyUI",
        "sd-scripts",
        "sha256",
        "OK: residual + principal restore the model up to rounding",
    ):
        assert word in output


def test_null_keeps_the_header_and_writes_zeros(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "null.safetensors"
    assert run(["null", str(tiny_checkpoint), "-o", str(out)]) == 0
    original, null = tiny_checkpoint.read_bytes(), out.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    assert len(null) == len(original)
    assert null[:header] == original[:header]
    kept = (".position_ids", ".logit_scale")
    assert all(not tensor.any() for name, tensor in load_file(out).items() if not name.endswith(kept))
    assert run(["null", str(tiny_checkpoint), "-o", str(out)]) == 2


def test_a_model_survives_a_diffusers_folder_and_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert (
        run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "2", "--residual-dtype", "fp32"])
        == 0
    )
    residual, principal = (
        str(tmp_path / name) for name in ("tiny.residual.safetensors", "tiny.principal-r2.safetensors")
    )
    folder = tmp_path / "pipeline"
    assert run(["rebuild", principal, "--base", residual, "-o", str(folder)]) == 0
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    again = tmp_path / "again"
    assert run(["split", str(folder), "-o", str(again), "--rank", "2", "--residual-dtype", "fp32"]) == 0
    pair = [str(again / f"pipeline.{part}.safetensors") for part in ("residual", "principal-r2")]
    assert run(["verify", str(tiny_checkpoint), *pair]) == 0
    index = tmp_path / "shards.safetensors.index.json"
    assert run(["rebuild", pair[1], "--base", pair[0], "-o", str(index)]) == 0
    assert run(["verify", str(index), *pair]) == 0


def test_split_names_and_counts_damaged_weights(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.sample_pairs import changed_copy

    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    broken = load_file(tiny_checkpoint)[name].clone()
    broken.view(-1)[:3] = float("nan")
    base = changed_copy(tiny_checkpoint, tmp_path / "m.safetensors", {name: broken})
    assert run(["split", str(base), "-o", str(tmp_path / "out")]) == 2
    output = " ".join(capfd.readouterr().err.split())
    assert "unet.middle_block.0.in_layers.2: 3 of" in output
    assert "values are NaN or infinite" in output
    assert not (tmp_path / "out").exists()
