"""A naive float64 loop of DFlash's loss: a block and a slot at a time, on the backbone of tests.reference.

Row r of a block, r from 1, drafts the token at anchor + r. Row 0 holds the anchor and drafts nothing.
"""

from __future__ import annotations

import math

from torch import Tensor

from tests import reference
from tests.reference import Sample, Spec, Weights


def dpace(confidences: list[float], smoothing: float) -> list[float]:
    """D-PACE's weights of a block's supervised slots, each by two loops over the slots."""
    weights = []
    for slot in range(len(confidences)):
        total = 0.0
        for last in range(slot, len(confidences)):
            product = 1.0
            for confidence in confidences[: last + 1]:
                product *= (1 - smoothing) * confidence + smoothing
            total += product
        weights.append(total)
    return weights


def block_logits(w: Weights, spec: Spec, sample: Sample, anchor: int) -> list[Tensor]:
    """Logits of rows 1 .. block_size - 1, each `[V]`."""
    hidden = reference.block_hidden(w, spec, sample, anchor)
    return [reference.base_logits(w, spec, hidden[row]) for row in range(1, spec.block_size)]


def all_logits(w: Weights, spec: Spec, samples: list[Sample], anchors: list[list[int]]) -> list[list[Tensor]]:
    """`block_logits` of all blocks, in their order."""
    pairs = zip(samples, anchors, strict=True)
    return [block_logits(w, spec, sample, anchor) for sample, own in pairs for anchor in own]


def loss(
    w: Weights,
    spec: Spec,
    samples: list[Sample],
    anchors: list[list[int]],
    drafted: list[list[Tensor]],
    *,
    gamma: float | None,
    ce_alpha: float,
    l1_alpha: float,
    smoothing: float | None,
) -> dict[str, Tensor | float | list[float]]:
    """The loss over all blocks, its terms, their divisor, and the slots' weights in their order.

    Args:
        drafted: from `all_logits`.
        smoothing: D-PACE's, which divides by the number of blocks; None weighs by gamma.
    """
    weights: list[float] = []
    blocks = 0
    ce_terms: list[Tensor] = []
    l1_terms: list[Tensor] = []
    rows = iter(drafted)
    for sample, own in zip(samples, anchors, strict=True):
        for anchor in own:
            count = reference.supervised_slots(sample, anchor, spec.block_size - 1)
            blocks += count > 0
            confidences = []
            for slot, row in enumerate(next(rows)[:count]):
                label = anchor + slot + 1
                log_probs = reference.log_softmax(row)
                ce_terms.append(-log_probs[sample.input_ids[label]])
                confidences.append(math.exp(-float(ce_terms[-1].detach())))
                teacher = reference.base_logits(w, spec, sample.last_hidden[label - 1]).detach()
                l1_terms.append(reference.total_variation_l1(row, teacher))
            if smoothing is not None:
                weights += dpace(confidences, smoothing)
            else:
                weights += [1.0 if gamma is None else math.exp(-slot / gamma) for slot in range(count)]
    divisor = sum(weights) if smoothing is None else blocks
    ce, l1 = (
        sum(weight * term for weight, term in zip(weights, terms, strict=True)) / divisor
        for terms in (ce_terms, l1_terms)
    )
    loss = ce_alpha * ce + l1_alpha * l1
    return {"loss": loss, "ce": ce, "l1": l1, "divisor": divisor, "weights": weights}
