"""Which samples share a forward, and which batches make a shard: a pure function of the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import capture.batching
from capture.batching import WINDOW_SAMPLES, CapturePlan, plan_capture
from capture.options import CaptureOptions
from pipeline.cache.progress.claims import take_shards

BATCH_TOKENS, SHARD_TOKENS = CaptureOptions.batch_tokens, CaptureOptions.shard_tokens
lists_of_lengths = st.lists(st.integers(1, 200), max_size=60)


def plan(lengths: list[int], batch_tokens: int, shard_tokens: int, window: int = 4096) -> CapturePlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture.batching, "WINDOW_SAMPLES", window)
        return plan_capture(np.array(lengths, dtype=np.int32), batch_tokens, shard_tokens)


def as_rows(found: CapturePlan) -> list[list[list[int]]]:
    """Samples of the data, by shard and batch."""
    return [
        [[int(found.order[i]) for i in batch] for batch in found.batches_of(shard)]
        for shard in range(len(found.shard_batches))
    ]


@pytest.mark.parametrize("spread", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("count", [WINDOW_SAMPLES, 20_000])
def test_padding_is_at_most_5_percent_on_log_normal_lengths(spread, count):
    generator = np.random.default_rng(7)
    lengths = generator.lognormal(np.log(950) - spread**2 / 2, spread, count).astype(np.int32).clip(2, 4096)
    assert 850 < lengths.mean() < 1000
    found = plan_capture(lengths, BATCH_TOKENS, SHARD_TOKENS)
    padded = sum(len(batch) * int(max(lengths[found.order[i]] for i in batch)) for batch in found.batches)
    assert found.padded_tokens == padded
    assert found.tokens == lengths.sum()
    assert found.padding == pytest.approx(1 - lengths.sum() / padded)
    assert found.padding <= 0.05


@given(lists_of_lengths, st.integers(2, 600), st.integers(2, 900), st.integers(1, 70))
def test_every_sample_is_captured_once_within_the_budgets(lengths, batch_tokens, shard_tokens, window):
    shards = as_rows(plan(lengths, batch_tokens, shard_tokens, window))
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(len(lengths)))
    for shard in shards:
        assert shard
        rows = [i for batch in shard for i in batch]
        assert len(rows) == 1 or sum(lengths[i] for i in rows) <= shard_tokens
        for batch in shard:
            assert batch
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens


@given(lists_of_lengths, st.integers(2, 600), st.integers(2, 900), st.integers(1, 70))
def test_shards_are_whole_batches_in_the_order_of_the_cache(lengths, batch_tokens, shard_tokens, window):
    found = plan(lengths, batch_tokens, shard_tokens, window)
    assert [i for batch in found.batches for i in batch] == list(range(len(lengths)))
    assert [b for shard in found.shard_batches for b in shard] == list(range(len(found.batches)))
    assert [i for shard in found.shards for i in shard] == list(range(len(lengths)))
    for shard, samples in enumerate(found.shards):
        assert [i for batch in found.batches_of(shard) for i in batch] == list(samples)


@given(lists_of_lengths, st.integers(2, 600), st.integers(1, 70))
def test_samples_are_sorted_longest_first_inside_windows(lengths, batch_tokens, window):
    found = plan(lengths, batch_tokens, 900, window)
    for start in range(0, len(lengths), window):
        rows = found.order[start : start + window].tolist()
        inside = range(start, min(start + window, len(lengths)))
        assert rows == sorted(inside, key=lambda i: (-lengths[i], i))
    for batch in found.batches:
        assert batch.start // window == (batch.stop - 1) // window, "a batch of two windows"


@given(lists_of_lengths, st.integers(2, 600), st.integers(2, 900))
def test_the_plan_is_a_function_of_the_lengths(lengths, batch_tokens, shard_tokens):
    one, other = (as_rows(plan(lengths, batch_tokens, shard_tokens)) for _ in range(2))
    assert one == other
    # A longer tail leaves the windows before it as they were.
    longer = plan([*lengths, 5, 6], batch_tokens, shard_tokens, window=max(1, len(lengths)))
    assert longer.order[: len(lengths)].tolist() == plan(lengths, batch_tokens, shard_tokens).order.tolist()


def test_a_plan_by_hand():
    # Longest first: 9 (row 2), 5 (row 0), 2 (rows 1 and 4, as they come), 1 (row 3).
    # Two rows as wide as 5 fit 10 tokens, three do not; 2 and 1 are as wide as 2. Shards of 12: 9 and no 7.
    assert as_rows(plan([5, 2, 9, 1, 2], 10, 12)) == [[[2]], [[0, 1], [4, 3]]]
    # Windows of two: (5, 2), (9, 1), (2).
    assert as_rows(plan([5, 2, 9, 1, 2], 10, 12, window=2)) == [[[0, 1]], [[2], [3], [4]]]
    # A shard's budget ends a batch too.
    assert as_rows(plan([4, 4, 4], 100, 8)) == [[[0, 1]], [[2]]]
    # One that fits no budget goes alone.
    assert as_rows(plan([3, 50, 4], 10, 12)) == [[[1]], [[2, 0]]]
    assert plan([5, 2, 9, 1, 2], 10, 12).padded_tokens == 9 + 2 * 5 + 2 * 2
    assert as_rows(plan([], 10, 12)) == []


class Everything:
    """Stands in for a cache's writer and a worker's claims: nothing is written or held by anybody yet."""

    def __init__(self, shards: int):
        self.manifest = type("Manifest", (), {"plan": range(shards)})
        self.taken: set[str] = set()
        self.progress = type("Folder", (), {"is_dir": lambda self: True})()

    def written(self, shard: int) -> bool:
        return False

    def claim(self, name: str) -> bool:
        free = name not in self.taken
        self.taken.add(name)
        return free


@given(st.integers(0, 40), st.integers(1, 7), st.integers(0, 2**32))
def test_any_number_of_workers_in_any_order_takes_every_shard_once(shards, world, seed):
    cache = Everything(shards)
    workers = [take_shards(cache, cache, rank, world) for rank in range(world)]
    generator, taken = np.random.default_rng(seed), []
    while workers:
        worker = workers[generator.integers(len(workers))]
        shard = next(worker, None)
        if shard is None:
            workers.remove(worker)
        else:
            taken.append(shard)
    assert sorted(taken) == list(range(shards))
