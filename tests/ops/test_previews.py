"""Previews of a running training: the prompts, the files, and what happens if a file or a size is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from spectune.errors import InputError
from spectune.model.offload import StagedModel
from spectune.model.prediction import make_prediction
from spectune.ops.drawing import previews
from spectune.ops.drawing.previews import Previews
from spectune.sampling.generate import Request, SampleSettings
from spectune.training.callbacks import RunStart
from spectune.training.recipe.recipe import Recipe, parse_recipe

Draws = list[tuple[SampleSettings, list[Request]]]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """Record what is drawn instead of drawing it. Pictures over 2000 px need too much memory."""
    calls: Draws = []

    def draw(model: object, requests: Sequence[Request], settings: SampleSettings) -> list[Image.Image]:
        if settings.width > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMany details")
        calls.append((settings, list(requests)))
        return [
            Image.new("RGB", (settings.width, settings.height), (request.seed, 0, 0)) for request in requests
        ]

    monkeypatch.setattr(previews, "draw_in_stages", draw)
    return calls


@pytest.fixture
def model() -> StagedModel:
    """Return a model with the size step and the samplers of SDXL; it keeps its messages."""
    sdxl = SimpleNamespace(
        prediction=make_prediction("eps"),
        size_step=32,
    )
    return StagedModel(cast("Any", sdxl), notify=[].append)


def messages(model: StagedModel) -> list[str]:
    return cast("Any", model.notify).__self__


def recipe(tmp_path: Path, prompts: str | None, **run: Any) -> Recipe:
    if prompts is not None:
        (tmp_path / "prompts.txt").write_text(prompts)
        run["preview"] = tmp_path / "prompts.txt"
    return parse_recipe(
        {
            "model": {"base": tmp_path / "base.safetensors", "rank": 2},
            "data": {"folders": [tmp_path / "pictures"], "resolution_px": 512},
            "run": {"name": "v1.5", "output": tmp_path / "out", "steps": 3, **run},
        }
    )


def test_each_picture_is_kept_beside_the_sheet(tmp_path: Path, draws: Draws, model: StagedModel) -> None:
    text = "a cat --d 9\na wide dog --w 1216 --h 840 --ss lms\na fox"
    preview = Previews(recipe(tmp_path, text, preview_sampler="euler_a"))
    sheet = preview.on_preview(20, model)
    preview.on_preview(30, model)

    folder = tmp_path / "out" / "previews"
    assert sorted(path.name for path in folder.iterdir()) == [
        "v1.5-step00000020",
        "v1.5-step00000020.png",
        "v1.5-step00000030",
        "v1.5-step00000030.png",
    ]
    files = sorted((folder / "v1.5-step00000020").iterdir())
    assert [file.name for file in files] == [f"v1.5-step00000020-{number:02d}.png" for number in (1, 2, 3)]
    pictures = [Image.open(file) for file in files]
    assert [picture.size for picture in pictures] == [(512, 512), (1216, 832), (512, 512)]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(9, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert pictures[1].info["caption"] == "a wide dog"
    assert sheet.width > 3 * 256
    square = SampleSettings(512, 512, sampler="euler_a")
    assert draws[0] == (square, [Request("a cat", 9), Request("a fox", 2)])
    assert draws[1][0] == replace(square, width=1216, height=832, sampler="euler", batch=1)
    assert messages(model) == [  # once, although there are two previews
        "previews: lms is not offered for this eps model: euler is used instead",
        "previews of 1216x840 px are drawn with 1216x832 px: sides are multiples of 32 px",
    ]


def test_prompts_are_read_again_and_a_broken_file_is_a_warning(
    tmp_path: Path, draws: Draws, model: StagedModel
) -> None:
    preview = Previews(recipe(tmp_path, "a cat\na dog"))
    (tmp_path / "prompts.txt").write_text("a fox")
    preview.on_preview(1, model)
    preview.on_preview(1, model)
    (tmp_path / "prompts.txt").write_text("a fox --w wide")
    preview.on_preview(2, model)
    (tmp_path / "prompts.txt").unlink()
    preview.on_preview(3, model)
    assert [[request.caption for request in requests] for _, requests in draws] == [["a fox"]] * 4
    broken, missing = messages(model)
    assert broken.startswith("warning: ")
    assert "prompts.txt, line 1: --w is 'wide'" in broken
    assert broken.endswith("the preview uses the prompts that were read before")
    assert "cannot read prompts from" in missing


def test_a_size_without_memory_leaves_the_others(tmp_path: Path, draws: Draws, model: StagedModel) -> None:
    Previews(recipe(tmp_path, "a\nb --w 2048\nc")).on_preview(1, model)
    folder = tmp_path / "out" / "previews" / "v1.5-step00000001"
    assert [file.name[-6:] for file in sorted(folder.iterdir())] == ["01.png", "03.png"]
    assert messages(model) == ["warning: no preview of 2048x512: CUDA out of memory."]
    (tmp_path / "prompts.txt").write_text("b --w 2048")
    with pytest.raises(torch.OutOfMemoryError):  # the run reports it and goes on
        Previews(recipe(tmp_path, "b --w 2048")).on_preview(2, model)


def test_wrong_prompts_and_samplers_are_errors_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1: unknown option --x"):
        Previews(recipe(tmp_path, "a --x"))
    with pytest.raises(InputError, match="unknown sampler 'eulre'"):
        Previews(recipe(tmp_path, None, preview_sampler="eulre"))


def test_without_prompts_captions_of_the_run_are_drawn(
    tmp_path: Path, draws: Draws, model: StagedModel
) -> None:
    """The captions come with the start of the run: no image is decoded again."""
    preview = Previews(recipe(tmp_path, None))
    captions = tuple(f"caption {number}" for number in range(9))
    preview.on_start(RunStart("t", 3, 0, images=9, trained_parameters=1, captions=captions))
    preview.on_preview(1, model)
    ((_, requests),) = draws
    assert requests == [Request(caption, seed) for seed, caption in enumerate(captions[:6])]
