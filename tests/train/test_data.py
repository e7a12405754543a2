"""Order, batches and schedule."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import CacheReader
from tests.train.drafts import small_model
from train.batches import load_batch, load_blocks, prefetch, random_anchors, spread_anchors
from train.config import TrainConfig
from train.optim import build_optimizer, learning_rate
from train.order import epoch_batches, sequential_batches


@given(st.lists(st.integers(2, 500), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60)
def test_an_epoch_has_every_sample_once(lengths: list[int], size: int, epoch: int) -> None:
    sizes = np.array(lengths)
    batches = epoch_batches(sizes, size, 3, epoch)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    again = epoch_batches(sizes, size, 3, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert sorted(itertools.chain(*sequential_batches(sizes, size))) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_and_lengths_are_alike() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 512)
    orders = [
        np.concatenate(epoch_batches(lengths, 8, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))
    batches = epoch_batches(lengths, 8, 0, 0)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.1 * lengths.sum()  # in random order: 1.77


@pytest.fixture(scope="module")
def reader(cache_dir: Path) -> CacheReader:
    return CacheReader(cache_dir)


def test_a_batch_holds_exactly_the_samples(reader: CacheReader) -> None:
    samples, layers = [7, 0, 21], (4, 0)
    batch = load_batch(reader, samples, layers, random_anchors(6, 0, 0))
    width = max(int(reader.lengths[i]) for i in samples)
    assert batch.target_hidden_states.shape == (3, width, 2 * reader.hidden_size)
    for row, i in enumerate(samples):
        sample = reader.read(i, layers)
        length = len(sample.input_ids)
        assert torch.equal(batch.input_ids[row, :length], sample.input_ids.long())
        assert torch.equal(batch.loss_mask[row, :length], sample.loss_mask)
        assert torch.equal(batch.target_hidden_states[row, :length], sample.context)
        # The teacher of every supervised label t >= 1 sits at t - 1; nothing sits elsewhere.
        labels = [t for t in range(1, length) if sample.loss_mask[t]]
        assert torch.equal(batch.target_last_hidden_states[row, [t - 1 for t in labels]], sample.last_hidden)
        rest = [p for p in range(width) if p + 1 not in labels]
        assert not batch.target_last_hidden_states[row, rest].any()
        assert not batch.loss_mask[row, length:].any()
        assert not batch.input_ids[row, length:].any()


def test_anchors_depend_on_the_sample_alone(reader: CacheReader) -> None:
    choose = random_anchors(4, seed=5, epoch=2)
    together = load_batch(reader, [3, 9, 14], (0,), choose)
    for row, i in enumerate((3, 9, 14)):
        alone = load_batch(reader, [i], (0,), choose)
        kept = together.anchor_positions[row][together.block_keep_mask[row]]
        assert torch.equal(kept, alone.anchor_positions[0][alone.block_keep_mask[0]])
        mask = alone.loss_mask[0].tolist()
        assert all(mask[p] and mask[p + 1] for p in kept.tolist())
        assert kept.tolist() == sorted(set(kept.tolist()))
    other = [
        load_batch(reader, [3], (0,), random_anchors(4, s, e)).anchor_positions for s, e in ((5, 3), (6, 2))
    ]
    first = load_batch(reader, [3], (0,), choose).anchor_positions
    assert not any(torch.equal(first, anchors) for anchors in other)


def test_spread_anchors_by_hand() -> None:
    choose = spread_anchors(3)
    assert choose(np.array([2, 3, 4, 9, 11]), b"").tolist() == [2, 4, 11]
    assert choose(np.array([2, 9]), b"").tolist() == [2, 9]


def test_the_denominator_is_known_before_the_forward(reader: CacheReader) -> None:
    batch = load_batch(reader, [1, 2, 3], (0,), random_anchors(5, 0, 0))
    expected = 0.0
    for row in range(3):
        mask = batch.loss_mask[row].tolist()
        for anchor, keep in zip(
            batch.anchor_positions[row].tolist(), batch.block_keep_mask[row], strict=True
        ):
            for k in range(3):
                if not keep or anchor + k + 1 >= len(mask) or not mask[anchor + k + 1]:
                    break
                expected += math.exp(-k / 4)
    assert batch.weight(3, 4.0).item() == pytest.approx(expected)
    blocks = load_blocks(reader, [1, 2, 3], random_anchors(5, 0, 0))
    assert blocks.weight(3, 4.0).item() == pytest.approx(expected)


def test_prefetch_keeps_order_and_raises_where_due() -> None:
    def fail():
        raise OSError("disk gone")

    jobs = [lambda i=i: i for i in range(5)]
    assert list(prefetch(jobs, depth=2)) == [0, 1, 2, 3, 4]
    batches = prefetch([*jobs[:3], fail, *jobs[3:]], depth=2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == rates[11] == pytest.approx(1.0)  # warm-up ends, cosine starts at its top
    assert rates[100] == pytest.approx(0.1)
    assert rates[11 + 89 // 2] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 44 / 89)) / 2)
    assert learning_rate(0, 1, TrainConfig(lr=1.0)) == pytest.approx(1.0)


def test_every_trained_weight_is_optimised_once_and_the_markov_head_at_its_own_rate() -> None:
    model = small_model(markov_head_type="gated")
    model.embed_tokens.requires_grad_(False)
    config = TrainConfig(lr=0.1, markov_lr_scale=3.0, weight_decay=0.2)
    groups = build_optimizer(model, config).param_groups
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        scale = 3.0 if name.startswith("markov_head.") else 1.0
        assert found[id(parameter)] == (scale, 0.2 if parameter.ndim >= 2 else 0.0), name
