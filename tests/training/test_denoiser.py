"""Captions of several chunks in training: mixed batches, caches, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectune.model.network import Sdxl
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe, draw

LONG = ", ".join(f"detail {number}" for number in range(30))  # 89 tokens, two chunks
CAPTIONS = ("a cat", LONG, "dog " * 200)


def test_cached_captions_of_different_lengths_are_those_of_the_encoders(model: Sdxl) -> None:
    denoiser = Denoiser(model, trains_text=False)
    computed = denoiser.text_states(CAPTIONS)
    denoiser.text = encode_captions(model, CAPTIONS)
    assert [len(denoiser.text[caption].context) for caption in CAPTIONS] == [77, 154, 231]
    cached = denoiser.text_states(CAPTIONS)
    torch.testing.assert_close(cached.context, computed.context, rtol=0, atol=1e-6)
    torch.testing.assert_close(cached.pooled, computed.pooled, rtol=0, atol=1e-6)
    assert cached.mask is not None
    assert computed.mask is not None
    assert torch.equal(cached.mask, computed.mask)
    assert cached.mask.sum(dim=1).tolist() == [77, 154, 231]
    short = Denoiser(model, trains_text=False, max_tokens=75)
    assert short.text_states(CAPTIONS).context.shape[1] == 77
    assert len(encode_captions(model, CAPTIONS, max_tokens=75)[LONG].context) == 77


def test_gradients_reach_the_encoders_through_the_last_chunk(model: Sdxl) -> None:
    weight = next(value for name, value in model.te1.named_parameters() if name.endswith("q_proj.weight"))
    weight.requires_grad_(True)
    try:
        states = Denoiser(model, trains_text=True).text_states(CAPTIONS)
        (gradient,) = torch.autograd.grad(states.context[2, 154:].square().sum(), weight)
        assert gradient.abs().max() > 0
    finally:
        weight.requires_grad_(False)


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    for index, caption in enumerate((*CAPTIONS, "a dog")):
        path = tmp_path / "long" / "1_x" / f"{index}.png"
        draw(path, seed=index)
        path.with_suffix(".txt").write_text(caption)
    return tmp_path / "long"


def test_the_second_chunk_is_trained_on_and_what_is_cut_is_counted(
    make_recipe: MakeRecipe, long_folder: Path, tmp_path: Path
) -> None:
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for max_tokens, expected in {
        225: [],
        75: ["2 captions longer than 75 tokens, the rest is not used; longest: 2.txt with 200 tokens"],
    }.items():
        data = {"folders": [long_folder], "caption": {"max_tokens": max_tokens}}
        run = {"output": tmp_path / str(max_tokens), "steps": 1, "batch": 4}
        report = train(make_recipe(data=data, run=run))
        assert [warning for warning in report.warnings if "longer than" in warning] == expected
        tensors[max_tokens] = load_file(tmp_path / str(max_tokens) / "t.safetensors")
    assert any(not torch.equal(tensors[225][key], tensors[75][key]) for key in tensors[75])
