"""Keep frozen weights in main memory and copy each to the GPU shortly before its use.

A ring of GPU memory holds the weights in use and those that are copied ahead. The order of uses is recorded
in each pass and predicts the next one: while the GPU computes with a weight, the following ones are copied on
a stream of their own. Nothing waits on the host. Results do not depend on the prediction, only the time does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RING_BYTES = 256 << 20  # SDXL's largest weight takes 59 MB in 16 bits
_ARENA_BYTES = 256 << 20  # torch rounds each pinned allocation up to a power of two
_ALIGNMENT = 512

Event = Any  # torch.cuda.Event; None if operations are synchronous


class Transfers:
    """Copies that are finished when `copy` returns, as on the CPU."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Copy in the order of the calls; return an event after the copy."""
        target.copy_(source)

    def before_use(self, copied: Event) -> None:
        """Make the computation wait for a copy."""

    def after_use(self) -> Event:
        """Return an event after everything that was issued to the computation."""

    def before_copy(self, used: Event) -> None:
        """Make further copies wait for a use."""

    def finish(self) -> None:
        """Wait on the host until all copies are made."""


class CudaTransfers(Transfers):
    """Copies on a stream of their own, while the current stream computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Start a copy."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def before_use(self, copied: Event) -> None:
        """Make the current stream wait."""
        torch.cuda.current_stream(self._device).wait_event(copied)

    def after_use(self) -> Event:
        """Record an event on the current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def before_copy(self, used: Event) -> None:
        """Make the stream of the copies wait."""
        self._stream.wait_event(used)

    def finish(self) -> None:
        """Wait for the stream of the copies."""
        self._stream.synchronize()


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor in main memory that is copied to the GPU for each use."""

    stream: WeightStream
    index: int
    stored: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stored.nbytes

    @contextmanager
    def on_device(self) -> Iterator[Tensor]:
        """Keep the tensor on the device inside the block."""
        copy = self.stream.fetch(self.index)
        try:
            yield copy.tensor
        finally:
            self.stream.release(copy)

    def overwrite(self, values: Tensor) -> None:
        """Replace the values, between two uses."""
        self.stream.forget_copies()
        self.stored.copy_(values)


@dataclass
class Copy:
    """A tensor in the ring, at bytes `start` to `end`."""

    index: int
    start: int
    end: int
    tensor: Tensor
    copied: Event
    is_free: bool = False  # no further use will be issued
    used: Event = None  # after the last use; None if it was never used


class WeightStream:
    """Tensors in main memory, and the ring of device memory that they are copied to.

    `late` counts the uses whose copy did not start ahead.
    """

    def __init__(
        self, device: torch.device, *, ring_bytes: int = RING_BYTES, transfers: Transfers | None = None
    ) -> None:
        self.device = device
        self.is_pinned = device.type == "cuda"
        self.late = 0
        if transfers is None:
            transfers = CudaTransfers(device) if device.type == "cuda" else Transfers()
        self._transfers = transfers
        self._ring_bytes = ring_bytes
        self._arena: Tensor | None = None
        self._arena_used = 0
        self._tensors: list[Tensor] = []
        self._ring: Tensor | None = None
        self._copies: deque[Copy] = deque()  # in the ring, the oldest first
        self._head = 0  # the byte of the ring where the next copy starts
        self._ahead: deque[Copy] = deque()  # copied and not yet used
        self._plan: list[int] = []  # the uses of the last pass
        self._next = 0  # the position in the plan of the next copy; beyond its end: of the pass after it
        self._pass: list[int] = []  # the uses of this pass

    # ---------------------------------------------------------------- tensors in main memory

    def add(self, tensor: Tensor) -> StreamedTensor:
        """Copy a tensor to main memory, which is pinned for a CUDA device."""
        assert self._ring is None, "tensors cannot be added after the first use"
        stored = tensor if tensor.is_meta else self._reserve(tensor).copy_(tensor)
        self._tensors.append(stored)
        return StreamedTensor(self, len(self._tensors) - 1, stored)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in main memory."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def _reserve(self, like: Tensor) -> Tensor:
        nbytes = _aligned(like.nbytes)
        if self._arena is None or self._arena_used + nbytes > self._arena.numel():
            self._arena, self._arena_used = self._allocate(max(nbytes, _ARENA_BYTES)), 0
        reserved = _at(self._arena, self._arena_used, like)
        self._arena_used += nbytes
        return reserved

    def _allocate(self, nbytes: int) -> Tensor:
        if self.is_pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system limits pinned memory
                self.is_pinned = False
        return torch.empty(nbytes, dtype=torch.uint8)

    # ---------------------------------------------------------------- uses

    def start_pass(self) -> None:
        """Note that a pass begins. Its uses are predicted from the last pass."""
        # A pass without gradients has only the first uses of a training pass: keep the longer plan.
        if self._pass and not self._is_planned:
            self._plan = self._pass
        self._pass = []
        if [copy.index for copy in self._ahead] != self._plan[: len(self._ahead)]:
            self._forget_ahead()
        self._next = len(self._ahead)

    def fetch(self, index: int) -> Copy:
        """Return a copy of a tensor that is ready for the current stream; `release` must follow."""
        if self._ahead and self._ahead[0].index == index:
            copy = self._ahead.popleft()
            self._pass.append(index)
        else:
            self._forget_ahead()
            copy = self._copy(index)
            assert copy is not None, "a tensor in use fills the ring"
            self.late += 1
            self._pass.append(index)
            self._next = len(self._pass)
        self._transfers.before_use(copy.copied)
        self._copy_ahead()
        return copy

    def forget_copies(self) -> None:
        """Drop the copies that were made ahead, when none is still being made."""
        self._forget_ahead()
        self._transfers.finish()

    def release(self, copy: Copy) -> None:
        """Note that all uses of a copy are issued to the current stream."""
        copy.is_free, copy.used = True, self._transfers.after_use()

    @property
    def _is_planned(self) -> bool:
        """Whether the uses of this pass are those of the plan so far."""
        return self._pass == self._plan[: len(self._pass)]

    def _copy_ahead(self) -> None:
        """Start copies of the next tensors of the plan while there is room in the ring."""
        if not self._plan or not (self._ahead or self._is_planned):
            return
        while len(self._ahead) < len(self._plan):  # the plan is followed by the next pass
            copy = self._copy(self._plan[self._next % len(self._plan)])
            if copy is None:
                return
            self._ahead.append(copy)
            self._next += 1

    def _forget_ahead(self) -> None:
        for copy in self._ahead:
            copy.is_free = True
        self._ahead.clear()

    # ---------------------------------------------------------------- the ring

    @property
    def ring_bytes(self) -> int:
        """Bytes that the stream takes on the device."""
        return ring_size([tensor.nbytes for tensor in self._tensors], self._ring_bytes)

    @property
    def ring(self) -> Tensor:
        """The memory on the device, allocated at the first access."""
        if self._ring is None:
            with torch.inference_mode(False):  # a ring that was made there could not be written elsewhere
                self._ring = torch.empty(self.ring_bytes, dtype=torch.uint8, device=self.device)
        return self._ring

    def _copy(self, index: int) -> Copy | None:
        """Start a copy to the ring; return None if the oldest copy there is still needed."""
        stored, ring = self._tensors[index], self.ring
        start = self._make_room(_aligned(stored.nbytes))
        if start is None:
            return None
        tensor = _at(ring, start, stored)
        copy = Copy(index, start, self._head, tensor, self._transfers.copy(tensor, stored))
        self._copies.append(copy)
        return copy

    def _make_room(self, nbytes: int) -> int | None:
        """Return where the next copy starts and move the head behind it, or return None."""
        wraps = self._head + nbytes > self.ring.numel()
        start = 0 if wraps else self._head
        replaced: list[Copy] = []
        for copy in self._copies:
            overlaps = copy.start < start + nbytes and copy.end > start
            if not overlaps and not (wraps and copy.start >= self._head):
                break
            if not copy.is_free:
                return None
            replaced.append(copy)
        for copy in replaced:
            self._copies.popleft()
            if copy.used is not None:
                self._transfers.before_copy(copy.used)
        self._head = start + nbytes
        return start


def ring_size(sizes: Sequence[int], ring_bytes: int = RING_BYTES) -> int:
    """Return the bytes of a ring for tensors of `sizes` bytes: at least two of the largest have room."""
    aligned = [_aligned(nbytes) for nbytes in sizes]
    return max(min(ring_bytes, sum(aligned)), 2 * max(aligned, default=0))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a view of bytes as a tensor with the shape and dtype of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
