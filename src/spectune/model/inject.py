"""Inject adapters: trainable low-rank changes of the layers of a running model, in two forms.

Both forms compute the same function (derived in core/delta.py):

* delta:    the base layer holds W; dA and dB are trained from zero, A0 and B0 are fixed.
* residual: the base layer holds R = W - scale*B0 A0; A = A0+dA and B = B0+dB are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from spectune.core.delta import (
    Delta,
    Factors,
    Joined,
    added_to_residual,
    apply_low_rank,
    delta_between,
    delta_conv,
    delta_linear,
    stacked_down,
    stacked_up,
)
from spectune.core.low_rank import LowRank, weight_shape
from spectune.errors import InputError, counted, some_of
from spectune.model.joined_factors import Form, JoinedFactors, versions_of
from spectune.model.network import Sdxl
from spectune.model.packed_linear import PackedLinear


class AdaptedLayer(nn.Module):
    """A frozen linear layer or convolution with a trainable low-rank change.

    `down` is (rank, in) or (rank, in, kh, kw), `up` is (out, rank) or (out, rank, 1, 1). Both have the dtype
    `dtype`; products use the dtype of the input. In training, `dropout` is the probability of dropping each
    direction of the change (in the residual form: of the principal with its change).
    """

    frame_down: Tensor
    frame_up: Tensor

    def __init__(
        self,
        base: nn.Linear | nn.Conv2d,
        frame: LowRank,
        form: Form,
        dtype: torch.dtype,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.dropout = dropout
        self.form: Form = form
        self.scale = frame.scale
        self.alpha = frame.alpha
        self.enabled = True
        device = base.weight.device
        if form == "delta":
            # buffers, because they move with the model
            self.register_buffer("frame_down", frame.down.to(device), persistent=False)
            self.register_buffer("frame_up", frame.up.to(device), persistent=False)
        else:  # no step uses them: they stay where they are, in main memory
            self.frame_down, self.frame_up = frame.down, frame.up
        start_down = frame.down if form == "residual" else torch.zeros_like(frame.down)
        start_up = frame.up if form == "residual" else torch.zeros_like(frame.up)
        self.down = nn.Parameter(start_down.to(device=device, dtype=dtype, copy=True))
        self.up = nn.Parameter(start_up.to(device=device, dtype=dtype, copy=True))
        self.joined: dict[torch.dtype, Joined] = {}
        self.joined_versions: tuple[int, ...] | None = None
        self.joined_factors = JoinedFactors([self])

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # Norms return float32 there. The layer keeps the dtype of its weights.
            with torch.autocast(x.device.type, enabled=False):
                base = self.base
                return self(x.to(base.dtype if isinstance(base, PackedLinear) else base.weight.dtype))
        if not self.enabled:
            return self.base(x)
        if self.dropout and self.training:
            return self._with_dropout(x)
        joined, trained = self._joined(x.dtype), (self.down, self.up)
        if isinstance(self.base, nn.Conv2d):
            return self.base(x).add_(delta_conv(x, self.base, self.scale, joined, trained))
        return delta_linear(x, self.base, self.scale, joined, trained)

    def _joined(self, dtype: torch.dtype) -> Joined:
        """Return the current joined factors."""
        # torch.compile would compile anew for each version; trainings refresh after each step anyway
        if not torch.compiler.is_compiling() and self.joined_versions != versions_of(self):
            self.joined_factors.refresh()
        if dtype not in self.joined:
            self.joined_factors.add_dtype(self, dtype)
        return self.joined[dtype]

    def _with_dropout(self, x: Tensor) -> Tensor:
        """Drop directions: by plain autograd, which costs more launches and memory."""
        if self.form == "residual":
            down, up, halves = self.down.to(x.dtype), self.up.to(x.dtype), 1
        else:
            factors = Factors(A0=self.frame_down, B0=self.frame_up, dA=self.down, dB=self.up)
            down, up, halves = stacked_down(factors, x.dtype), stacked_up(factors, 1.0, x.dtype), 2
        low_rank = apply_low_rank(x, self.base, down, up, dropout=self.dropout, halves=halves)
        return self.base(x).add_(low_rank, alpha=self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the tensors; the joined factors follow at their next use."""
        super()._apply(fn, recurse)
        self.joined_versions = None
        return self

    @property
    def frame(self) -> LowRank:
        """The frame, on the layer's device in the delta form and in main memory in the residual form."""
        return LowRank(self.frame_down, self.frame_up, self.alpha)

    def trained_change(self) -> tuple[Tensor, Tensor]:
        """Return dA and dB on their device, in the trained dtype.

        The residual form copies the frame to the device for it.
        """
        if self.form == "delta":
            return self.down.detach(), self.up.detach()
        down, up = self.down.detach(), self.up.detach()
        return down - self.frame_down.to(down.device), up - self.frame_up.to(up.device)

    def delta(self) -> Delta:
        """Return the current change: its frame, and dA and dB in float32, on the CPU."""
        # moved to the CPU before the cast: float32 copies of all layers would take another GB on the GPU
        frame = LowRank(down=self.frame_down.cpu(), up=self.frame_up.cpu(), alpha=self.alpha)
        down, up = self.down.detach().cpu().float(), self.up.detach().cpu().float()
        if self.form == "residual":
            return delta_between(frame, LowRank(down=down, up=up, alpha=self.alpha))
        return Delta(frame=frame, down=down.clone(), up=up.clone())

    @torch.no_grad()
    def reframe(self, frame: LowRank, *, dtype: torch.dtype | None = None) -> None:
        """Replace the frame before training. The new frame may have another rank.

        The trainable tensors are replaced with new ones in `dtype`.

        Raises:
            InputError: The layer has the residual form, or training has started.
        """
        if self.form == "residual":
            raise InputError("the residual form cannot change its frame", hint='set model.form = "delta"')
        if self.down.any() or self.up.any():
            raise InputError(
                "the frame cannot change after training has started",
                hint="start a new run with the other frame",
            )
        device, dtype = self.down.device, dtype or self.down.dtype
        self.frame_down, self.frame_up = frame.down.to(device), frame.up.to(device)
        self.scale, self.alpha = frame.scale, frame.alpha
        self.down = nn.Parameter(torch.zeros_like(self.frame_down, dtype=dtype))
        self.up = nn.Parameter(torch.zeros_like(self.frame_up, dtype=dtype))
        self.joined_versions = None

    @torch.no_grad()
    def fold(self, weight: Tensor, frame: LowRank) -> None:
        """Set the weight and the frame, and the trained change to zero, in the delta form.

        The trainable tensors stay the same objects. The frame must have the rank of the current one.
        """
        assert self.form == "delta"
        assert frame.alpha == self.alpha
        self.set_weight(weight)
        self.frame_down.copy_(frame.down)
        self.frame_up.copy_(frame.up)
        self.down.zero_()
        self.up.zero_()
        self.joined_versions = None

    def set_weight(self, weight: Tensor) -> None:
        """Set the weight of the frozen layer."""
        streamed = getattr(self.base, "streamed", None)
        if streamed is not None:
            streamed.overwrite(weight)
        else:  # a new tensor: the old one may be memory-mapped from the checkpoint
            self.base.weight.data = weight.to(self.base.weight)

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        """Load a trained change; raise InputError if it belongs to another frame."""
        frame = delta.frame
        same = _same(frame.down, self.frame_down) and _same(frame.up, self.frame_up)
        if not same or frame.alpha != self.alpha:
            raise InputError(
                "the trained change belongs to another frame",
                hint="use the principal that it was trained from",
            )
        start = delta if self.form == "delta" else added_to_residual(delta)
        self.down.copy_(start.down)
        self.up.copy_(start.up)


@dataclass(frozen=True)
class Injection:
    """The adapted layers of a model by layer name; `eject` undoes `inject`."""

    layers: Mapping[str, AdaptedLayer]
    places: Mapping[str, tuple[nn.Module, str]]  # the parent module and attribute of each layer
    joined_factors: JoinedFactors = field(init=False)

    def __post_init__(self) -> None:
        layers = list(self.layers.values())
        object.__setattr__(self, "joined_factors", JoinedFactors(layers))
        for layer in layers:
            layer.joined_factors = self.joined_factors

    def parameters(self) -> list[nn.Parameter]:
        """Return all trainable tensors in layer order: down, up, down, up, ..."""
        return [tensor for layer in self.layers.values() for tensor in (layer.down, layer.up)]

    def named_deltas(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the trainable pair (down, up) of each layer."""
        return {name: (layer.down, layer.up) for name, layer in self.layers.items()}

    def frames(self) -> dict[str, LowRank]:
        """Return the frame of each layer; see `AdaptedLayer.frame` for its device."""
        return {name: layer.frame for name, layer in self.layers.items()}

    def deltas(self) -> dict[str, Delta]:
        """Return the current change of each layer, on the CPU."""
        return {name: layer.delta() for name, layer in self.layers.items()}

    def load(self, deltas: Mapping[str, Delta]) -> None:
        """Load trained changes, one for each injected layer.

        Raises:
            InputError: The layers or their frames differ from the injected ones.
        """
        if set(deltas) != set(self.layers):
            unmatched = sorted(set(deltas) ^ set(self.layers))
            raise InputError(
                f"the trained adapter and this run differ in {counted(len(unmatched), 'layer')}: "
                f"{some_of(unmatched)}",
                hint="use the principal, parts and layers that the adapter was trained with",
            )
        for name, layer in self.layers.items():
            layer.load(deltas[name])

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Disable the adapters inside the block. In the delta form, the model is then the original one."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def eject(self) -> None:
        """Put the original modules back."""
        for name, (parent, attribute) in self.places.items():
            setattr(parent, attribute, self.layers[name].base)


def inject(
    model: Sdxl,
    frames: Mapping[str, LowRank],
    *,
    form: Form = "delta",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> Injection:
    """Make the layers in `frames` trainable and freeze all other parameters.

    The model must hold the original weights for the delta form, and the residual for the residual form.

    Raises:
        InputError: The model lacks a layer, or a frame does not fit the shape of its layer.
    """
    for module in (model.unet, model.te1, model.te2):
        module.requires_grad_(False)
    layers: dict[str, AdaptedLayer] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    for name, frame in frames.items():
        parent, attribute = model.place(name)
        base = getattr(parent, attribute)
        _check_fit(name, base, frame)
        layers[name] = AdaptedLayer(base, frame, form, dtype, dropout)
        places[name] = (parent, attribute)
        setattr(parent, attribute, layers[name])
    return Injection(layers=layers, places=places)


def _same(saved: Tensor, tensor: Tensor) -> bool:
    """Return whether `tensor` equals `saved` after a cast to the dtype of `saved`."""
    return torch.equal(saved, tensor.cpu().to(saved.dtype))


def _check_fit(name: str, base: nn.Module, frame: LowRank) -> None:
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise InputError(f"{name} is a {type(base).__name__}: expected a linear layer or a convolution")
    shape = weight_shape(frame)
    if tuple(base.weight.shape) != shape:
        raise InputError(
            f"{name}: the frame is for a weight of shape {shape}, the model has {tuple(base.weight.shape)}",
            hint="the principal belongs to another checkpoint: use the checkpoint that it was split from",
        )
