"""Who sees which picture when: shuffled once per epoch, the same for any number of processes, from any position."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from classification.config import AugmentationConfig, DataConfig
from classification.data.loading import batches, eval_loader, open_data, train_loader
from classification.data.pictures import Noise
from classification.data.sampler import TrainSampler

SHAPES = {
    "length": st.integers(0, 300),
    "batch_size": st.integers(1, 9),
    "world": st.integers(1, 5),
    "accumulation": st.integers(1, 4),
    "repeats": st.integers(1, 4),
    "seed": st.integers(0, 2**31 - 1),
    "epoch": st.integers(0, 1000),
}


def ranks_batches(
    length: int,
    batch_size: int,
    world: int,
    accumulation: int = 1,
    repeats: int = 1,
    seed: int = 0,
    epoch: int = 0,
    first: int = 0,
) -> list[list[list[tuple[int, int]]]]:
    """The batches of every rank."""
    result = []
    for rank in range(world):
        sampler = TrainSampler(
            length, batch_size, seed=seed, rank=rank, world=world, accumulation=accumulation, repeats=repeats
        )
        sampler.set_position(epoch, first)
        result.append(list(sampler))
        assert len(result[-1]) == max(len(sampler) - first, 0)
    return result


@given(**SHAPES)
def test_all_ranks_together_show_every_position_once(length: int, repeats: int, **shape: int) -> None:
    shares = ranks_batches(length, repeats=repeats, **shape)
    shown = [sample for batches_ in shares for batch in batches_ for sample in batch]
    step = shape["batch_size"] * shape["world"] * shape["accumulation"]
    assert len(shown) == length // step * step
    assert len({seed for _, seed in shown}) == len(shown)  # one seed per position
    times = np.bincount([index for index, _ in shown], minlength=length)
    assert times.max(initial=0) <= repeats
    # all positions of a picture but those cut off at the end
    assert np.count_nonzero(times % repeats) <= 1
    assert {len(batch) for batches_ in shares for batch in batches_} <= {shape["batch_size"]}


@given(**SHAPES)
def test_a_step_has_the_same_pictures_however_it_is_shared_out(
    length: int, batch_size: int, world: int, accumulation: int, **order: int
) -> None:
    """`world` processes with `accumulation` batches each are one process with the product, and its seeds."""
    alone = ranks_batches(length, batch_size * world * accumulation, 1, **order)[0]
    shared = ranks_batches(length, batch_size, world, accumulation, **order)
    steps = [
        [sample for rank in shared for batch in rank[start : start + accumulation] for sample in batch]
        for start in range(0, len(shared[0]), accumulation)
    ]
    assert [sorted(step) for step in steps] == [sorted(step) for step in alone]


@given(first=st.integers(0, 40), **SHAPES)
def test_a_resumed_epoch_is_the_rest_of_it(first: int, **shape: int) -> None:
    whole = ranks_batches(**shape)
    rest = ranks_batches(**shape, first=first)
    assert rest == [batches_[first:] for batches_ in whole]


def test_repeats_of_a_picture_go_to_different_ranks_with_other_seeds() -> None:
    shares = ranks_batches(64, 4, world=4, repeats=4)
    pictures = [{index for batch in batches_ for index, _ in batch} for batches_ in shares]
    assert pictures[0] == pictures[1] == pictures[2] == pictures[3]
    assert len(pictures[0]) == 16
    assert all(len({index for index, _ in batch}) == 4 for batches_ in shares for batch in batches_)


def test_seeds_and_epochs_all_have_orders_of_their_own() -> None:
    orders = {str(ranks_batches(20, 5, 1, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert [index for batch in ranks_batches(20, 5, 1)[0] for index, _ in batch] != list(range(20))


def test_the_order_is_that_of_earlier_releases() -> None:
    """A checkpoint holds a position, not an order: who changes this breaks every resumed run."""
    order = [index for batch in ranks_batches(12, 4, 1, seed=3, epoch=2)[0] for index, _ in batch]
    assert order == [2, 7, 9, 0, 4, 1, 10, 6, 11, 8, 3, 5]


def test_a_position_counts_from_the_next_iterator_on() -> None:
    sampler = TrainSampler(40, 4, seed=0)
    begun = iter(sampler)
    sampler.set_position(1, 3)
    assert list(begun) == list(TrainSampler(40, 4, seed=0))
    assert list(sampler) == list(sampler)  # until it is set again


@pytest.mark.parametrize("workers", [0, 2])
def test_step_100_000_of_imagenet_comes_at_once(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.28 M pictures, batches of 8: the batch there is what the definition says, without those before it."""
    length, step, seed = 1_281_167, 100_000, 5
    config = DataConfig(kind="synthetic", synthetic_images=length, input_size=(3, 8, 8), batch_size=8, workers=workers)
    train, _ = open_data(config, AugmentationConfig())
    loader = train_loader(train, config, seed=seed, rank=1, world=2, accumulation=1, pin=False)
    epoch, batch = divmod(step, len(loader))
    assert (epoch, batch) == (1, 19928)
    loaded, load = [], Noise.load
    monkeypatch.setattr(Noise, "load", lambda pictures, index: loaded.append(index) or load(pictures, index))
    loader.batch_sampler.set_position(epoch, batch)
    found = next(batches(loader, torch.device("cpu")))
    assert len(loaded) <= 16
    permutation = np.random.default_rng([seed, epoch]).permutation(length)
    expected = permutation[batch * 16 : (batch + 1) * 16][1::2]
    assert found.indices.tolist() == expected.tolist()
    assert found.targets.tolist() == (expected % 1000).tolist()
    torch.testing.assert_close(found.images[3], train.load(int(expected[3]))[0], rtol=0, atol=0)


def test_a_loader_can_be_left_in_the_middle_and_moved() -> None:
    """Workers that prefetched for the old position do not answer for the new one."""
    config = DataConfig(kind="synthetic", synthetic_images=400, input_size=(3, 8, 8), batch_size=4, workers=2)
    train, _ = open_data(config, AugmentationConfig())
    loader = train_loader(train, config, seed=0, rank=0, world=1, pin=False)
    alone = train_loader(train, replace(config, workers=0), seed=0, rank=0, world=1, pin=False)
    for epoch, first in ((0, 0), (0, 50), (3, 7)):
        loader.batch_sampler.set_position(epoch, first)
        alone.batch_sampler.set_position(epoch, first)
        found, expected = (
            [batch.indices.tolist() for batch in islice(batches(each, torch.device("cpu")), 5)]
            for each in (loader, alone)
        )
        assert found == expected


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_evaluation_shares_are_exact(length: int, world: int) -> None:
    data = Noise(length, 3, (3, 4, 4))
    loaders = [eval_loader(data, 2, 0, rank=rank, world=world, pin=False) for rank in range(world)]
    shares = [[index for batch in loader for index in batch.indices.tolist()] for loader in loaders]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(loader) for loader in loaders] == [(len(share) + 1) // 2 for share in shares]


def test_the_order_of_imagenet_22k_takes_little_memory_and_time() -> None:
    sampler = TrainSampler(14_197_122, 128, seed=0, rank=3, world=64)
    sampler.set_position(5, 100)
    tracemalloc.start()
    begin = time.process_time()
    first = next(iter(sampler))
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(first) == 128
    assert peak < 200e6
    assert seconds < 10  # about 2 on two cores of an EPYC
