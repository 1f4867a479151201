"""The ring of device memory: every use sees its own tensor, and predicted uses do not wait for their copy."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from spectune.model.weight_stream import StreamedTensor, Transfers, WeightStream

CPU = torch.device("cpu")
KIB = 1024


def tensors(count: int, *, seed: int = 0) -> list[Tensor]:
    sizes = random.Random(seed)
    return [torch.full((sizes.randint(1, 12), 64), float(i), dtype=torch.bfloat16) for i in range(count)]


def streamed(
    count: int = 20, *, ring: int = 4 * KIB, transfers: Transfers | None = None
) -> list[StreamedTensor]:
    stream = WeightStream(CPU, ring_bytes=ring, transfers=transfers)
    return [stream.add(tensor) for tensor in tensors(count)]


def run(weights: list[StreamedTensor], order: list[int]) -> None:
    """Use weights in an order and check the values of each."""
    weights[0].stream.start_pass()
    for index in order:
        with weights[index].on_device() as tensor:
            assert torch.equal(tensor, weights[index].stored)


@dataclass
class Clocks(Transfers):
    """Two streams that run apart unless events order them, as on a GPU.

    An event is a pair (stream, number of its operations). Each stream knows how far it has waited for the
    other one.
    """

    operations: dict[str, int] = field(default_factory=lambda: {"copies": 0, "uses": 0})
    waited: dict[str, int] = field(default_factory=lambda: {"copies": 0, "uses": 0})
    written: dict[int, int] = field(default_factory=dict[int, int])  # byte -> operation that copied to it
    read: dict[int, int] = field(default_factory=dict[int, int])  # byte -> last use
    races: int = 0

    def copy(self, target: Tensor, source: Tensor) -> int:
        target.copy_(source)
        self.operations["copies"] += 1
        first = target.storage_offset() * target.element_size()
        for byte in range(first, first + target.nbytes, 128):
            self.races += self.read.get(byte, 0) > self.waited["copies"]
            self.written[byte] = self.operations["copies"]
        return self.operations["copies"]

    def before_use(self, copied: int) -> None:
        self.waited["uses"] = max(self.waited["uses"], copied)

    def use(self, tensor: Tensor) -> None:
        self.operations["uses"] += 1
        first = tensor.storage_offset() * tensor.element_size()
        for byte in range(first, first + tensor.nbytes, 128):
            self.races += self.written[byte] > self.waited["uses"]
            self.read[byte] = self.operations["uses"]

    def after_use(self) -> int:
        return self.operations["uses"]

    def before_copy(self, used: int) -> None:
        self.waited["copies"] = max(self.waited["copies"], used)


@pytest.mark.parametrize("ring", [0, 4 * KIB, 64 * KIB])
def test_every_use_sees_its_own_tensor(ring: int) -> None:
    weights = streamed(ring=ring)
    rng = random.Random(ring)
    order = [rng.randrange(20) for _ in range(300)]
    for _ in range(3):
        run(weights, order)
        run(weights, order[:120])  # a pass without gradients
        order[rng.randrange(300)] = rng.randrange(20)  # a step that differs
    stored = sum(-(-weight.nbytes // 512) * 512 for weight in weights)
    assert weights[0].stream.ring.numel() == max(min(ring, stored), 2 * 1536)


def test_a_repeated_pass_is_copied_ahead() -> None:
    weights = streamed()
    stream, order = weights[0].stream, [*range(20), *range(19, -1, -1)]
    run(weights, order)
    assert stream.late == 40
    for _ in range(4):
        run(weights, order)
    assert stream.late == 41  # the first use of the second pass
    run(weights, order[:20])
    run(weights, order)
    assert stream.late <= 43


def test_an_unexpected_use_costs_one_wait() -> None:
    weights = streamed()
    stream, order = weights[0].stream, list(range(20))
    run(weights, order)
    run(weights, order)
    before = stream.late
    run(weights, [*order[:10], 3, *order[11:]])
    assert stream.late - before == 10  # the rest of the pass is not predicted
    run(weights, order)
    assert stream.late - before <= 22


@pytest.mark.parametrize("ring", [0, 4 * KIB, 16 * KIB])
def test_copies_wait_for_uses_and_uses_for_copies(ring: int) -> None:
    clocks = Clocks()
    weights = streamed(ring=ring, transfers=clocks)
    rng = random.Random(7)
    order = [rng.randrange(20) for _ in range(100)]
    for count in (100, 100, 40, 100, 100):
        weights[0].stream.start_pass()
        for index in order[:count]:
            with weights[index].on_device() as tensor:
                clocks.use(tensor)
    assert clocks.races == 0
    assert clocks.operations["copies"] >= clocks.operations["uses"] == 440


@pytest.mark.parametrize("forgotten", ["before_use", "before_copy"])
def test_the_check_finds_a_forgotten_wait(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clocks, forgotten, lambda self, event: None)
    clocks = Clocks()
    weights = streamed(transfers=clocks)
    for _ in range(2):
        weights[0].stream.start_pass()
        for weight in weights:
            with weight.on_device() as tensor:
                clocks.use(tensor)
    assert clocks.races > 0


def test_copies_run_ahead_of_the_use() -> None:
    weights = streamed(ring=16 * KIB)
    run(weights, list(range(20)))
    run(weights, list(range(3)))
    assert len(weights[0].stream._ahead) >= 5


def test_memory_that_cannot_be_pinned_is_used_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def refuse(*sizes: int, pin_memory: bool = False, **options: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return plain(*sizes, **options)  # pyright: ignore

    stream = WeightStream(CPU)
    stream.is_pinned = True
    monkeypatch.setattr(torch, "empty", refuse)
    stored = stream.add(torch.ones(3)).stored
    assert stored.tolist() == [1, 1, 1]
    assert not stream.is_pinned
