"""The conversion of an EPS model to a flow model in a run: teacher, bridge and replaced tensors.

The teacher is the trained network with its changes switched off, so it needs no extra memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from spectune.model.inject import AdaptedLayer, Injection
from spectune.model.network import Sdxl
from spectune.sdxl.state_dicts import state_views
from spectune.training.data.dataset import Batch
from spectune.training.eps_to_flow.bridge import Bridge, Preconditioning, interpolate, of_flow_model
from spectune.training.objective.noising import NoisedBatch

# The teacher's prediction carries less and less information towards the end of its schedule, s = 0.936.
TEACHER_FADES_FROM = 0.9
# Modules of the UNet that a warm start replaces.
REPLACED_MODULES = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out")

Network = Callable[[Tensor, Tensor, Sequence[str], Tensor], Tensor]  # noised, timestep, captions, time ids


@dataclass
class SwappedTensors:
    """UNet tensors that replace tensors of the base, by their names in a checkpoint."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])  # float32, on the CPU
    _swapped: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[nn.Parameter, Tensor, Tensor]]
    )  # parameter, its values in the base, its replacement

    def put(self, model: Sdxl, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors of the model. They are cast to its dtype and moved to its device."""
        for name, parameter in replaceable_parameters(model).items():
            if name in tensors:
                before = self._swapped[name][1] if name in self._swapped else parameter.data
                after = tensors[name].to(before.device, before.dtype)
                parameter.data = after
                self._swapped[name] = (parameter, before, after)
        self.tensors = {**self.tensors, **{name: t.detach().float().cpu() for name, t in tensors.items()}}

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the tensors of the base inside the block."""
        for parameter, before, _ in self._swapped.values():
            parameter.data = before
        try:
            yield
        finally:
            for parameter, _, after in self._swapped.values():
                parameter.data = after


def replaceable_parameters(model: Sdxl) -> dict[str, nn.Parameter]:
    """Return the parameters that a warm start may replace, by their names in a checkpoint."""
    names = {key: view.tensor for key, view in state_views(model.layout, "unet").items()}
    return {
        names[f"{path}.{kind}"]: getattr(base_module(model, path), kind)
        for path in REPLACED_MODULES
        for kind in ("weight", "bias")
    }


def base_module(model: Sdxl, path: str) -> nn.Linear | nn.Conv2d:
    """Return the module at a path in the UNet, without its adapter if it has one."""
    module = model.unet.get_submodule(path)
    if isinstance(module, AdaptedLayer):
        return module.base
    assert isinstance(module, nn.Linear | nn.Conv2d), path
    return module


@dataclass(frozen=True)
class Conversion:
    """The methods that a run uses to convert its base.

    With `has_teacher`, the target is the velocity of the EPS base. Over `bridge_steps` steps, the
    preconditioning moves linearly from that of the bridge to that of a flow model. `swapped` holds the
    tensors of a warm start.
    """

    has_teacher: bool = False
    bridge_steps: int = 0
    bridge: Bridge = field(default_factory=Bridge)
    swapped: SwappedTensors = field(default_factory=SwappedTensors)

    def preconditioning(self, noised: NoisedBatch, step: int) -> Preconditioning:
        """Return the preconditioning of the network after `step` finished steps."""
        flow = of_flow_model(noised.timestep)
        if step >= self.bridge_steps:
            return flow
        return interpolate(self.bridge.at(noised.times), flow, step / self.bridge_steps)

    def predict(self, network: Network, noised: NoisedBatch, batch: Batch, *, step: int) -> Tensor:
        """Return the velocity (batch, channels, h, w) after `step` finished steps."""
        return velocity_of(network, noised, batch, self.preconditioning(noised, step))

    def with_teacher(
        self, noised: NoisedBatch, batch: Batch, network: Network, injection: Injection
    ) -> NoisedBatch:
        """Mix the teacher's velocity into the target, by `teacher_share` at each noise level."""
        share = self.teacher_share(noised.times).to(noised.target).view(-1, 1, 1, 1)
        with torch.no_grad(), self.base_weights(injection):
            velocity = velocity_of(network, noised, batch, self.bridge.at(noised.times))
        return replace(noised, target=torch.lerp(noised.target, velocity, share))

    def teacher_share(self, levels: Tensor) -> Tensor:
        """Return 1 up to TEACHER_FADES_FROM, 0 beyond the end of the schedule, and linear values between."""
        end = self.bridge.highest
        return ((end - levels) / (end - TEACHER_FADES_FROM)).clamp(0, 1)

    @contextmanager
    def base_weights(self, injection: Injection) -> Iterator[None]:
        """Turn the network into the base model inside the block."""
        with injection.switched_off(), self.swapped.undone():
            yield


def velocity_of(network: Network, noised: NoisedBatch, batch: Batch, coefficients: Preconditioning) -> Tensor:
    """Return the velocity that the network predicts with a preconditioning, (batch, channels, h, w)."""
    inputs = coefficients.network_input(noised.latents)
    output = network(inputs, coefficients.timestep, batch.captions, batch.time_ids)
    return coefficients.velocity(output, noised.latents)
