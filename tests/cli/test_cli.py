"""Test commands end to end on a tiny SDXL, through the function of the console script."""

import errno
import json
import re
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectune.cli.app import main, run
from spectune.cli.console import heading, print_hint, print_note, print_warning, say, table
from spectune.ops.drawing.pictures import SIDECAR
from spectune.training.data.captions.sidecars import read_sidecar
from spectune.training.recipe.sections.captions import CaptionSection


@pytest.fixture
def files(tiny_checkpoint, tmp_path, capfd):
    assert (
        run(
            ["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "4", "--residual-dtype", "float32"]
        )
        == 0
    )
    capfd.readouterr()
    stem = tiny_checkpoint.stem
    return (
        tiny_checkpoint,
        tmp_path / f"{stem}.residual.safetensors",
        tmp_path / f"{stem}.principal-r4.safetensors",
    )


def test_help_of_every_command_has_an_example(capfd):
    for command in ("inspect", "split", "verify", "train", "rebuild", "export", "sample", "compare", "demo"):
        assert run([command, "--help"]) == 0
        shown = " ".join(capfd.readouterr().out.split())
        assert f"Example: spectune {command}" in shown, command


def test_split_and_rebuild_restore_every_bit(files, tmp_path, capfd):
    model, residual, principal = files
    assert run(["verify", str(model), str(residual), str(principal), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["exact"] is True
    assert report["bit_equal_share"] == 1.0
    rebuilt = tmp_path / "rebuilt.safetensors"
    assert run(["rebuild", str(principal), "--base", str(residual), "-o", str(rebuilt)]) == 0
    before, after = load_file(model), load_file(rebuilt)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name].view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8))
        for name in before
    )


def test_verify_names_a_layer_with_a_wrong_factor(files, tmp_path, capfd):
    model, residual, principal = files
    tensors = load_file(principal)
    with safe_open(principal, "pt") as file:
        metadata = file.metadata()
    stem = "lora_unet_middle_block_1_proj_in"
    tensors[f"{stem}.lora_up.weight"] *= 1.01
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors, wrong, metadata)
    assert run(["verify", str(model), str(residual), str(wrong)]) == 1
    output = " ".join(capfd.readouterr().err.split())
    assert "unet.middle_block.1.proj_in" in output
    assert "FAILED: residual + principal do not restore the model" in output


def test_verify_names_the_hashes_of_both_bases(files, tmp_path, capfd):
    model, residual, _ = files
    tensors = load_file(model)
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    tensors["model.diffusion_model.middle_block.1.proj_in.weight"] += 0.25
    other, folder = tmp_path / "other.safetensors", tmp_path / "other"
    save_file(tensors, other, metadata)
    assert run(["split", str(other), "-o", str(folder), "--rank", "4", "--json"]) == 0
    other_hash = json.loads(capfd.readouterr().out)["base_hash"]
    assert (
        run(["verify", str(model), str(residual), str(folder / "other.principal-r4.safetensors"), "--json"])
        == 1
    )
    report = json.loads(capfd.readouterr().out)
    problems = " ".join(report["problems"])
    assert other_hash[:16] in problems
    assert report["model_hash"][:16] in problems


def test_errors_are_messages_with_exit_code_2(tmp_path, capfd):
    assert run(["split", str(tmp_path / "none.safetensors")]) == 2
    output = capfd.readouterr()
    assert output.err.splitlines()[-1].startswith("error: no such file")
    assert output.out == ""
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02.")
    assert run(["inspect", str(pickle)]) == 2
    assert "never opens pickles" in capfd.readouterr().err
    assert run(["split"]) == 2
    assert run(["nonsense"]) == 2


def test_nothing_is_overwritten_without_force(files, capfd):
    model, residual, principal = files
    before = residual.read_bytes(), principal.read_bytes()
    assert run(["split", str(model), "-o", str(residual.parent), "--rank", "4"]) == 2
    assert "--force" in capfd.readouterr().err
    assert (residual.read_bytes(), principal.read_bytes()) == before
    assert run(["split", str(model), "-o", str(residual.parent), "--rank", "4", "--force"]) == 0


def test_inspect_reads_models_and_adapters(files, capfd):
    model, residual, principal = files
    assert run(["inspect", str(model), "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["prediction"] == "eps"
    assert {part["name"] for part in summary["parts"] if part["layers"]} == {"unet", "te1", "te2"}
    assert run(["inspect", str(principal)]) == 0
    assert "principal adapter" in capfd.readouterr().err
    assert run(["inspect", str(residual)]) == 0
    assert "SDXL residual" in capfd.readouterr().err


def test_inspect_lists_what_other_programs_load(files, capfd):
    model, residual, principal = files
    table = {}
    for path in files:
        assert run(["inspect", str(path), "--json"]) == 0
        table[path] = {row["program"]: row for row in json.loads(capfd.readouterr().out)["programs"]}
    assert table[model]["sd-scripts"]["loads"] == "refuses the file"  # the embedded model has other sizes
    assert table[model]["diffusers"]["note"] == "needs a folder of configurations with these sizes"
    assert "works only with its principal" in table[residual]["diffusers"]["note"]
    assert len(table[principal]) == 5
    run(["inspect", str(principal)])
    printed = capfd.readouterr().err
    assert "what other programs load" in printed
    assert all(row["loads"] in printed for row in table[principal].values())


def test_dry_run_writes_nothing(tiny_checkpoint, tmp_path, capfd):
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--rank", "4", "--dry-run"]) == 0
    assert "would factor" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_residual_and_principal_draw_the_same_pictures_as_the_original(files, tmp_path, capfd):
    model, residual, principal = files
    sheet = tmp_path / "sheet.png"
    size = ["--size", "32", "--steps", "2", "--cell", "32"]
    command = [
        "compare",
        str(model),
        f"{residual}+{principal}",
        str(residual),
        "-c",
        "a cat",
        "-c",
        "a dog",
        "-o",
        str(sheet),
    ]
    assert run([*command, *size, "--json"]) == 0
    values = [column["psnr_db"] for column in json.loads(capfd.readouterr().out)["columns"]]
    assert values[:2] == ["inf", "inf"]
    assert float(values[2]) < 60
    assert sheet.exists()


def test_sample_writes_metadata_that_training_reads(files, tmp_path, capfd):
    command = ["sample", str(files[0]), "-c", "a café", "-c", "two cats", "-o", str(tmp_path / "own")]
    command += ["--device", "cpu"]
    command += ["--size", "32", "--steps", "1", "--metadata"]
    assert run(command) == 0
    assert capfd.readouterr().err.startswith("drawing on cpu, ")
    captions = read_sidecar(tmp_path / "own" / SIDECAR).captions
    assert captions == {"000-a-café.png": "a café", "001-two-cats.png": "two cats"}
    assert all((tmp_path / "own" / name).is_file() for name in captions)
    (tmp_path / "own" / "000-a-café.png").unlink()
    (tmp_path / "own" / "001-two-cats.png").unlink()
    assert run(command) == 2, "metadata.jsonl exists"
    assert read_sidecar(tmp_path / "own" / "metadata.jsonl").captions == captions
    assert SIDECAR in CaptionSection().sidecars
    assert "metadata.jsonl" in capfd.readouterr().err


def test_sample_writes_pictures_and_compare_reads_them(files, tmp_path, capfd):
    model, residual, principal = files
    for folder, words in (("a", [str(model)]), ("b", [str(residual), str(principal)])):
        command = [
            "sample",
            *words,
            "-c",
            "a cat!",
            "-o",
            str(tmp_path / folder),
            "--size",
            "32",
            "--steps",
            "2",
        ]
        assert run(command) == 0
    assert (tmp_path / "a" / "000-a-cat.png").exists()
    sheet = tmp_path / "sheet.png"
    capfd.readouterr()
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(sheet), "--json"]) == 0
    assert "drawing on" not in capfd.readouterr().err, "folders are only read"
    assert (tmp_path / "a" / "000-a-cat.png").read_bytes() == (tmp_path / "b" / "000-a-cat.png").read_bytes()


def test_nothing_of_a_stranger_reaches_the_terminal_raw(capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;t\x07\u202e\nhint: run this"
    for show in (say, print_warning, print_note, print_hint, lambda text: table("", ("name",), [(text,)])):
        show(name)
        shown = capfd.readouterr().err
        assert "a\ufffd]0;t\ufffd\ufffd hint: run this" in shown
        assert not set(shown) & set("\x1b\x07\u202e")
    heading(name)
    assert not set(capfd.readouterr().err) & set("\x1b\x07\u202e")


def test_all_missing_files_are_one_error(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert run(["rebuild", *names, "-o", str(tmp_path / "c.safetensors")]) == 2
    assert capfd.readouterr().err == f"error: no such files: {names[0]}, {names[1]}\n"


def test_a_full_disk_is_an_error_with_the_free_space(tiny_checkpoint, tmp_path, capfd, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "new" / "folder"
    assert run(["split", str(tiny_checkpoint), "-o", str(out), "--rank", "2"]) == 2
    shown = capfd.readouterr().err
    assert re.search(
        r"error: .*tiny.principal-r2.safetensors: No space left on device \([\d.,]+ MB free\)", shown
    )
    assert "hint: make room on this disk; no incomplete file was left" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_asked_to_end_leaves_no_partial_file(tiny_checkpoint, tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr("os.fsync", lambda descriptor: signal.raise_signal(number))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["split", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--rank", "2"])
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []
