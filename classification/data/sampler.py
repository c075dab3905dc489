"""Which pictures a process sees, and when: a function of seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Sampler


@dataclass(eq=False)
class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (picture, seed of its augmentation) for one rank; starts anywhere at once.

    An epoch has as many positions as there are pictures. Position p shows picture `permutation[p // repeats]`,
    augmented from generators that are seeded for p. Batch m of `rank` takes every `world`-th position of
    `[m * batch_size * world, (m + 1) * batch_size * world)`, so that one process with a batch of 8, two with 4, or one
    with 4 and 2 batches to a step put the same pictures into each step, and the repeats of a picture (arXiv:1901.09335)
    go to different ranks. Positions that do not fill a step of all ranks are left out.

    Args:
        length: pictures of the data set.
        batch_size: pictures per batch of one rank.
        seed: of the order and the augmentation.
        rank, world: this process, and how many there are.
        accumulation: batches that make one step.
        repeats: times that an epoch shows a picture.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    repeats: int = 1
    epoch: int = field(default=0, init=False)
    batch: int = field(default=0, init=False)

    def set_position(self, epoch: int, batch: int) -> None:
        """Where the next `iter()` begins; it ends with the epoch."""
        self.epoch = epoch
        self.batch = batch

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next `iter()` begins."""
        return self.length // (self.batch_size * self.world * self.accumulation) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.batch)  # the position counts now, not at the first batch

    def _batches(self, epoch: int, first: int) -> Iterator[list[tuple[int, int]]]:
        # seeded by both numbers: seed 1 must not be seed 0 an epoch later
        generator = np.random.default_rng([self.seed, epoch])
        # in half the memory for as long as the epoch lasts: 170 MB for ImageNet-22K
        permutation = generator.permutation(self.length).astype(np.uint32)
        seeds = generator.integers(2**63, size=self.length)
        step = self.batch_size * self.world
        for start in range(first * step, len(self) * step, step):
            positions = np.arange(start + self.rank, start + step, self.world)
            yield list(zip(permutation[positions // self.repeats].tolist(), seeds[positions].tolist(), strict=True))
