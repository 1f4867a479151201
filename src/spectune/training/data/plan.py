"""The order of a run: the images of each batch, as a function of seed and position only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.seeds import derived_generator

MOST_DRAWS = 5_000_000  # of an epoch; they take 1 GB


@dataclass(frozen=True, slots=True)
class Draw:
    """One image in one batch."""

    image: int  # index into the dataset
    epoch: int
    repeat: int  # which of the image's repeats in this epoch
    position: int  # of its batch in the run


class BatchPlan:
    """A plan of batches of one size each. Every epoch shuffles images and batches again.

    The last batch of a bucket may be smaller: no image is dropped or repeated to fill it.
    """

    def __init__(self, buckets: Mapping[Size, Sequence[tuple[int, int]]], *, batch: int, seed: int) -> None:
        """Plan batches of `batch` images; `buckets` maps a size to its (image, repeats).

        Raises:
            InputError: An epoch has more than MOST_DRAWS draws.
        """
        self.batch, self.seed = batch, seed
        count = sum(repeats for images in buckets.values() for _, repeats in images)
        if count > MOST_DRAWS:
            raise InputError(
                f"an epoch has {count:,} draws: at most {MOST_DRAWS:,}, because they are kept in memory",
                hint="use fewer repeats and more epochs: raise run.epochs or run.steps",
            )
        self._draws = [
            [(image, repeat) for image, repeats in buckets[size] for repeat in range(repeats)]
            for size in sorted(buckets)
        ]
        self.batches_per_epoch = sum(-(-len(draws) // batch) for draws in self._draws)

    @property
    def batches_of_one(self) -> int:
        """The number of batches of an epoch that have one image."""
        return sum(len(draws) % self.batch == 1 for draws in self._draws)

    def epoch(self, number: int) -> list[list[Draw]]:
        """Return the batches of epoch `number`, counted from 0."""
        generator = derived_generator(self.seed, "order", number)
        batches: list[list[tuple[int, int]]] = []
        for draws in self._draws:
            order = torch.randperm(len(draws), generator=generator).tolist()
            batches += [
                [draws[index] for index in order[start : start + self.batch]]
                for start in range(0, len(order), self.batch)
            ]
        first = number * self.batches_per_epoch
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [
            [Draw(image, number, repeat, first + offset) for image, repeat in batches[index]]
            for offset, index in enumerate(mixed)
        ]


class PlannedBatches(Sampler[list[Draw]]):
    """The batches at positions start..stop-1 of a plan."""

    batch_size = None  # tells accelerate that batch sizes differ
    drop_last = False

    def __init__(self, plan: BatchPlan, start: int, stop: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch: list[list[Draw]] = []
        number = -1
        for position in range(self.start, self.stop):
            if position // self.plan.batches_per_epoch != number:
                number = position // self.plan.batches_per_epoch
                epoch = self.plan.epoch(number)
            yield epoch[position % self.plan.batches_per_epoch]
