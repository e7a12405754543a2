"""Packs: every sample once, little room wasted, the same steps however many ranks share them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import TrainConfig
from train.data.packing import epoch_packs, epoch_steps, pack, sequential_packs, steps_from


def flat(packs) -> list[int]:
    return sorted(int(i) for members in packs for i in members)


def test_packing_by_hand() -> None:
    # Longest first: 9; 6; 5 fits neither; 4 beside the 6 (fits best), 3 beside the 5, 1 beside the 9.
    assert pack([5, 9, 1, 6, 4, 3], range(6), 10) == [[1, 2], [3, 4], [0, 5]]


@given(
    st.lists(st.integers(2, 100), min_size=1, max_size=300),
    st.integers(100, 400),
    st.integers(0, 3),
)
@settings(max_examples=60)
def test_an_epoch_has_every_sample_once(lengths: list[int], size: int, epoch: int) -> None:
    sizes = np.array(lengths)
    packs = epoch_packs(sizes, size, 3, epoch)
    assert flat(packs) == list(range(len(lengths)))
    assert all(len(members) for members in packs)
    assert all(sizes[members].sum() <= size for members in packs)
    again = epoch_packs(sizes, size, 3, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))
    assert flat(sequential_packs(sizes, size)) == list(range(len(lengths)))


@given(
    st.lists(st.integers(2, 100), min_size=1, max_size=200),
    st.integers(1, 7),
    st.integers(1, 9),
)
@settings(max_examples=60)
def test_ranks_share_the_steps_of_one(lengths: list[int], packs_per_step: int, world: int) -> None:
    sizes = np.array(lengths)
    alone = epoch_steps(sizes, 128, packs_per_step, 5, 1)
    shares = [epoch_steps(sizes, 128, packs_per_step, 5, 1, rank, world) for rank in range(world)]
    assert all(len(share) == len(alone) for share in shares)
    for step, *parts in zip(alone, *shares, strict=True):
        assert {len(part) for part in parts} == {-(-len(step) // world)}
        assert step is alone[-1] or len(step) == packs_per_step
        together = [tuple(members) for members in itertools.chain(*zip(*parts, strict=True))]
        wanted = [tuple(members) for members in step]
        assert together[: len(wanted)] == wanted
        assert not any(together[len(wanted) :])  # empty packs, so that all ranks have as many


def sample_shards(count: int, shards: int) -> np.ndarray:
    """Return shards of samples in no order, some of which have none, as after a split."""
    return np.random.default_rng(count).integers(0, shards, count) * 3


@given(
    st.lists(st.integers(2, 100), min_size=1, max_size=300),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(0, 3),
)
@settings(max_examples=60)
def test_a_block_shuffle_reads_each_shard_in_one_part_of_the_epoch(
    lengths: list[int], shards: int, together: int, epoch: int
) -> None:
    sizes, shard = np.array(lengths), sample_shards(len(lengths), shards)
    packs = epoch_packs(sizes, 128, 3, epoch, shard, together)
    assert flat(packs) == list(range(len(lengths)))
    assert all(sizes[members].sum() <= 128 for members in packs)
    again = epoch_packs(sizes, 128, 3, epoch, shard, together)
    assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))
    # A part begins where a pack has a shard that was not read before: it reads no shard of an earlier part.
    parts: list[set[int]] = [set()]
    for members in packs:
        wanted = set(shard[members].tolist())
        if wanted <= parts[-1]:
            continue
        if len(wanted | parts[-1]) > together:
            parts.append(set())
        parts[-1] |= wanted
    assert sum(map(len, parts)) == len(np.unique(shard))
    assert len(parts) == -(-len(np.unique(shard)) // together)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=40)
def test_ranks_share_the_steps_of_a_block_shuffle(packs_per_step: int, world: int, together: int) -> None:
    sizes, shard = np.random.default_rng(0).integers(2, 100, 150), sample_shards(150, 8)
    arguments = (sizes, 128, packs_per_step, 5, 1)
    alone = epoch_steps(*arguments, shards=shard, shuffle_shards=together)
    shares = [epoch_steps(*arguments, rank, world, shard, together) for rank in range(world)]
    for step, *parts in zip(alone, *shares, strict=True):
        given = [tuple(members) for members in itertools.chain(*zip(*parts, strict=True)) if len(members)]
        assert given == [tuple(members) for members in step]


def test_a_block_shuffle_orders_shards_and_samples_anew_each_epoch() -> None:
    lengths, shard = np.full(240, 10), np.repeat(np.arange(12), 20)
    orders = [np.concatenate(epoch_packs(lengths, 20, 0, epoch, shard, 3)) for epoch in range(3)]
    visits = [tuple(dict.fromkeys((shard[order]).tolist())) for order in orders]
    assert len(set(visits)) == 3
    for order in orders:  # samples of three shards are mixed, not read one after the other
        first = shard[order[:60]]
        assert len(set(first.tolist())) == 3
        assert np.count_nonzero(np.diff(first)) > 20


def test_epochs_and_seeds_differ() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 512)
    orders = [np.concatenate(epoch_packs(lengths, 4096, *key)) for key in ((0, 0), (0, 1), (1, 0))]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize(("size", "count"), [(4096, 4000), (8192, 4000), (16384, 20000)])
def test_log_normal_lengths_leave_little_room(size: int, count: int) -> None:
    """At most 3% of all slots; rows of one sample each, padded to the longest, would leave 78%."""
    lengths = np.random.default_rng(1).lognormal(6.5, 0.8, count).clip(16, 4096).astype(np.int64)
    for world, together in ((1, 1), (8, 8), (1, 128), (4, 128)):
        steps = [epoch_steps(lengths, size, together, 0, 0, rank, world) for rank in range(world)]
        tokens = np.array([[lengths[pack].sum() for step in share for pack in step] for share in steps])
        assert 1 - tokens.sum() / (tokens.size * size) < 0.03
        # Equal work a rank, but for what is left over at the end.
        assert (tokens.min(axis=0)[:-1] / size > 0.8).mean() > 0.98
        assert np.ptp(tokens.sum(axis=1)) < 2 * size


def test_what_cannot_be_shared_leaves_empty_packs() -> None:
    shares = [epoch_steps(np.array([7, 5]), 16, 3, 0, 0, rank, 3) for rank in range(3)]
    assert [[sorted(pack.tolist()) for step in share for pack in step] for share in shares] == [
        [[0, 1]],
        [[]],
        [[]],
    ]


NODES, RANKS, SHARDS, SHUFFLED = (1, 2, 4), (1, 2, 8), (1, 3, 16), (None, 1, 4)


@pytest.mark.parametrize("shuffled", SHUFFLED)
@pytest.mark.parametrize("shards", SHARDS)
def test_steps_are_the_same_for_any_nodes_and_ranks_and_after_a_resume_with_others(
    shards: int, shuffled: int | None
) -> None:
    """Each global step's packs, in order: of one process, and of all ranks of some nodes together."""
    generator = np.random.default_rng(shards)
    lengths = generator.integers(2, 120, 300)
    shard = np.sort(generator.integers(0, shards, len(lengths)))
    samples = generator.permutation(1000)[: len(lengths)]
    config = TrainConfig(batch_tokens=128, micro_batches_per_step=16, shuffle_shards=shuffled, seed=7)
    count = 25  # more than two epochs

    def steps(begin: int, world: int) -> list[tuple[int, int, list[list[int]]]]:
        """Steps from the run's step `begin` on."""
        epoch, number = alone[begin][:2] if begin else (0, 0)
        each = [steps_from(lengths, shard, samples, config, epoch, number, r, world) for r in range(world)]
        found = []
        for parts in itertools.islice(zip(*each, strict=True), count - begin):
            assert len({(part.epoch, part.number) for part in parts}) == 1
            packs = itertools.chain(*zip(*(part.packs for part in parts), strict=True))
            found.append((parts[0].epoch, parts[0].number, [members for members in packs if members]))
        return found

    alone: list[tuple[int, int, list[list[int]]]] = []
    alone = steps(0, 1)
    assert len(alone) == count
    assert alone[-1][0] >= 1
    first = [sample for epoch, _, packs in alone if not epoch for members in packs for sample in members]
    assert sorted(first) == sorted(samples.tolist())
    for nodes, ranks in itertools.product(NODES, RANKS):
        assert steps(0, nodes * ranks) == alone
        for begin in (1, 9, count - 1):
            assert steps(begin, nodes * ranks) == alone[begin:]
