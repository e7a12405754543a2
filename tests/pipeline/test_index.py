"""The plan and the index tile exactly, whatever the samples; a mask's meaning is counted token by token."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import (
    SampleFacts,
    build_index,
    count_candidates,
    held_out,
    last_hidden_rows,
    plan_shards,
    sample_id,
)
from pipeline.cache.index import index_bytes, open_index
from pipeline.cache.split import kept_share

QUICK = settings(max_examples=100)

lengths_and_limit = st.tuples(st.lists(st.integers(2, 40), max_size=40), st.integers(2, 100))
masks = st.lists(st.integers(0, 1), min_size=2, max_size=40)


@QUICK
@given(lengths_and_limit)
def test_every_sample_lies_in_exactly_one_shard_in_order(case):
    lengths, limit = case
    shards = plan_shards(lengths, limit)
    assert [i for shard in shards for i in shard] == list(range(len(lengths)))
    assert all(len(shard) >= 1 for shard in shards)


@QUICK
@given(lengths_and_limit)
def test_a_shard_keeps_to_its_limit_unless_one_sample_alone_is_longer(case):
    lengths, limit = case
    for shard in plan_shards(lengths, limit):
        assert sum(lengths[i] for i in shard) <= limit or len(shard) == 1


@QUICK
@given(lengths_and_limit)
def test_a_shard_is_full(case):
    """Else a shard a sample would do, and a million files."""
    lengths, limit = case
    shards = plan_shards(lengths, limit)
    for shard, following in pairwise(shards):
        assert sum(lengths[i] for i in shard) + lengths[following[0]] > limit


@QUICK
@given(lengths_and_limit, st.integers(0, 40))
def test_a_plan_does_not_look_ahead(case, count):
    """More data later leaves the shards that are full as they are."""
    lengths, limit = case
    shards = plan_shards(lengths[:count], limit)
    assert plan_shards(lengths, limit)[: max(len(shards) - 1, 0)] == shards[:-1]


def test_a_plan_by_hand():
    assert plan_shards([5, 4, 2], 9) == [range(0, 2), range(2, 3)]
    assert plan_shards([5, 4, 2], 11) == [range(0, 3)]
    assert plan_shards([50, 4, 50], 10) == [range(0, 1), range(1, 2), range(2, 3)]
    assert plan_shards([], 10) == []


def facts_of(samples: list[dict]) -> SampleFacts:
    """The facts of samples as rows, turned into columns."""
    return SampleFacts(
        sample_ids=np.array([list(s["sample_id"]) for s in samples], dtype=np.uint8),
        sources=np.array([s["source"] for s in samples]),
        source_rows=np.array([s["source_row"] for s in samples]),
        lengths=np.array([s["length"] for s in samples]),
        last_rows=np.array([s["last_rows"] for s in samples]),
        candidates=np.array([s["candidates"] for s in samples]),
    )


@QUICK
@given(
    st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29), st.integers(1, 29)), min_size=1, max_size=30),
    st.integers(2, 60),
)
def test_the_index_tiles_every_shard(tmp_path_factory, triples, limit):
    expected = [
        {
            "sample_id": struct.pack(">16s", str(i).encode()),
            "source": i % 2,
            "source_row": 3 * i,
            "length": length,
            "last_rows": min(rows, length - 1),
            "candidates": min(candidates, rows, length - 1),
        }
        for i, (length, rows, candidates) in enumerate(triples)
    ]
    table, plan = build_index(facts_of(expected), plan_shards([f["length"] for f in expected], limit))
    rows = table.to_pylist()
    assert [{name: row[name] for name in expected[0]} for row in rows] == expected
    tokens, labels, samples = Counter(), Counter(), Counter()
    previous = 0
    for row in rows:
        shard = row["shard"]
        assert shard in (previous, previous + 1)
        assert row["token_start"] == tokens[shard]
        assert row["last_start"] == labels[shard]
        tokens[shard] += row["length"]
        labels[shard] += row["last_rows"]
        samples[shard] += 1
        previous = shard
    assert [(p.samples, p.tokens, p.last_rows) for p in plan] == [
        (samples[i], tokens[i], labels[i]) for i in range(len(plan))
    ]
    path = tmp_path_factory.getbasetemp() / "index.arrow"
    path.write_bytes(index_bytes(table))
    assert open_index(path, plan).equals(table)


def test_an_index_is_the_same_bytes_every_time():
    sample = {"sample_id": bytes(16), "source": 0, "length": 3, "last_rows": 2, "candidates": 1}
    facts = facts_of([{**sample, "source_row": i} for i in range(5)])
    table, _ = build_index(facts, plan_shards([3] * 5, 7))
    again, _ = build_index(facts, plan_shards([3] * 5, 7))
    assert index_bytes(table) == index_bytes(again)


@QUICK
@given(masks)
def test_label_rows_and_candidates_by_looking_at_every_position(mask):
    rows, candidates = [], 0
    for t in range(1, len(mask)):
        if mask[t]:
            rows.append(t - 1)
            candidates += mask[t - 1]
    array = np.array(mask, dtype=np.uint8)
    assert last_hidden_rows(array).tolist() == rows
    assert count_candidates(array) == candidates


@QUICK
@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), min_size=2, max_size=30))
def test_a_sample_id_is_the_hash_of_the_content(pairs):
    content = b"".join(struct.pack("<i", token) for token, _ in pairs) + bytes(m for _, m in pairs)
    expected = hashlib.sha256(content).digest()[:16]
    for dtype in (np.int32, np.int64):
        ids = np.array([token for token, _ in pairs], dtype=dtype)
        mask = np.array([m for _, m in pairs], dtype=np.uint8)
        assert sample_id(ids, mask) == expected
    assert sample_id(ids, np.array([m for _, m in pairs], dtype=bool)) == expected


# --- The held-out split --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_ids() -> np.ndarray:
    digests = [hashlib.sha256(str(i).encode()).digest()[:16] for i in range(20_000)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.9])
def test_about_the_share_asked_for_is_held_out(many_ids, fraction):
    """Within five standard deviations of a binomial."""
    count = held_out(many_ids, fraction).sum()
    expected = len(many_ids) * fraction
    assert abs(count - expected) < 5 * (expected * (1 - fraction)) ** 0.5


def test_nothing_and_everything(many_ids):
    assert not held_out(many_ids, 0.0).any()
    assert held_out(many_ids, 1.0).all()


def test_the_split_depends_on_the_id_alone(many_ids):
    side = {ids.tobytes(): bool(out) for ids, out in zip(many_ids, held_out(many_ids, 0.1), strict=True)}
    order = np.random.default_rng(0).permutation(len(many_ids))[:500]
    some = held_out(many_ids[order], 0.1)
    assert [side[many_ids[i].tobytes()] for i in order] == some.tolist()


def test_a_larger_share_holds_out_the_same_samples_and_more(many_ids):
    small, large = held_out(many_ids, 0.05), held_out(many_ids, 0.2)
    assert not (small & ~large).any()
    assert large.sum() > small.sum()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_a_share_of_the_training_samples_has_none_that_is_held_out(many_ids, share):
    kept, out = kept_share(many_ids, 0.1, share), held_out(many_ids, 0.1)
    assert not (kept & out).any()
    assert (kept == ~out).all() == (share == 1)
    expected = len(many_ids) * 0.9 * share
    assert abs(kept.sum() - expected) < 5 * expected**0.5


def test_a_smaller_share_is_part_of_a_larger_one(many_ids):
    assert not (kept_share(many_ids, 0.1, 0.2) & ~kept_share(many_ids, 0.1, 0.3)).any()


def test_the_split_by_hand():
    """The leading 32 bits, most significant byte first: 0x80000000 is exactly a half."""
    ids = np.zeros((4, 16), dtype=np.uint8)
    ids[0, :4] = [0x7F, 0xFF, 0xFF, 0xFF]
    ids[1, :4] = [0x80, 0x00, 0x00, 0x00]
    ids[2, :4] = [0x00, 0x00, 0x00, 0xFF]
    ids[3, 4:] = 255
    assert held_out(ids, 0.5).tolist() == [True, False, True, True]
    assert held_out(ids, 2**-24).tolist() == [False, False, True, True]
    assert held_out(ids[:0], 0.5).tolist() == []
