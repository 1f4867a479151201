"""Test the errors about too little memory, with torch's errors simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spectune
from spectune.cli.app import run
from spectune.errors import SpectuneError
from spectune.model.memory_errors import MAIN_REMEDIES, explained_memory_errors
from spectune.ops import split as split_module
from spectune.ops.drawing import models
from spectune.training import loop

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 11.76 GiB\nProcess 1"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            CUDA,
            "the GPU ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 11.76 GiB",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
            "the GPU ran out of memory: MPS backend out of memory (MPS allocated: 5 GB)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "main memory is full: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
        ),
    ],
)
def test_the_first_line_of_the_error_and_the_remedies_are_named(error: RuntimeError, message: str) -> None:
    with pytest.raises(SpectuneError) as caught, explained_memory_errors(lambda: ("a", "b")):
        raise error
    assert caught.value.what == message
    remedies = (*MAIN_REMEDIES, "a", "b") if message.startswith("main") else ("a", "b")
    assert caught.value.hint == f"what helps, the cheapest first: {'; '.join(remedies)}"
    assert caught.value.__cause__ is error


def test_other_errors_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained_memory_errors(lambda: ()):
        raise RuntimeError("shapes do not fit")


def fail(*values: object, **options: object) -> None:
    raise CUDA


def test_split_sample_and_train_say_what_helps(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(split_module, "split_tensor", fail)
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path)]) == 2
    text = capfd.readouterr().err
    assert "error: the GPU ran out of memory: CUDA out of memory." in text
    assert (
        "hint: what helps, the cheapest first: close other programs that use the card; pass cpu as --device"
        in text
    )
    assert list(tmp_path.glob("*")) == []

    monkeypatch.setattr(models, "load_model", fail)
    words = ["sample", str(tiny_checkpoint), "-c", "a", "-o", str(tmp_path / "p"), "--size", "64"]
    assert run(words) == 2
    assert "cheapest first: pass 1 as --batch; close other" in capfd.readouterr().err
    assert run([*words, "--batch", "1"]) == 2
    assert (
        "cheapest first: close other programs that use the card; a smaller --size" in capfd.readouterr().err
    )

    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"[model]\nbase = '{tiny_checkpoint}'\nrank = 2\n[data]\nfolders = ['.']\nresolution_px = 64\n"
        "[run]\nname = 't'\noutput = 'out'\nsteps = 1\n"
    )
    monkeypatch.setattr(loop, "train", fail)
    assert run(["train", str(recipe)]) == 2
    assert "the cheapest first: run.gradient_checkpointing = true; run.precision" in capfd.readouterr().err
    with pytest.raises(spectune.SpectuneError, match="ran out of memory"):
        spectune.train(str(recipe))  # type: ignore[arg-type]
