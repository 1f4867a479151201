"""Keep networks in main memory while they are not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from spectune.errors import InputError
from spectune.model.network import Sdxl, TextStates

Network = Literal["text", "vae", "unet"]  # both text encoders; the autoencoder; the UNet

_CPU = torch.device("cpu")


class Offload:
    """Networks that move between a working and a parking device. They do not move before `park` is called.

    Call `park` once the outputs of the networks are cached. Parked networks then run on the parking device,
    except in `at_work` blocks.
    """

    def __init__(
        self,
        networks: Mapping[Network, tuple[nn.Module, ...]],
        *,
        working: torch.device,
        parking: torch.device = _CPU,
    ) -> None:
        self._networks = networks
        self._working, self._parking = working, parking
        self._parked = False
        self._users: dict[Network, int] = dict.fromkeys(networks, 0)  # open blocks that use each network

    def __contains__(self, network: Network) -> bool:
        return network in self._networks

    def park(self) -> None:
        """Move the networks to the parking device. Networks in an open block move at its end."""
        self._parked = True
        for network, users in self._users.items():
            if not users:
                self._move(network, self._parking)

    @contextmanager
    def at_work(self, *names: Network) -> Iterator[None]:
        """Keep the named networks (by default all) on the working device inside the block.

        Blocks may be nested. Networks that are not offloaded are ignored.
        """
        used: list[Network] = [name for name in (names or self._networks) if name in self._networks]
        for network in used:
            self._users[network] += 1
        try:
            if self._parked:
                for network in used:
                    self._move(network, self._working)
            yield
        finally:
            for network in used:
                self._users[network] -= 1
                if self._parked and not self._users[network]:
                    self._move(network, self._parking)

    def _move(self, network: Network, device: torch.device) -> None:
        for module in self._networks[network]:
            module.to(device)


@dataclass(frozen=True)
class StagedModel:
    """A model that draws in stages: it encodes all captions, samples all latents, and decodes them.

    Attributes:
        sdxl: The model.
        networks: Networks that are on the device for their stage only. The others stay where they are.
        encoded: Encoded captions on any device. If all captions of a drawing are there, no network encodes.
        notify: Called if the pictures are not decoded exactly.
    """

    sdxl: Sdxl
    networks: Offload = field(default_factory=lambda: Offload({}, working=_CPU))
    encoded: Mapping[str, TextStates] = field(default_factory=dict[str, TextStates])
    notify: Callable[[str], None] = lambda text: None


def offload(
    model: Sdxl,
    names: Iterable[Network],
    *,
    working: torch.device | None = None,
    parking: torch.device | str = _CPU,
) -> Offload:
    """Return the named networks of a model as an Offload. No network moves before `park`.

    `working` is by default the device of the UNet.

    Raises:
        InputError: A network is trained, so every step needs it.
    """
    networks: dict[Network, tuple[nn.Module, ...]] = {}
    for name in names:
        modules = modules_of(model, name)
        if any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise InputError(
                f"run.offload contains `{name}`, but a trained network cannot be offloaded",
                hint=f"remove `{name}` from run.offload, or the text encoders from model.parts",
            )
        networks[name] = modules
    return Offload(networks, working=working or model.device, parking=torch.device(parking))


def modules_of(model: Sdxl, name: Network) -> tuple[nn.Module, ...]:
    """Return the modules of a network; none if the model has no autoencoder."""
    if name == "text":
        return (model.te1, model.te2)
    if name == "unet":
        return (model.unet,)
    return () if model.vae is None else (model.vae,)
