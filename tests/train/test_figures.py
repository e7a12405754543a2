"""Figures of blocks, against loops over lists and numbers worked out on paper."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest

from train.draft.dspark.settings import DSparkLoss
from train.eval import metrics
from train.eval.heldout import Blocks, join

K = 4


def random_blocks(count: int = 300, seed: int = 0) -> Blocks:
    """Blocks of every length; what stands behind a supervised prefix is junk."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, K + 1, count)
    return Blocks(
        sample=rng.integers(0, 5, count),
        position=np.arange(count),
        valid=np.arange(K) < lengths[:, None],
        ce=rng.random((count, K)) * 5,
        accept=rng.random((count, K)),
        matches=rng.random((count, K)) < 0.5,
        confidence=rng.normal(size=(count, K)) * 2,
    )


def slots_of(blocks: Blocks) -> list[list[dict[str, float]]]:
    """Each block's supervised slots as plain numbers."""
    return [
        [
            {
                "a": float(blocks.accept[i, k]),
                "ce": float(blocks.ce[i, k]),
                "match": float(blocks.matches[i, k]),
                "c": 1 / (1 + math.exp(-blocks.confidence[i, k])),
            }
            for k in range(K)
            if blocks.valid[i, k]
        ]
        for i in range(len(blocks))
    ]


def test_two_blocks_on_paper() -> None:
    blocks = Blocks(
        sample=np.array([0, 1]),
        position=np.array([3, 4]),
        valid=np.array([[True, True], [True, False]]),
        ce=np.array([[1.0, 2.0], [3.0, 99.0]]),
        accept=np.array([[0.5, 0.4], [1.0, 0.9]]),
        matches=np.array([[True, True], [False, True]]),
        confidence=None,
    )
    got = metrics.acceptance(blocks)
    assert got.accept_rate == pytest.approx(1.9 / 3)
    assert got.accept_by_position == pytest.approx((0.75, 0.4))
    assert got.accept_given_prefix == pytest.approx((0.75, 0.4))  # 0.5 * 0.4 of 0.5 reached
    assert got.tau == pytest.approx(1 + (0.5 + 0.2 + 1.0) / 2)
    assert got.greedy_accept_by_position == (0.5, 1.0)
    assert got.greedy_tau == 1 + (2 + 0) / 2
    terms = metrics.loss_terms(blocks, DSparkLoss(ce_alpha=1, l1_alpha=1, decay_gamma=None))
    assert terms.ce_loss == pytest.approx(2)
    assert terms.l1_loss == pytest.approx(2 * (0.5 + 0.6 + 0) / 3)
    assert terms.loss == pytest.approx(terms.ce_loss + terms.l1_loss)
    assert metrics.calibration(blocks) is None
    assert metrics.threshold_sweep(blocks) is None


def test_acceptance_against_loops() -> None:
    blocks = random_blocks()
    got, all_slots = metrics.acceptance(blocks), slots_of(blocks)
    for prefix, name in (("", "a"), ("greedy_", "match")):
        reached, expected_tokens = [[0.0, 0.0] for _ in range(K)], 0.0
        for slots in all_slots:
            product = 1.0
            for k, slot in enumerate(slots):
                reached[k][0] += product
                product *= slot[name]
                reached[k][1] += product
                expected_tokens += product
        tau, given, by_position = (
            getattr(got, f"{prefix}{key}") for key in ("tau", "accept_given_prefix", "accept_by_position")
        )
        assert tau == pytest.approx(1 + expected_tokens / len(blocks))
        assert given == pytest.approx(tuple(b / a for a, b in reached))
        for k in range(K):
            here = [slots[k][name] for slots in all_slots if len(slots) > k]
            assert by_position[k] == pytest.approx(sum(here) / len(here))


def stretches(count: int = 30, seed: int = 3) -> Blocks:
    """Every candidate of samples with one or two answers of up to nine anchors; last blocks are short."""
    rng = np.random.default_rng(seed)
    sample, position, length = [], [], []
    for i in range(count):
        start = 2
        for _ in range(rng.integers(1, 3)):
            anchors = int(rng.integers(1, 10))
            for p in range(anchors):
                sample.append(i)
                position.append(start + p)
                length.append(min(K, anchors - p))
            start += anchors + 1 + int(rng.integers(1, 4))
    shape = (len(sample), K)
    return Blocks(
        sample=np.array(sample),
        position=np.array(position),
        valid=np.arange(K) < np.array(length)[:, None],
        ce=np.zeros(shape),
        accept=rng.random(shape) ** 0.5,
        matches=rng.random(shape) < 0.7,
        confidence=None,
    )


def test_decoding_against_decoding() -> None:
    """Answer by answer: greedily by walking, sampled by the expectation over all that can happen."""
    blocks = stretches()
    index = {
        (s, p): i
        for i, (s, p) in enumerate(zip(blocks.sample.tolist(), blocks.position.tolist(), strict=True))
    }
    starts = [i for (s, p), i in index.items() if (s, p - 1) not in index]

    def behind(i: int, tokens: int) -> int | None:
        return index.get((int(blocks.sample[i]), int(blocks.position[i]) + tokens))

    rounds, tried, accepted = 0, [0] * K, [0] * K
    for start in starts:
        at: int | None = start
        while at is not None:
            rounds, count = rounds + 1, 0
            while count < K and blocks.valid[at, count]:
                tried[count] += 1
                if not blocks.matches[at, count]:
                    break
                accepted[count] += 1
                count += 1
            at = behind(at, count + 1)
    got = metrics.decoding(blocks)
    assert got.greedy.tokens_per_round == pytest.approx(len(blocks) / rounds)
    counted = tuple(a / t for a, t in zip(accepted, tried, strict=True))
    assert got.greedy.accept_given_prefix == pytest.approx(counted)

    @functools.cache
    def expected_rounds(at: int | None) -> float:
        if at is None:
            return 0.0
        total, reached = 1.0, 1.0
        for count in range(K + 1):
            last = count == K or not blocks.valid[at, count]
            here = reached if last else reached * (1 - blocks.accept[at, count])
            total += here * expected_rounds(behind(at, count + 1))
            if last:
                break
            reached *= blocks.accept[at, count]
        return total

    rounds_expected = sum(expected_rounds(start) for start in starts)
    assert got.sampling.tokens_per_round == pytest.approx(len(blocks) / rounds_expected)
    assert got.sampling.tokens_per_round < metrics.acceptance(blocks).tau


def test_half_easy_half_hard_on_paper() -> None:
    """Of 20 tokens ten are all accepted, ten never: 2 rounds and 10, where tau says 3 or less a round."""
    easy = np.arange(20) < 10
    valid = np.arange(K) < np.minimum(K, 20 - np.arange(20))[:, None]
    accept = np.zeros((20, K))
    for p in range(20):
        for k in range(K):
            accept[p, k] = p + k < 10
    blocks = Blocks(np.zeros(20, int), np.arange(20), valid, accept, accept, easy[:, None] & valid, None)
    got = metrics.decoding(blocks).sampling
    assert got.tokens_per_round == pytest.approx(20 / 12)
    assert got.accept_given_prefix == pytest.approx((2 / 12, 1, 1, 1))
    assert metrics.acceptance(blocks).tau == pytest.approx(1 + (6 * 4 + 4 + 3 + 2 + 1 + 0) / 20, abs=0.3)


def test_a_position_that_no_block_reaches_is_none() -> None:
    short = random_blocks()
    short = short.select(short.valid.sum(1) < K)
    for name in ("accept_by_position", "greedy_accept_given_prefix"):
        values = getattr(metrics.acceptance(short), name)
        assert values[-1] is None
        assert None not in values[:-1]
    reliability = metrics.calibration(short)
    assert reliability is not None
    assert reliability.prefix.ece_by_position[-1] is None


@pytest.mark.parametrize("temperatures", [None, np.array([0.5, 1.0, 2.0, 4.0])])
def test_calibration_against_loops(temperatures: np.ndarray | None) -> None:
    blocks = random_blocks(200)
    got = metrics.calibration(blocks, temperatures)
    assert got is not None
    scale = np.ones(K) if temperatures is None else temperatures
    for name in ("slot", "prefix"):
        pairs: list[list[tuple[float, float]]] = [[] for _ in range(K)]
        for i in range(len(blocks)):
            confident = accepted = 1.0
            for k in range(int(blocks.valid[i].sum())):
                c = 1 / (1 + math.exp(-blocks.confidence[i, k] / scale[k]))
                a = float(blocks.accept[i, k])
                confident, accepted = (confident * c, accepted * a) if name == "prefix" else (c, a)
                pairs[k].append((confident, accepted))
        told = getattr(got, name)
        assert told.ece_by_position == pytest.approx(tuple(slow_ece(own) for own in pairs))
        assert told.auc_by_position == pytest.approx(tuple(slow_auc(own) for own in pairs))
        every = [pair for own in pairs for pair in own]
        assert told.ece == pytest.approx(slow_ece(every))
        assert told.auc == pytest.approx(slow_auc(every))
        assert sum(row.count for row in told.bins) == len(every)
        gaps = [row.count * abs(row.predicted - row.actual) for row in told.bins if row.count]
        assert sum(gaps) / len(every) == pytest.approx(told.ece)


def slow_ece(pairs: list[tuple[float, float]]) -> float:
    error = 0.0
    for low in range(15):
        inside = [(p, a) for p, a in pairs if low / 15 <= p < (low + 1) / 15 or (low == 14 and p == 1)]
        if inside:
            error += abs(sum(p for p, _ in inside) - sum(a for _, a in inside))
    return error / len(pairs)


def slow_auc(pairs: list[tuple[float, float]]) -> float:
    """Every accepted with every rejected, by their weights."""
    won = total = 0.0
    for p, a in pairs:
        for q, b in pairs:
            weight = a * (1 - b)
            won += weight * (1.0 if p > q else 0.5 if p == q else 0.0)
            total += weight
    return won / total


def test_auc_of_certain_outcomes_is_the_textbooks() -> None:
    scores, outcomes = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 1.0, 1.0])
    assert metrics.auc(scores, outcomes) == pytest.approx(0.75)
    assert metrics.auc(scores, np.ones(4)) is None


def test_extreme_confidences_do_not_overflow() -> None:
    logits = np.array([-1e4, 0.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        assert metrics.sigmoid(logits).tolist() == [0.0, 0.5, 1.0]
    assert metrics.ece(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0


def test_the_threshold_sweep_against_loops() -> None:
    blocks = random_blocks()
    rows = metrics.threshold_sweep(blocks, None, (0.0, 0.3, 0.7, 1.0))
    assert rows is not None
    for row in rows:
        verified = accepted = 0.0
        for slots in slots_of(blocks):
            confident = product = 1.0
            for slot in slots:
                confident, product = confident * slot["c"], product * slot["a"]
                if confident < row.threshold:
                    break
                verified, accepted = verified + 1, accepted + product
        assert row.verified == pytest.approx(verified / len(blocks))
        assert row.tokens == pytest.approx(1 + accepted / len(blocks))
        assert row.acceptance == (pytest.approx(accepted / verified) if verified else None)
    assert rows[0].tokens == pytest.approx(metrics.acceptance(blocks).tau)


def test_groups_are_their_own_blocks() -> None:
    blocks = random_blocks()
    names = {0: "b", 1: "a", 2: "b", 3: "empty", 4: "a", 9: "nobody"}
    blocks = blocks.select(blocks.sample != 3)
    groups = metrics.by_group(blocks, names, DSparkLoss())
    assert list(groups) == ["b", "a"]
    assert sum(row.blocks for row in groups.values()) == len(blocks)
    own = metrics.acceptance(blocks.select(np.isin(blocks.sample, [1, 4])))
    assert vars(own).items() <= vars(groups["a"]).items()
    part = blocks.select(np.isin(blocks.sample, [1, 4]))
    assert groups["a"].loss == metrics.loss_terms(part, DSparkLoss()).loss
    assert groups["a"].confidence == metrics.calibration(part)
    assert groups["a"].samples == len({i for i in blocks.sample.tolist() if i in (1, 4)})


def test_length_buckets_by_hand() -> None:
    expected = {1: "1-1", 2: "2-3", 3: "2-3", 127: "64-127", 128: "128-255", 255: "128-255"}
    assert {length: metrics.length_bucket(length) for length in expected} == expected


def test_context_buckets_by_hand() -> None:
    expected = {0: "0-63", 1: "0-63", 63: "0-63", 64: "64-127", 127: "64-127", 31_999: "16384-32767"}
    assert {tokens: metrics.context_bucket(tokens) for tokens in expected} == expected


def test_groups_of_context_are_in_order_and_leave_no_block_out() -> None:
    blocks = random_blocks(count=40)
    blocks = dataclasses.replace(blocks, position=np.arange(len(blocks))[::-1] * 9)
    groups = metrics.by_context(blocks, DSparkLoss())
    assert list(groups) == ["0-63", "64-127", "128-255", "256-511"]
    assert [group.blocks for group in groups.values()] == [8, 7, 14, len(blocks) - 29]
    shortest = blocks.select(blocks.position < 64)
    assert groups["0-63"].tau == metrics.acceptance(shortest).tau


def test_joined_blocks_are_in_order() -> None:
    blocks = random_blocks()
    shuffled = blocks.select(np.random.default_rng(1).permutation(len(blocks)))
    halves = [shuffled.select(np.arange(len(blocks)) < 20), shuffled.select(np.arange(len(blocks)) >= 20)]
    joined = join(halves)
    keys = list(zip(joined.sample.tolist(), joined.position.tolist(), strict=True))
    assert keys == sorted(keys)
    assert sorted(joined.ce.ravel().tolist()) == sorted(blocks.ce.ravel().tolist())
