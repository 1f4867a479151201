"""Networks that wait in main memory: where they are at each moment, seen by modules that note it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.offload import Offload, offload
from spectune.model.text import tokenize

HOME = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Traveller(nn.Module):
    """Notes each device that it is sent to, and stays where it is: there is no second device here."""

    def __init__(self, place: torch.device = HOME) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.trips = [place]

    def to(self, device):
        self.trips.append(device)
        return self

    @property
    def place(self) -> torch.device:
        return self.trips[-1]


@pytest.fixture
def travellers():
    return {"text": (Traveller(), Traveller()), "vae": (Traveller(),)}


@pytest.fixture
def waiting(travellers):
    return Offload(travellers, home=HOME)


def places(travellers):
    return {name: {module.place for module in modules} for name, modules in travellers.items()}


def test_networks_work_until_they_are_parked(travellers, waiting):
    with waiting.at_work():
        assert places(travellers) == {"text": {HOME}, "vae": {HOME}}
    assert places(travellers) == {"text": {HOME}, "vae": {HOME}}
    assert [len(m.trips) for m in travellers["text"]] == [1, 1], "nothing was moved"
    waiting.park()
    assert places(travellers) == {"text": {CPU}, "vae": {CPU}}
    waiting.bring_back()
    with waiting.at_work("vae"):
        pass
    assert places(travellers) == {"text": {HOME}, "vae": {HOME}}


def test_only_what_is_asked_for_comes_back(travellers, waiting):
    waiting.park()
    with waiting.at_work("vae"):
        assert places(travellers) == {"text": {CPU}, "vae": {HOME}}
    assert places(travellers) == {"text": {CPU}, "vae": {CPU}}
    with waiting.at_work():
        assert places(travellers) == {"text": {HOME}, "vae": {HOME}}


def test_an_inner_block_does_not_send_away_what_the_outer_one_uses(travellers, waiting):
    waiting.park()
    with waiting.at_work("vae"):
        with waiting.at_work("text", "vae"):
            assert places(travellers) == {"text": {HOME}, "vae": {HOME}}
        assert places(travellers) == {"text": {CPU}, "vae": {HOME}}
    assert places(travellers) == {"text": {CPU}, "vae": {CPU}}


def test_parking_waits_for_the_end_of_a_block(travellers, waiting):
    with waiting.at_work("text"):
        waiting.park()
        assert places(travellers) == {"text": {HOME}, "vae": {CPU}}
    assert places(travellers) == {"text": {CPU}, "vae": {CPU}}


def test_an_error_in_a_block_sends_them_back_too(travellers, waiting):
    waiting.park()
    with pytest.raises(ZeroDivisionError), waiting.at_work():
        raise ZeroDivisionError
    assert places(travellers) == {"text": {CPU}, "vae": {CPU}}


def test_networks_that_do_not_wait_are_left_alone(travellers):
    waiting = Offload({"vae": travellers["vae"]}, home=HOME)
    waiting.park()
    with waiting.at_work("text"):
        assert places(travellers) == {"text": {HOME}, "vae": {CPU}}


def test_the_networks_of_a_model(source):
    model = build_model(source)
    text = model.encode_text(tokenize(["a cat"], model.layout.te1.context))
    # float64 stands for another place: `to` takes it like a device, and the real modules do move
    waiting = offload(model, ["text", "vae"])
    waiting._rest = torch.float64
    waiting.park()
    assert {m.dtype for m in (model.te1, model.te2, model.vae)} == {torch.float64}
    assert model.unet.dtype == torch.float32
    waiting._home = torch.float32
    with waiting.at_work("text"):
        assert (model.te1.dtype, model.te2.dtype, model.vae.dtype) == (*[torch.float32] * 2, torch.float64)
        again = model.encode_text(tokenize(["a cat"], model.layout.te1.context))
    assert torch.equal(again.context, text.context)
    assert torch.equal(again.pooled, text.pooled)
    assert model.te1.dtype == torch.float64


def test_trained_networks_cannot_wait(source):
    model = build_model(source)
    model.te2.text_projection.weight.requires_grad_(True)
    offload(model, ["vae"])
    with pytest.raises(InputError, match="the networks `text` are trained and cannot wait"):
        offload(model, ["text"])


def test_a_checkpoint_without_vae_has_nothing_to_park(source):
    waiting = offload(replace(build_model(source), vae=None), ["vae"])
    waiting.park()
    with waiting.at_work("vae"):
        pass
