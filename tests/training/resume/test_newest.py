from __future__ import annotations

from pathlib import Path

import pytest

from spectune.training import output, state
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe


class FailAt(Callbacks):
    """A log that fails at a step, as TensorBoard does on a full disk."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.step:
            raise OSError(28, "No space left on device")


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes(9))


def test_an_error_in_a_step_saves_the_state(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        train(make_recipe(), callbacks=[FailAt(2)])
    saved = output.saved_states(tmp_path / "out", "t")
    assert [path.name for path in saved] == ["t-step00000002.state"]
    assert train(make_recipe()).first_step == 2


def test_a_picture_that_became_unreadable_saves_the_state(
    make_recipe: MakeRecipe, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spectune.training.data.dataset import Pictures

    read, calls = Pictures.__getitems__, []

    def unreadable(self: Pictures, draws: object) -> object:
        calls.append(draws)
        if len(calls) == 3:  # the loader reads one batch ahead
            raise OSError("image file is truncated")
        return read(self, draws)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Pictures, "__getitems__", unreadable)
    with pytest.raises(OSError, match="image file is truncated"):
        train(make_recipe())
    assert (tmp_path / "out" / "t-step00000001.state" / state.STATE).is_file()


def test_weights_in_the_middle_of_a_step_are_not_saved(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def fail(self: object, *args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(make_recipe())
    assert list((tmp_path / "out").glob("*")) == []


def test_a_damaged_newest_state_falls_back(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(run={"save_every_steps": 1, "steps": 2}))
    out = tmp_path / "out"
    damage(out / "t-step00000002.state" / state.OPTIMIZER)
    report = train(make_recipe(run={"steps": 2}))
    assert report.first_step == 1
    (warning,) = [text for text in report.warnings if "damaged" in text]
    assert "t-step00000002.state is damaged: optimizer.safetensors differs from its checksum" in warning
    assert "resuming from t-step00000001.state instead" in warning
    assert (out / "t-step00000002.state.damaged").is_dir()
    assert state.load_state(out / "t-step00000002.state").header.step == 2

    for folder in output.saved_states(out, "t"):
        damage(folder / state.TRAINED)
    with pytest.raises(state.DamagedState, match=r"t-step00000002\.state is damaged: trained") as caught:
        train(make_recipe(run={"steps": 2}))
    assert "start again with `force`" in (caught.value.hint or "")
