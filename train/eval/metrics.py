"""Figures of a draft from what it did block by block.

A slot's acceptance a is the probability that the target accepts its token at temperature 1, given that it
accepted the earlier ones (1 minus the total variation, Leviathan et al. 2023, section 3.3). So figures over
outcomes are expectations: where others count accepted tokens, probabilities are added up here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from train.config import LossConfig
from train.eval.heldout import Blocks
from train.losses.slots import Objective
from train.runs.figures import (
    Acceptance,
    Bin,
    Confidence,
    Decoding,
    Group,
    Losses,
    Reliability,
    Rounds,
    ThresholdRow,
)

# Equal bins of a reliability diagram (Guo et al. 2017, section 3).
BINS = 15
THRESHOLDS = tuple(i / 20 for i in range(20))
# Fewer context tokens than this are one group; above it groups double.
SHORT_CONTEXT = 64


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def loss_terms(blocks: Blocks, loss: LossConfig) -> Losses:
    """Compute the loss and its terms, by the definition of `train.losses.slots`."""
    slots = np.arange(blocks.valid.shape[1])
    gamma = loss.slot_decay
    decay = np.ones(len(slots)) if gamma is None else np.exp(-slots / gamma)
    weights = decay * blocks.valid

    def mean(values: np.ndarray) -> float:
        return float((weights * values).sum() / weights.sum())

    confidence, logits = None, blocks.confidence
    if logits is not None:
        confidence = mean(np.logaddexp(0, logits) - blocks.accept * logits)
    distance = 2 * (1 - blocks.accept) if blocks.l1 is None else blocks.l1
    terms = {"ce": mean(blocks.ce), "l1": mean(distance), "confidence": confidence or 0.0}
    further = {name: mean(values) for name, values in blocks.further.items()}
    return Losses(
        loss=Objective.of(loss).total(terms | further),
        ce_loss=terms["ce"],
        l1_loss=terms["l1"],
        confidence_loss=confidence,
        further_losses=further,
    )


def acceptance(blocks: Blocks) -> Acceptance:
    """Compute how much the target accepts, sampling and greedy."""
    slots = blocks.valid.sum(0)
    figures = {}
    for prefix, each in (("", blocks.accept), ("greedy_", blocks.matches.astype(float))):
        accepted = np.where(blocks.valid, each, 0.0)
        reached = np.cumprod(accepted, axis=1)  # zero after the supervised prefix
        before = np.concatenate([np.ones((len(blocks), 1)), reached[:, :-1]], axis=1) * blocks.valid
        figures[f"{prefix}accept_by_position"] = _ratios(accepted.sum(0), slots)
        figures[f"{prefix}accept_given_prefix"] = _ratios(reached.sum(0), before.sum(0))
        figures[f"{prefix}tau"] = float(1 + reached.sum() / len(blocks))
    return Acceptance(accept_rate=float(blocks.accept[blocks.valid].mean()), **figures)


def decoding(blocks: Blocks) -> Decoding:
    """Compute what decoding the samples' texts is expected to yield: less than tau says.

    Tau takes every position for a start of a block. Decoding begins a round where the last one ended, so it
    passes quickly over what is easy and begins a round at each token of what is hard: it yields fewer tokens
    per round.

    Args:
        blocks: of every candidate position, by sample and position.
    """

    def rounds(each: np.ndarray) -> Rounds:
        accepted = np.where(blocks.valid, each, 0.0)
        reached = np.cumprod(accepted, axis=1)
        begun = _rounds_begun(blocks, reached)
        before = np.concatenate([np.ones((len(blocks), 1)), reached[:, :-1]], axis=1) * blocks.valid
        return Rounds(
            tokens_per_round=float(len(blocks) / begun.sum()),  # each anchor's next token is emitted once
            accept_given_prefix=_ratios(begun @ reached, begun @ before),
        )

    return Decoding(sampling=rounds(blocks.accept), greedy=rounds(blocks.matches.astype(float)))


def _rounds_begun(blocks: Blocks, reached: np.ndarray) -> np.ndarray:
    """Compute the expected number of rounds that decoding begins at each block's anchor, `[n]`.

    A stretch of neighbouring anchors is an answer: it begins at the first. A round that accepts j tokens of
    a block ends j + 1 positions further; what comes after the answer's last anchor is its end.

    Args:
        reached: probability that each slot and all before it are accepted, `[n, K]`.
    """
    n, slots = reached.shape
    edges = np.concatenate([np.ones((n, 1)), reached, np.zeros((n, 1))], axis=1)
    ends = edges[:, :-1] - edges[:, 1:]  # [n, K + 1], the probability of accepting just 0, 1, ... K
    begun = np.zeros(n + slots + 1)
    for first, last in answers(blocks):
        begun[first : first + slots + 1] = 0  # what the answer before reached beyond its end
        begun[first] = 1
        for i in range(first, last):
            begun[i + 1 : i + slots + 2] += begun[i] * ends[i]
    return begun[:n]


def answers(blocks: Blocks) -> list[tuple[int, int]]:
    """Return the first block of each stretch of neighbouring anchors, and the one after its last.

    Args:
        blocks: of every candidate position, by sample and position.
    """
    follows = (np.diff(blocks.sample) == 0) & (np.diff(blocks.position) == 1)
    firsts = np.flatnonzero(np.concatenate([[True], ~follows])).tolist()
    return list(zip(firsts, [*firsts[1:], len(blocks)], strict=True))


def _ratios(sums: np.ndarray, counts: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(s / c) if c > 0 else None for s, c in zip(sums, counts, strict=True))


def calibration(blocks: Blocks, temperatures: np.ndarray | None = None) -> Confidence | None:
    """Compare confidences with acceptance, each slot's and their products; None without a confidence head.

    Args:
        temperatures: divide each slot's logits first, `[K]`.
    """
    if blocks.confidence is None:
        return None
    each = confidences(blocks, temperatures)
    accept = np.where(blocks.valid, blocks.accept, 0.0)
    return Confidence(
        slot=_reliability(each, accept, blocks.valid),
        prefix=_reliability(np.cumprod(each, axis=1), np.cumprod(accept, axis=1), blocks.valid),
    )


def confidences(blocks: Blocks, temperatures: np.ndarray | None = None) -> np.ndarray:
    """Compute each slot's confidence, `[n, K]`."""
    assert blocks.confidence is not None
    return sigmoid(blocks.confidence if temperatures is None else blocks.confidence / temperatures)


def _reliability(predicted: np.ndarray, actual: np.ndarray, valid: np.ndarray) -> Reliability:
    positions = range(valid.shape[1])

    def by_position(
        figure: Callable[[np.ndarray, np.ndarray], float | None],
    ) -> tuple[float | None, ...]:
        slots = ((predicted[valid[:, k], k], actual[valid[:, k], k]) for k in positions)
        return tuple(figure(p, a) if len(p) else None for p, a in slots)

    return Reliability(
        ece=ece(predicted[valid], actual[valid]),
        ece_by_position=by_position(ece),
        auc=auc(predicted[valid], actual[valid]),
        auc_by_position=by_position(auc),
        bins=reliability_bins(predicted[valid], actual[valid]),
    )


def _binned(predicted: np.ndarray, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum up count, prediction and outcome of each bin, `[BINS]`."""
    which = np.minimum((predicted * BINS).astype(int), BINS - 1)
    return tuple(np.bincount(which, w, minlength=BINS) for w in (np.ones_like(predicted), predicted, actual))


def ece(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Expected calibration error: |mean prediction - mean outcome| of each bin, weighed by its count."""
    _, of_predicted, of_actual = _binned(predicted, actual)
    return float(np.abs(of_predicted - of_actual).sum() / len(predicted))


def reliability_bins(predicted: np.ndarray, actual: np.ndarray) -> tuple[Bin, ...]:
    """Compute a reliability diagram."""
    rows = zip(*_binned(predicted, actual), strict=True)
    return tuple(
        Bin(
            low=i / BINS,
            high=(i + 1) / BINS,
            count=int(n),
            predicted=float(p / n) if n else None,
            actual=float(a / n) if n else None,
        )
        for i, (n, p, a) in enumerate(rows)
    )


def auc(predicted: np.ndarray, actual: np.ndarray) -> float | None:
    """Compute the probability that an accepted slot has a higher confidence than a rejected one.

    Ties count half. Every slot is accepted with weight `actual` and rejected with the rest: where the target
    samples, nobody can tell for sure, and even the best confidences stay below 1. None if one side is empty.
    """
    levels, which = np.unique(predicted, return_inverse=True)
    accepted = np.bincount(which, actual, minlength=len(levels))
    rejected = np.bincount(which, 1 - actual, minlength=len(levels))
    pairs = accepted.sum() * rejected.sum()
    below = np.cumsum(rejected) - rejected / 2
    return float((accepted * below).sum() / pairs) if pairs > 0 else None


def threshold_sweep(
    blocks: Blocks, temperatures: np.ndarray | None = None, thresholds: Iterable[float] = THRESHOLDS
) -> tuple[ThresholdRow, ...] | None:
    """Compute what verifying less yields, a row per threshold; None without a confidence head."""
    if blocks.confidence is None:
        return None
    prefix = np.cumprod(confidences(blocks, temperatures), axis=1)
    reached = np.cumprod(np.where(blocks.valid, blocks.accept, 0.0), axis=1)
    rows = []
    for threshold in thresholds:
        verified = blocks.valid & (prefix >= threshold)
        tokens, count = float(reached[verified].sum()), int(verified.sum())
        rows.append(
            ThresholdRow(
                threshold=threshold,
                verified=count / len(blocks),
                tokens=1 + tokens / len(blocks),
                acceptance=tokens / count if count else None,
            )
        )
    return tuple(rows)


def by_group(blocks: Blocks, names: Mapping[int, str], loss: LossConfig) -> dict[str, Group]:
    """Compute the figures of each group of samples, in the order of `names`.

    Args:
        names: the group of each sample number.
    """
    own = np.array([names[i] for i in blocks.sample.tolist()], dtype=object)
    return _groups(blocks, own, dict.fromkeys(names.values()), loss)


def by_context(blocks: Blocks, loss: LossConfig) -> dict[str, Group]:
    """Compute the figures of blocks with about as much context, from the shortest to the longest."""
    own = np.array([context_bucket(tokens) for tokens in blocks.position.tolist()], dtype=object)
    ascending = np.argsort(blocks.position, kind="stable")
    return _groups(blocks, own, dict.fromkeys(own[ascending].tolist()), loss)


def _groups(blocks: Blocks, own: np.ndarray, names: Iterable[str], loss: LossConfig) -> dict[str, Group]:
    """Compute the figures of each name that has blocks; `own` has the name of each block, `[n]`."""
    groups = {}
    for name in names:
        part = blocks.select(own == name)
        if not len(part):
            continue
        groups[name] = Group(
            samples=len(np.unique(part.sample)),
            blocks=len(part),
            **vars(loss_terms(part, loss)),
            **vars(acceptance(part)),
            confidence=calibration(part),
        )
    return groups


def length_bucket(length: int) -> str:
    """Name the bucket of a length; they double, as `128-255`."""
    low = 1 << (int(length).bit_length() - 1)
    return f"{low}-{2 * low - 1}"


def context_bucket(tokens: int) -> str:
    """Name the bucket of a number of context tokens, those before the anchor; all below 64 are one."""
    return length_bucket(tokens) if tokens >= SHORT_CONTEXT else f"0-{SHORT_CONTEXT - 1}"
