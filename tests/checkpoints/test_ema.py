"""Moving averages of the UNet in checkpoints of older trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectune.checkpoints.ema import EMA_ROOT, ema_names, with_ema_as_unet
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.errors import InputError
from spectune.files.source import MemorySource, TensorInfo
from spectune.files.writer import write_tensors
from spectune.sdxl.layout import UNET_ROOT, hints_metadata
from tests.layouts import TINY

FIRST = f"{UNET_ROOT}input_blocks.0.0.weight"
FIRST_AVERAGE = "model_ema.diffusion_modelinput_blocks00weight"


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add float32 averages: twice the weight."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith(UNET_ROOT):
            made[EMA_ROOT + name.removeprefix("model.").replace(".", "")] = 2 * tensor.float()
    return made | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


@pytest.fixture
def path(source: MemorySource, tmp_path: Path) -> Path:
    path = tmp_path / "old.safetensors"
    write_tensors(path, averaged(dict(source.values)), metadata=hints_metadata(TINY))
    return path


def test_every_name_of_the_full_unet_has_its_own_average(full_infos: dict[str, TensorInfo]) -> None:
    unet = [name for name in full_infos if name.startswith(UNET_ROOT)]
    averages = {EMA_ROOT + name.removeprefix("model.").replace(".", "") for name in unet}
    assert len(averages) == len(unet) == 1680
    names = ema_names(dict.fromkeys([*unet, *averages], full_infos[FIRST]))
    assert set(names.values()) == averages
    assert names[FIRST] == FIRST_AVERAGE


def test_convert_writes_the_averages_as_the_unet(
    path: Path, source: MemorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = [name for name in source.values if name.startswith(UNET_ROOT)]
    assert run(["inspect", str(path)]) == 0
    assert f"EMA           of {len(unet)} UNet tensors" in capsys.readouterr().err
    out = tmp_path / "ema.safetensors"
    assert run(["convert", str(path), "--ema", "-o", str(out)]) == 0
    assert f"the moving averages are the UNet; {len(unet) + 2} keys" in capsys.readouterr().err
    with open_checkpoint(out) as written:
        assert set(written.tensors) == set(source.values)
        for name, tensor in source.values.items():
            expected = 2 * tensor.float() if name in unet else tensor
            assert torch.equal(written.load(name), expected)


def test_other_commands_keep_the_averages(path: Path, source: MemorySource, tmp_path: Path) -> None:
    assert run(["convert", str(path), "-o", str(tmp_path / "folder")]) == 0
    assert run(["split", str(path), "--rank", "2", "-o", str(tmp_path / "split")]) == 0
    for copy in (tmp_path / "folder", tmp_path / "split/old.residual.safetensors"):
        with open_checkpoint(copy) as kept:
            assert torch.equal(kept.load(FIRST_AVERAGE), 2 * source.values[FIRST].float())
            assert int(kept.load("model_ema.num_updates")) == 7


def test_all_that_is_wrong_with_averages_is_said_once(source: MemorySource, tmp_path: Path) -> None:
    tensors = averaged(dict(source.values))
    tensors["model_ema.stranger"] = tensors.pop(FIRST_AVERAGE)
    tensors["model_ema.diffusion_modelout2bias"] = torch.zeros(9)
    write_tensors(tmp_path / "x.safetensors", tensors)
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint, pytest.raises(InputError) as caught:
        with_ema_as_unet(checkpoint)
    assert caught.value.what == (
        "x.safetensors cannot be read with its moving averages: "
        f"1 UNet tensor without a moving average: {FIRST}; "
        f"1 UNet tensor with an average of another shape: {UNET_ROOT}out.2.bias; "
        "1 average of no UNet tensor: model_ema.stranger"
    )


def test_a_file_without_averages_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(tiny_checkpoint), "--ema", "-o", str(tmp_path / "x.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "tiny.safetensors has no moving averages: expected tensors such as model_ema.diffusion_" in message
    assert "hint: leave out --ema" in message
