"""Refresh: fold the trained changes into the weights of the model, and take the frames anew.

A change in one frame has a rank of at most 2r. After k refreshes, the change since the start is a sum of
such changes in different directions, and can have any rank (ReLoRA: Lialin et al. 2023, arXiv 2307.05695).
W_k are the weights of the model in its dtype, c_k the rests that rounding them left over:

    M = W_k + c_k + dB (A0+dA) + B0 dA    in float32
    W_k+1 = round(M)
    c_k+1 = round(M - W_k+1)              in the dtype of the model, in main memory
    dA = dB = 0, (A0, B0) = the frame of W_k+1

Without c, rounding to bf16 would lose every change that is smaller than 2^-9 of its weight. With c, the sum
has twice the digits. A float32 model has no c. The optimizer starts anew, because its averages belong to the
old directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim import Optimizer

from spectune.adapters.adapter import LazyTensors
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Factors, stacked_down, stacked_up
from spectune.core.low_rank import LowRank, common_dtype, to_matrix
from spectune.files.source import TensorInfo, WeightSource
from spectune.model.inject import AdaptedLayer, Injection
from spectune.sdxl.layers import Layer, build_catalogue
from spectune.training.frames.making import make_frame
from spectune.training.recipe.sections.model import ModelSection
from spectune.training.resume.divergence import NotFinite
from spectune.training.seeds import derived_generator


@dataclass(frozen=True)
class Target:
    """A tensor of the checkpoint that contains trained layers."""

    info: TensorInfo  # as it is saved
    layers: tuple[Layer, ...]
    base: Tensor | None  # its values in the base, if some of its rows are not trained


@dataclass
class Refresher:
    """Refreshes the adapted layers of a run, and saves their weights as complete tensors."""

    section: ModelSection
    seed: int
    layers: Mapping[str, AdaptedLayer]
    targets: Mapping[str, Target]  # by the name of the tensor in the checkpoint
    rests: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # c by layer, on the CPU
    has_folded: bool = False  # in this run or before the resume

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether a refresh follows `step` finished steps of `steps`. The last step has one."""
        assert self.section.refresh_every_steps is not None
        return step % self.section.refresh_every_steps == 0 or step == steps

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate after `step` finished steps, below 1 after a refresh."""
        assert self.section.refresh_every_steps is not None
        refreshes, since = divmod(step, self.section.refresh_every_steps)
        warmup = self.section.refresh_warmup_steps
        return (since + 1) / (warmup + 1) if refreshes and since < warmup else 1.0

    @torch.no_grad()
    def refresh(self, step: int, optimizer: Optimizer, progress: Callable[[int, int], None]) -> None:
        """Fold all changes, take new frames, and reset the optimizer's state, after `step` finished steps.

        Raises:
            NotFinite: A weight is not finite.
        """
        for number, (name, layer) in enumerate(self.layers.items()):
            progress(number, len(self.layers))
            exact = from_main(self._sum(name), layer.down.device)
            if not bool(torch.isfinite(exact).all()):
                raise NotFinite(f"after step {step}, the trained change of {name} is not finite")
            weight = exact.to(layer.base.weight.dtype)
            if weight.dtype != exact.dtype:
                self.rests[name] = (exact - weight.to(exact.dtype)).to("cpu", weight.dtype)
            generator = derived_generator(self.seed, "refresh", step, name)
            frame = make_frame(weight, name, self.section, generator)
            down, up = (from_main(tensor, layer.down.device) for tensor in (frame.down, frame.up))
            layer.fold(weight, LowRank(down, up, frame.alpha))
        self.has_folded = True
        # keeps the groups with their options, and drops the state of every tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})

    def _sum(self, name: str) -> Tensor:
        """Return W + c + dB (A0+dA) + B0 dA in float32, on the device of the layer."""
        layer = self.layers[name]
        factors = Factors(layer.frame_down, layer.frame_up, layer.down.float(), layer.up.float())
        up, down = stacked_up(factors, layer.scale, torch.float32), stacked_down(factors, torch.float32)
        weight = layer.base.weight.detach()
        total = (to_matrix(up) @ to_matrix(down)).view(weight.shape)
        if name in self.rests:
            total += self.rests[name].to(total)
        return total.add_(weight.to(total))

    # ---------------------------------------------------------------- files

    def tensors(self, others: Mapping[str, Tensor]) -> LazyTensors:
        """Return the current weights with their changes, rounded once, by their names in the checkpoint.

        The result also has the tensors in `others` that contain no trained layer.
        """
        infos = {name: TensorInfo(name, one.dtype, tuple(one.shape)) for name, one in others.items()}
        infos |= {name: target.info for name, target in self.targets.items()}
        return LazyTensors(infos, lambda name: self._tensor(name) if name in self.targets else others[name])

    @torch.no_grad()
    def _tensor(self, name: str) -> Tensor:
        target = self.targets[name]
        whole = torch.empty(target.info.shape, dtype=target.info.dtype)
        if target.base is not None:
            whole.copy_(target.base)
        for layer in target.layers:
            whole[layer.row_slice].copy_(self._rounded_sum(layer.name))
        return whole

    def _rounded_sum(self, name: str) -> Tensor:
        layer = self.layers[name]
        weight = layer.base.weight.detach()
        # a rest of half a unit, itself rounded, would round the weight up again
        is_changed = bool(layer.down.any() or layer.up.any())
        return self._sum(name).to(weight.dtype) if is_changed else weight

    def state(self) -> dict[str, Any]:
        """Return the weights and the rests for a saved state after a refresh."""
        weights = {name: layer.base.weight.detach() for name, layer in self.layers.items()}
        return {"weights": weights, "rests": dict(self.rests)}

    @property
    def state_bytes(self) -> int:
        """The bytes of the state after a refresh."""
        weights = [layer.base.weight for layer in self.layers.values()]
        return sum(weight.nbytes * (1 if weight.dtype == torch.float32 else 2) for weight in weights)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the weights and the rests to those of a saved state."""
        for name, weight in state["weights"].items():
            self.layers[name].set_weight(weight)
        self.rests = dict(state["rests"])
        self.has_folded = True


def build_refresher(section: ModelSection, seed: int, injection: Injection) -> Refresher | None:
    """Return the refresher of a run, or None if the recipe has no refresh."""
    if section.refresh_every_steps is None:
        return None
    by_tensor: dict[str, list[Layer]] = {}
    with open_checkpoint(section.checkpoint) as base:
        for layer in build_catalogue(base, all_layers=True):
            if layer.name in injection.layers:
                by_tensor.setdefault(layer.tensor, []).append(layer)
        targets = {name: _target(name, layers, injection, base) for name, layers in by_tensor.items()}
    return Refresher(section, seed, injection.layers, targets)


def _target(name: str, layers: list[Layer], injection: Injection, base: WeightSource) -> Target:
    trained = [injection.layers[layer.name].base.weight.dtype for layer in layers]
    info = base.tensors[name]
    if sum(layer.shape[0] for layer in layers) == info.shape[0]:
        return Target(TensorInfo(name, common_dtype(trained), info.shape), tuple(layers), None)
    dtype = common_dtype([*trained, info.dtype])
    return Target(TensorInfo(name, dtype, info.shape), tuple(layers), base.load(name).clone())


def from_main(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor of the main process on all processes, because GPUs may round differently."""
    return cast("Tensor", broadcast(tensor.to(device).contiguous()))
