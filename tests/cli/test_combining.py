"""Test slice, convert, export and rebuild through the command line: output, files and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.sdxl.layers import Catalogue, build_catalogue
from tests.loras import distance, products, same_tensors, saved_lora
from tests.sample_pairs import changed_copy, saved_tuned, tuned_from

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def catalogue(tiny_checkpoint: Path) -> Catalogue:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_catalogue(source)


@pytest.fixture
def lora(catalogue: Catalogue, tmp_path: Path) -> Path:
    return saved_lora(tmp_path / "style.safetensors", catalogue, rank=4)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tuned adapter of rank 4 for the middle block of the UNet and the text encoders."""
    folder = tmp_path_factory.mktemp("tuned")
    report = split(tiny_checkpoint, folder, rank=4, with_residual=False)
    deltas = tuned_from(tiny_checkpoint, report, size=0.05)
    some = {name: one for name, one in deltas.layers.items() if name.startswith(("unet.middle", "te"))}
    return saved_tuned(type(deltas)(some, deltas.metadata, deltas.label), folder / "tuned.safetensors")


@pytest.fixture(scope="module")
def tuned_model(tuned: Path, tiny_checkpoint: Path) -> Path:
    out = tuned.with_name("model.safetensors")
    return rebuild(tiny_checkpoint, tuned, out, dtype=torch.float32).path


def stderr_words(capfd: Capture) -> str:
    """Return stderr without line breaks and table rules, and check that stdout is empty."""
    captured = capfd.readouterr()
    assert captured.out == ""
    return " ".join(re.sub("[\u2500-\u257f]", " ", captured.err).split())


def stdout_json(capfd: Capture) -> dict[str, object]:
    return json.loads(capfd.readouterr().out)


def test_slice_prints_kept_and_removed_layers(
    lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture, catalogue: Catalogue
) -> None:
    out = tmp_path / "te.safetensors"
    assert run(["slice", f"{lora}:te", "--base", str(tiny_checkpoint), "-o", str(out)]) == 0
    text = stderr_words(capfd)
    unet = sum(layer.part.value == "unet" for layer in catalogue)
    assert "style.safetensors:te kept 24 layers (12 te1, 12 te2)" in text
    assert f"removed {unet} layers ({unet} unet): unet.input_blocks.1.0.in_layers.2, " in text
    assert f"({unet - 3} more)" in text
    assert "no factor was rounded" in text
    kept = {key: t for key, t in load_file(lora).items() if key.startswith("lora_te")}
    assert same_tensors(load_file(out), kept)


def test_slice_prints_summed_layers(
    lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture, catalogue: Catalogue
) -> None:
    out = tmp_path / "sum.safetensors"
    words = [f"{lora}:te1", f"{lora}:te1.0+mid:0.7"]
    assert run(["slice", *words, "--base", str(tiny_checkpoint), "-o", str(out)]) == 0
    text = stderr_words(capfd)
    assert "6 layers are the sum of several slices: te1.text_model.encoder.layers.0.self_attn.q_proj" in text
    assert "style.safetensors:te1.0+mid x 0.7 kept" in text
    found, exact = products(out), products(lora)
    for layer in catalogue:
        weight = (layer.part.value == "te1") + 0.7 * (layer.block in ("te1.0", "mid"))
        assert (layer.kohya in found) == bool(weight)
        assert not weight or distance(found[layer.kohya], weight * exact[layer.kohya]) < 2e-7


def test_slice_prints_json(lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "te.safetensors"
    command = ["slice", f"{lora}:te2:0.5", "--base", str(tiny_checkpoint), "-o", str(out), "--json"]
    assert run(command) == 0
    record = stdout_json(capfd)
    assert (record["path"], record["role"], record["overlaps"]) == (str(out), "lora", [])
    (piece,) = record["slices"]  # type: ignore[misc]
    assert piece["slice"] == {"path": str(lora), "trait": "te2", "weight": 0.5}
    assert (len(piece["kept"]), len(record["layers"])) == (12, 12)  # type: ignore[arg-type]


def test_slice_reads_a_traits_file(lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture) -> None:
    traits = tmp_path / "blora_traits.json"
    traits.write_text(json.dumps({"faces": {"whitelist": ["lora_te1_"], "blacklist": ["_layers_0_"]}}))
    command = ["slice", f"{lora}:faces", "--base", str(tiny_checkpoint), "--traits", str(traits)]
    assert run([*command, "-o", str(tmp_path / "x.safetensors")]) == 0
    assert "kept 6 layers (6 te1)" in stderr_words(capfd)
    traits.write_text("{")
    assert run([*command, "-o", str(tmp_path / "y.safetensors")]) == 2
    assert f"cannot read traits from {traits}: Expecting property name" in stderr_words(capfd)


def test_slice_copies_trained_deltas_unchanged(
    tuned: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "te.safetensors"
    assert run(["slice", f"{tuned}:te", "--base", str(tiny_checkpoint), "-o", str(out)]) == 0
    assert "the trained deltas were copied unchanged; use the file with rebuild or export" in stderr_words(
        capfd
    )
    kept = {key: t for key, t in load_file(tuned).items() if key.startswith("lora_te")}
    assert same_tensors(load_file(out), kept)


def test_checkpoints_are_sliced_part_by_part(tiny_checkpoint: Path, tmp_path: Path, capfd: Capture) -> None:
    tensors = {n: t + 1 if t.is_floating_point() else t for n, t in load_file(tiny_checkpoint).items()}
    other = changed_copy(tiny_checkpoint, tmp_path / "other.safetensors", tensors)
    out = tmp_path / "x.safetensors"
    words = [f"{other}:unet", f"{tiny_checkpoint}:te", f"{other}:vae"]
    assert run(["slice", *words, "-o", str(out)]) == 0
    text = stderr_words(capfd)
    for part, name in (("unet", "other"), ("te1", "tiny"), ("te2", "tiny"), ("vae", "other")):
        assert f"{part} from {name}.safetensors" in text
    encoders = {n: t for n, t in load_file(tiny_checkpoint).items() if n.startswith("conditioner.")}
    assert same_tensors(load_file(out), tensors | encoders)


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["{lora}:tee"], "no layer matches `tee`; did you mean `te`?", "select layers by `default`"),
        (["style"], "cannot parse slice 'style'", "for example style.safetensors:te"),
        (["{lora}:te:much"], "is 'much': expected a number like 0.8", ""),
        (
            ["{lora}:te1", "{lora}:te", "--no-overlap"],
            "12 layers are in more than one slice",
            "traits that do not overlap",
        ),
        (
            ["{lora}:te", "--keys", "khoya"],
            "unknown --keys 'khoya': expected one of kohya, diffusers, comfyui; did you mean `kohya`?",
            "",
        ),
        (
            ["{lora}:te", "--dtype", "fp8"],
            "unknown --dtype 'float8_e4m3fn': expected one of float16, bfloat16, float32",
            "",
        ),
        (["{model}:unet"], "no file is named for te1 and te2 and vae", "tiny.safetensors:te1"),
        (
            ["{model}:unet", "{lora}:te"],
            "tiny.safetensors is a checkpoint and style.safetensors is an adapter: expected",
            "to merge an adapter into a checkpoint, use `spectune rebuild`",
        ),
        (["{lora}.gone.safetensors:te"], "style.safetensors.gone.safetensors", ""),
    ],
)
def test_refused_slices_leave_no_file(
    words: list[str], what: str, hint: str, lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    arguments = [word.format(lora=lora, model=tiny_checkpoint) for word in words]
    base = [] if "{model}:unet" in words[:1] and len(words) == 1 else ["--base", str(tiny_checkpoint)]
    assert run(["slice", *arguments, *base, "-o", str(tmp_path / "out" / "x.safetensors")]) == 2
    text = stderr_words(capfd)
    assert what in text
    assert text.startswith("error: ")
    assert not hint or hint in text.partition("hint: ")[2]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


COMMANDS = {
    "slice": ["slice", "{lora}:te"],
    "convert": ["convert", "{lora}"],
    "export": ["export", "{tuned}"],
    "export of a checkpoint": ["export", "{tuned_model}"],
    "rebuild": ["rebuild", "{tuned}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_is_overwritten_without_force(
    name: str,
    lora: Path,
    tuned: Path,
    tuned_model: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: Capture,
) -> None:
    out = tmp_path / "mine.safetensors"
    out.write_bytes(b"mine")
    files = {"lora": lora, "tuned": tuned, "tuned_model": tuned_model}
    command = [word.format(**files) for word in COMMANDS[name]]
    command += ["--base", str(tiny_checkpoint), "-o", str(out)]
    assert run(command) == 2
    assert "exists" in stderr_words(capfd)
    assert out.read_bytes() == b"mine"
    assert run([*command, "--force"]) == 0
    capfd.readouterr()
    with open_checkpoint(out) as source:
        assert source.tensors
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []


def test_convert_prints_rounded_layers(
    catalogue: Catalogue, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    lora = saved_lora(tmp_path / "a.safetensors", catalogue, alpha=1.0)
    base, count = ["--base", str(tiny_checkpoint)], len(catalogue)
    assert run(["convert", str(lora), "--keys", "comfyui", *base, "-o", str(tmp_path / "b.safetensors")]) == 0
    assert f"{count} layers or tensors, none was rounded" in stderr_words(capfd)
    out = tmp_path / "c.safetensors"
    assert run(["convert", str(lora), "--keys", "peft", "--dtype", "bf16", *base, "-o", str(out)]) == 0
    assert f"{count} of {count} layers were rounded: relative error 0." in stderr_words(capfd)
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in load_file(out))
    again = ["convert", str(out), *base, "-o", str(tmp_path / "d.safetensors"), "--json"]
    assert run(again) == 0
    record = stdout_json(capfd)
    assert (record["count"], record["error"], record["dropped"]) == (count, 0.0, [])


def test_convert_drops_only_named_keys(
    lora: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    stem = "lora_unet_middle_block_1_proj_in"
    save_file(load_file(lora) | {f"{stem}.diff_b": torch.zeros(32)}, lora)
    out = tmp_path / "x.safetensors"
    command = ["convert", str(lora), "--base", str(tiny_checkpoint), "-o", str(out)]
    assert run([*command, "--keys", "diffusers"]) == 2
    assert "its tensors are copied, so --keys cannot apply" in stderr_words(capfd)
    assert run([*command, "--drop", "*.dora_scale"]) == 2
    assert "--drop '*.dora_scale' matches none of the" in stderr_words(capfd)
    assert not out.exists()
    assert run([*command, "--drop", "*.diff_b"]) == 0
    assert f"1 keys were dropped: {stem}.diff_b" in stderr_words(capfd)


def test_convert_refuses_adapter_options_for_checkpoints(
    tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "x.safetensors"
    for options in (["--keys", "diffusers"], ["--dtype", "fp16"], ["--even-alphas"], ["--drop", "*"]):
        assert run(["convert", str(tiny_checkpoint), *options, "-o", str(out)]) == 2
        assert "tiny.safetensors is a checkpoint: only its file layout can be converted" in stderr_words(
            capfd
        )
    assert not out.exists()
    assert run(["convert", str(tiny_checkpoint), "-o", str(out)]) == 0
    assert f"{len(load_file(out))} layers or tensors, none was rounded" in stderr_words(capfd)


def test_export_of_a_checkpoint_prints_a_table_of_parts(
    tuned_model: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture, catalogue: Catalogue
) -> None:
    out = tmp_path / "lora.safetensors"
    command = ["export", str(tuned_model), "--base", str(tiny_checkpoint), "--rank", "8", "-o", str(out)]
    assert run(command) == 0
    text = stderr_words(capfd)
    middle = sum(layer.block == "mid" for layer in catalogue)
    unet = sum(layer.part.value == "unet" for layer in catalogue)
    assert "part layers rank truncated relative error" in text
    assert f"unet {middle} 8" in text
    assert "te1 12 8" in text
    assert f"{unet - middle} layers are left out: they did not change" in text
    assert "model.safetensors predicts flow, tiny.safetensors predicts eps" in text
    assert "changed tensors do not fit into a LoRA" not in text
    assert run([*command, "--force", "--json"]) == 0
    record = stdout_json(capfd)
    assert record["layers"] == len(products(out)) == middle + 24
    assert (len(record["unchanged"]), record["outside_share"]) == (unet - middle, 0)  # type: ignore[arg-type]
    assert set(record["parts"]) == {"unet", "te1", "te2"}  # type: ignore[call-overload]


def test_export_of_a_checkpoint_requires_a_base_and_no_form(
    tuned_model: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    out, base = ["-o", str(tmp_path / "x.safetensors")], ["--base", str(tiny_checkpoint)]
    assert run(["export", str(tuned_model), *out]) == 2
    text = stderr_words(capfd)
    assert "model.safetensors is a checkpoint: its LoRA is the difference from another checkpoint" in text
    assert "hint: pass the model it was made from as MODEL" in text
    assert run(["export", str(tuned_model), *base, "--form", "principal", *out]) == 2
    assert "is a checkpoint: only a plain LoRA can be exported" in stderr_words(capfd)
    assert run(["export", str(tuned_model), *base, "--form", "residual", *out]) == 2
    assert "unknown --form 'residual'" in stderr_words(capfd)
    assert run(["export", str(tuned_model), *base, "--rank", "4", "--size", "1MB", *out]) == 2
    assert "--rank and --size exclude each other" in stderr_words(capfd)
    assert list(tmp_path.iterdir()) == []


def test_export_of_an_adapter_refuses_layers(
    tuned: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    command = ["export", str(tuned), "--base", str(tiny_checkpoint), "-o", str(tmp_path / "x.safetensors")]
    assert run([*command, "--layers", "te1"]) == 2
    assert "hint: select layers of an adapter with `spectune slice`" in stderr_words(capfd)
    assert run([*command, "--keys", "comfyui", "--rank", "2"]) == 0
    capfd.readouterr()
    assert all(
        key.startswith(("diffusion_model.", "text_encoders."))
        for key in load_file(tmp_path / "x.safetensors")
    )


def test_rebuild_prints_covered_layers_and_changed_tensors(
    tuned: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture, catalogue: Catalogue
) -> None:
    out = tmp_path / "x.safetensors"
    command = ["rebuild", str(tuned), "--base", str(tiny_checkpoint), "-o", str(out)]
    assert run([*command, "--strength", "te=0,unet=0.5"]) == 0
    text = stderr_words(capfd)
    middle = sum(layer.block == "mid" for layer in catalogue)
    unet = sum(layer.part.value == "unet" for layer in catalogue)
    assert f"the adapter covers {middle} of {unet} unet layers; the others are unchanged" in text
    assert f"{middle} of {len(load_file(out))} tensors were changed by the adapter" in text
    assert "bit-identical to the original" not in text
    before, after = load_file(tiny_checkpoint), load_file(out)
    encoders = [name for name in before if name.startswith("conditioner.")]
    assert same_tensors({n: before[n] for n in encoders}, {n: after[n] for n in encoders})
    assert run([*command, "--force", "--strength", "0", "--json"]) == 0
    assert (stdout_json(capfd)["identical"], out.stat().st_size > 0) == (True, True)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--strength", "strong"], "unreadable strength 'strong'"),
        (["--strength", "unett=1"], "unknown part 'unett'; did you mean `unet`?"),
        (["--strength", "unet=nan"], "the strength of unet is nan: expected a finite number"),
        (["--dtype", "fp4"], "unknown --dtype 'fp4'"),
        (["--cast-all"], "--cast-all requires --dtype"),
    ],
)
def test_wrong_options_of_rebuild_leave_no_file(
    options: list[str], what: str, tuned: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: Capture
) -> None:
    command = ["rebuild", str(tuned), "--base", str(tiny_checkpoint), "-o", str(tmp_path / "x.safetensors")]
    assert run([*command, *options]) == 2
    assert what in stderr_words(capfd)
    assert list(tmp_path.iterdir()) == []
