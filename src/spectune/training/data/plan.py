"""The order of a run: the images of each batch, as a function of seed and position only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.data.tables.placements import Members
from spectune.training.data.tables.sequences import LazySequence
from spectune.training.seeds import derived_generator

MOST_DRAWS = 200_000_000  # of an epoch; their order takes 0.8 GB


@dataclass(frozen=True, slots=True)
class Draw:
    """One image in one batch."""

    image: int  # index into the dataset
    epoch: int
    repeat: int  # which of the image's repeats in this epoch
    position: int  # of its batch in the run


class BatchPlan:
    """A plan of batches of one size each. Every epoch shuffles images and batches again.

    The last batch of a bucket may be smaller: no image is dropped or repeated to fill it. An image takes 12
    bytes.
    """

    def __init__(self, buckets: Mapping[Size, Sequence[tuple[int, int]]], *, batch: int, seed: int) -> None:
        """Plan batches of `batch` images; `buckets` maps a size to its (image, repeats).

        Raises:
            InputError: An epoch has more than MOST_DRAWS draws.
        """
        self.batch, self.seed = batch, seed
        members = [_members(buckets[size]) for size in sorted(buckets)]
        self._draws = [one.draws for one in members]
        if sum(self._draws) > MOST_DRAWS:
            raise InputError(
                f"an epoch has {sum(self._draws):,} draws: at most {MOST_DRAWS:,}, because their order is in "
                "memory",
                hint="use fewer repeats and more epochs: raise run.epochs or run.steps",
            )
        # draw d is of image self._images[k] for the k with self._first[k] <= d < self._first[k + 1]
        self._images = np.concatenate([one.images for one in members])
        repeats = np.concatenate([one.repeats for one in members])
        self._first = np.concatenate([[0], np.cumsum(repeats, dtype=np.int64)])
        self.batches_per_epoch = sum(-(-draws // batch) for draws in self._draws)

    @property
    def batches_of_one(self) -> int:
        """The number of batches of an epoch that have one image."""
        return sum(draws % self.batch == 1 for draws in self._draws)

    def epoch(self, number: int) -> Epoch:
        """Return the batches of epoch `number`, counted from 0."""
        generator = derived_generator(self.seed, "order", number)
        order = np.empty(sum(self._draws), dtype=np.int32)
        starts = np.empty(self.batches_per_epoch + 1, dtype=np.int64)
        begin = batches = 0
        for draws in self._draws:
            order[begin : begin + draws] = torch.randperm(draws, generator=generator).numpy()
            order[begin : begin + draws] += begin
            own = np.arange(begin, begin + draws, self.batch)
            starts[batches : batches + len(own)] = own
            begin, batches = begin + draws, batches + len(own)
        starts[batches] = begin
        mixed = torch.randperm(batches, generator=generator).numpy()
        return Epoch(self, number, order, starts, mixed)

    def drawn(self, draws: NDArray[Any]) -> list[tuple[int, int]]:
        """Return the (image, repeat) of draws, which are counted over the buckets of an epoch."""
        rows = np.searchsorted(self._first, draws, side="right") - 1
        return list(zip(self._images[rows].tolist(), (draws - self._first[rows]).tolist(), strict=True))


@dataclass(frozen=True)
class Epoch(LazySequence[list[Draw]]):
    """The batches of one epoch, made when they are read."""

    plan: BatchPlan
    number: int
    order: NDArray[np.int32]  # of all draws; those of a batch are side by side
    starts: NDArray[np.int64]  # of the batches in `order`, and its end
    mixed: NDArray[np.int64]  # of the batches

    def __len__(self) -> int:
        return len(self.mixed)

    def item(self, index: int) -> list[Draw]:
        batch = self.mixed[index]
        position = self.number * len(self) + index
        drawn = self.plan.drawn(self.order[self.starts[batch] : self.starts[batch + 1]])
        return [Draw(image, self.number, repeat, position) for image, repeat in drawn]


class PlannedBatches(Sampler[list[Draw]]):
    """The batches at positions start..stop-1 of a plan."""

    batch_size = None  # tells accelerate that batch sizes differ
    drop_last = False

    def __init__(self, plan: BatchPlan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch: Epoch | None = None
        for position in range(self.start, self.stop):
            number, index = divmod(position, self.plan.batches_per_epoch)
            if epoch is None or epoch.number != number:
                epoch = self.plan.epoch(number)
            yield epoch[index]


def _members(images: Sequence[tuple[int, int]]) -> Members:
    if isinstance(images, Members):
        return images
    rows = np.array(images, dtype=np.int32).reshape(-1, 2)
    return Members(rows[:, 0], rows[:, 1])
