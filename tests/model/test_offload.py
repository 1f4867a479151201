"""Offloaded networks: modules record the devices that they are moved to."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.offload import Offload, offload
from spectune.model.text import tokenize

WORKING = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Recorder(nn.Module):
    """A module that only records the devices it is moved to, because tests have no second device."""

    def __init__(self, device: torch.device = WORKING) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.devices = [device]

    def to(self, device):
        self.devices.append(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.devices[-1]


@pytest.fixture
def modules():
    return {"text": (Recorder(), Recorder()), "vae": (Recorder(),)}


@pytest.fixture
def offloaded(modules):
    return Offload(modules, working=WORKING)


def devices(modules):
    return {name: {module.device for module in group} for name, group in modules.items()}


def test_networks_stay_on_the_working_device_until_they_are_parked(modules, offloaded):
    with offloaded.at_work():
        assert devices(modules) == {"text": {WORKING}, "vae": {WORKING}}
    assert devices(modules) == {"text": {WORKING}, "vae": {WORKING}}
    assert [len(m.devices) for m in modules["text"]] == [1, 1], "nothing was moved"
    offloaded.park()
    assert devices(modules) == {"text": {CPU}, "vae": {CPU}}


def test_only_named_networks_return_to_the_working_device(modules, offloaded):
    offloaded.park()
    with offloaded.at_work("vae"):
        assert devices(modules) == {"text": {CPU}, "vae": {WORKING}}
    assert devices(modules) == {"text": {CPU}, "vae": {CPU}}
    with offloaded.at_work():
        assert devices(modules) == {"text": {WORKING}, "vae": {WORKING}}


def test_an_inner_block_does_not_park_networks_of_the_outer_block(modules, offloaded):
    offloaded.park()
    with offloaded.at_work("vae"):
        with offloaded.at_work("text", "vae"):
            assert devices(modules) == {"text": {WORKING}, "vae": {WORKING}}
        assert devices(modules) == {"text": {CPU}, "vae": {WORKING}}
    assert devices(modules) == {"text": {CPU}, "vae": {CPU}}


def test_networks_in_use_are_parked_at_the_end_of_the_block(modules, offloaded):
    with offloaded.at_work("text"):
        offloaded.park()
        assert devices(modules) == {"text": {WORKING}, "vae": {CPU}}
    assert devices(modules) == {"text": {CPU}, "vae": {CPU}}


def test_an_error_in_a_block_parks_the_networks_too(modules, offloaded):
    offloaded.park()
    with pytest.raises(ZeroDivisionError), offloaded.at_work():
        raise ZeroDivisionError
    assert devices(modules) == {"text": {CPU}, "vae": {CPU}}


def test_networks_that_are_not_offloaded_are_ignored(modules):
    offloaded = Offload({"vae": modules["vae"]}, working=WORKING)
    offloaded.park()
    with offloaded.at_work("text"):
        assert devices(modules) == {"text": {WORKING}, "vae": {CPU}}


def test_networks_of_a_model_move_and_keep_their_outputs(source):
    model = build_model(source)
    text = model.encode_text(tokenize(["a cat"], model.layout.te1.context))
    # a dtype instead of a second device: `to` accepts both, and it really changes the modules
    offloaded = offload(model, ["text", "vae"])
    offloaded._parking = torch.float64
    offloaded.park()
    assert {m.dtype for m in (model.te1, model.te2, model.vae)} == {torch.float64}
    assert model.unet.dtype == torch.float32
    offloaded._working = torch.float32
    with offloaded.at_work("text"):
        assert (model.te1.dtype, model.te2.dtype, model.vae.dtype) == (*[torch.float32] * 2, torch.float64)
        again = model.encode_text(tokenize(["a cat"], model.layout.te1.context))
    assert torch.equal(again.context, text.context)
    assert torch.equal(again.pooled, text.pooled)
    assert model.te1.dtype == torch.float64


def test_trained_networks_cannot_be_offloaded(source):
    model = build_model(source)
    model.te2.text_projection.weight.requires_grad_(True)
    offload(model, ["vae"])
    with pytest.raises(InputError, match=r"run\.offload contains `text`, but a trained network cannot be"):
        offload(model, ["text"])


def test_a_checkpoint_without_vae_has_nothing_to_park(source):
    offloaded = offload(replace(build_model(source), vae=None), ["vae"])
    offloaded.park()
    with offloaded.at_work("vae"):
        pass
