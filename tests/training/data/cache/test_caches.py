"""Runs keep latents and captions in memory up to a limit, which depends on the data only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectune.errors import InputError
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks
from spectune.training.data.cache import caches, filling
from spectune.training.data.cache.caches import cache_captions, latent_bytes, text_bytes
from spectune.training.data.latents import LatentsInMemory, encode_pictures
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.loop import train
from spectune.training.saving.disk import shown_size
from tests.training.conftest import MakeRecipe
from tests.training.data.conftest import VARIED, pictures_in


class Messages(Callbacks):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MOST_LATENT_BYTES", 0)
    monkeypatch.setattr(caches, "MOST_TEXT_BYTES", 40_000)


def test_the_bytes_of_latents(model: Sdxl, folder: Path) -> None:
    pictures = pictures_in(folder, VARIED)
    held = encode_pictures(model, pictures, seed=3)
    assert latent_bytes(pictures, model.layout) == sum(tensor.nbytes for tensor in held.tensors.values())


@pytest.mark.parametrize("max_tokens", [75, 225])
def test_the_bytes_of_captions(model: Sdxl, max_tokens: int) -> None:
    captions = ["", "cat", "word " * 100, "word " * 300]
    encoded = encode_captions(model, captions, max_tokens=max_tokens).values()
    denoiser = Denoiser(model, trains_text=False, max_tokens=max_tokens)
    nbytes = sum(states.context.nbytes + states.pooled.nbytes for states in encoded)
    assert text_bytes(denoiser, captions) == nbytes


def test_latents_above_the_limit_are_kept_on_disk(
    make_recipe: MakeRecipe, tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"flip_probability": 0.5}
    parts, whole, messages = tmp_path / "parts", tmp_path / "whole", Messages()
    train(make_recipe(data=data, run={"steps": 3, "output": whole}), callbacks=[messages])
    assert [text for text in messages.texts if "kept on disk" in text or "are encoded and" in text] == [
        f"the latents take 0.0 MB: above 0 GB they are kept on disk, in {whole / 't.latents'}; delete it "
        "after the training",
        f"latents: 12 of 12 views are encoded and take 0.0 MB in {next((whole / 't.latents').glob('*/'))}",
    ]
    train(make_recipe(data=data, run={"steps": 1, "output": parts}))
    monkeypatch.setattr(filling, "encode_views", lambda *_: pytest.fail("encoded twice"))
    report = train(make_recipe(data=data, run={"steps": 3, "output": parts}))
    assert report.first_step == 1
    one, two = (load_file(folder / "t.safetensors") for folder in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_captions_above_the_limit_are_encoded_at_each_step(
    model: Sdxl, folder: Path, make_recipe: MakeRecipe, no_memory: None
) -> None:
    captions = [f"caption {number}" for number in range(5)]
    for number, caption in enumerate(captions):
        (folder / "1_x" / f"{number}.txt").write_text(caption)
    pictures, unet = pictures_in(folder), {"model": {"parts": ["unet"]}}

    def texts(**sections: dict[str, object]) -> tuple[Denoiser, list[str]]:
        denoiser, messages = Denoiser(model, trains_text=False), Messages()
        cache_captions(make_recipe(**unet, **sections), denoiser, pictures, [], messages)
        return denoiser, messages.texts

    denoiser, messages = texts()
    assert denoiser.text is None
    count = 40_000 // text_bytes(denoiser, [""]) + 1  # the first number above the limit
    assert 1 < count < 5
    size = shown_size(text_bytes(denoiser, captions[:count]))
    assert messages == [
        f"{count} captions take {size} or more when they are encoded: above 4e-05 GB, each step encodes its "
        "own; data.cache_text = true keeps them"
    ]
    denoiser, messages = texts(data={"cache_text": True})
    assert denoiser.text is not None
    assert denoiser.text.keys() == {"", *captions}
    assert messages[0].endswith("in the main memory of each process: data.cache_text is true")
    with pytest.raises(InputError, match=r'they are not kept, but run\.offload = \["text"\] needs them'):
        texts(run={"offload": ["text"]})


def test_few_latents_and_captions_stay_in_memory(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    messages = Messages()
    train(make_recipe(run={"steps": 0}), callbacks=[messages])
    assert not [text for text in messages.texts if "on disk" in text or "latents:" in text]
    assert not (tmp_path / "out" / "t.latents").exists()
    assert LatentsInMemory({}).in_memory
