"""Frozen networks that wait in main memory while nothing asks them, and come back when something does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from spectune.errors import InputError
from spectune.model.network import Sdxl

Network = Literal["text", "vae"]  # both text encoders; the autoencoder

_CPU = torch.device("cpu")


class Offload:
    """Networks that wait on one device and work on another; they work until `park` is called.

    For after their outputs are cached: what they say while they wait is computed on the device they wait on.
    """

    def __init__(
        self,
        networks: Mapping[Network, tuple[nn.Module, ...]],
        *,
        home: torch.device,
        rest: torch.device = _CPU,
    ) -> None:
        self._networks = networks
        self._home, self._rest = home, rest
        self._parked = False
        self._working: dict[Network, int] = dict.fromkeys(networks, 0)  # how many blocks are using each

    def park(self) -> None:
        """Send the networks to wait; those at work go when their block ends."""
        self._parked = True
        for network, users in self._working.items():
            if not users:
                self._move(network, self._rest)

    def bring_back(self) -> None:
        """End the waiting for good."""
        self._parked = False
        for network in self._networks:
            self._move(network, self._home)

    @contextmanager
    def at_work(self, *names: Network) -> Iterator[None]:
        """Have the named networks, or all without a name, on their working device inside the block.

        Blocks may be nested; a network that does not wait stays where it is.
        """
        wanted: list[Network] = [name for name in (names or self._networks) if name in self._networks]
        for network in wanted:
            self._working[network] += 1
        try:
            if self._parked:
                for network in wanted:
                    self._move(network, self._home)
            yield
        finally:
            for network in wanted:
                self._working[network] -= 1
                if self._parked and not self._working[network]:
                    self._move(network, self._rest)

    def _move(self, network: Network, device: torch.device) -> None:
        for module in self._networks[network]:
            module.to(device)


def offload(model: Sdxl, names: Iterable[Network], *, rest: torch.device | str = _CPU) -> Offload:
    """The named networks of a model, to be parked once their outputs are cached; nothing moves yet.

    Raises InputError for a network that is trained, which is needed at every step.
    """
    networks: dict[Network, tuple[nn.Module, ...]] = {}
    for name in names:
        modules = _modules(model, name)
        if any(parameter.requires_grad for module in modules for parameter in module.parameters()):
            raise InputError(
                f"the networks `{name}` are trained and cannot wait in main memory",
                hint=f"leave `{name}` out of run.offload, or the text encoders out of model.parts",
            )
        networks[name] = modules
    return Offload(networks, home=model.device, rest=torch.device(rest))


def _modules(model: Sdxl, name: Network) -> tuple[nn.Module, ...]:
    if name == "text":
        return (model.te1, model.te2)
    return () if model.vae is None else (model.vae,)
