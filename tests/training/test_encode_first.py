"""Images and captions are encoded with one network at a time on the device, before the UNet gets there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectune.model.network import Sdxl
from spectune.training import denoiser, setup
from spectune.training.data import latents
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe


class Moves:
    """Where each network is: every `to` counts, also one from the CPU to the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: set[str] = set()  # networks that were moved to the device and not back
        self.events: list[tuple[str, frozenset[str]]] = []  # what was encoded, with what on the device
        self._names: dict[int, str] = {}
        plain = nn.Module.to
        monkeypatch.setattr(nn.Module, "to", self._recorded(plain))

    def watch(self, model: Sdxl) -> None:
        networks = {"unet": model.unet, "te1": model.te1, "te2": model.te2, "vae": model.vae}
        self._names = {id(module): name for name, module in networks.items()}
        self.moved.clear()

    def _recorded(self, plain: Any) -> Any:
        def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            name = self._names.get(id(module))
            if name is not None:
                (self.moved.discard if args[0] == PARKING else self.moved.add)(name)
            return plain(module, *args, **kwargs)

        return to

    def note(self, what: str) -> None:
        self.events.append((what, frozenset(self.moved)))


PARKING = torch.device("cpu", 0)  # the same device under another name


@pytest.mark.parametrize("offload", [(), ("text", "vae")])
def test_one_network_at_a_time(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: tuple[str, ...]
) -> None:
    moves = Moves(monkeypatch)
    plain_offload, encode, encode_text = setup.offload, latents.encode_posteriors, Sdxl.encode_text

    def watched(model: Sdxl, names: Any, **options: Any) -> Any:
        moves.watch(model)
        return plain_offload(model, names, parking=PARKING, **options)

    def encode_posteriors(*args: Any) -> torch.Tensor:
        moves.note("image")
        return encode(*args)

    def encode_captions(*args: Any) -> Any:
        moves.note("caption")
        return encode_text(*args)

    monkeypatch.setattr(setup, "offload", watched)
    monkeypatch.setattr(latents, "encode_posteriors", encode_posteriors)
    monkeypatch.setattr(denoiser.Sdxl, "encode_text", encode_captions)
    train(make_recipe(run={"steps": 1, "offload": list(offload)}, model={"parts": ["unet"]}))
    places = {what: {networks for name, networks in moves.events if name == what} for what, _ in moves.events}
    assert places["image"] == {frozenset({"vae"})}
    with_text = {"te1", "te2"} if offload else {"te1", "te2", "vae"}
    assert places["caption"] == {frozenset(with_text)}
    assert moves.moved == ({"unet"} if offload else {"unet", "te1", "te2", "vae"})
