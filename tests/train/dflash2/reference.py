"""A naive float64 loop of DFlash2: a block, a row and a channel's weight at a time.

Attention and norms are those of tests.reference. Row r of a block, r from 1, drafts the token at anchor + r.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests import reference
from tests.reference import Sample, Spec, Weights
from tests.train.dflash.reference import dpace


def convolved(w: Weights, name: str, side: int, rows: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Convolve rows `[H]` of a block.

    Args:
        name: of the convolution's weights.
        side: 0 for a part's input, 1 for its output.
        inputs: what the part's input was before its convolution: the weights' corrections come from there.
    """
    base, projection = w[f"{name}.base_kernel"][side], w[f"{name}.kernel_projection.weight"]
    taps, hidden = base.shape
    groups = len(projection) // (2 * taps)
    out = []
    for number, row in enumerate(rows):
        corrections = projection @ inputs[number]
        total = torch.zeros_like(row)
        for tap in range(min(taps, number + 1)):
            first = (side * taps + tap) * groups
            for group, channels in enumerate(torch.arange(hidden).chunk(groups)):
                weights = base[tap, channels] + corrections[first + group]
                total = total.index_add(0, channels, weights * rows[number - tap][channels])
        out.append(total)
    return out


def block_hidden(w: Weights, spec: Spec, sample: Sample, anchor: int) -> list[Tensor]:
    """States of a block's rows after the final norm, each `[H]`."""
    norm = w["hidden_norm.weight"]
    context = [reference.rms_norm(w["fc.weight"] @ x, norm, spec.eps) for x in sample.context]
    tokens = [sample.input_ids[anchor]] + [spec.mask_token_id] * (spec.block_size - 1)
    rows = [w["embed_tokens.weight"][token] * spec.embed_scale for token in tokens]
    for layer in range(spec.num_layers):
        prefix = f"layers.{layer}"
        normed = [reference.rms_norm(row, w[f"{prefix}.input_layernorm.weight"], spec.eps) for row in rows]
        states = convolved(w, f"{prefix}.attention_conv", 0, normed, normed)
        attended = reference.attention(w, spec, layer, context, states, anchor)
        attended = convolved(w, f"{prefix}.attention_conv", 1, attended, normed)
        rows = [row + added for row, added in zip(rows, attended, strict=True)]
        weight = w[f"{prefix}.post_attention_layernorm.weight"]
        normed = [reference.rms_norm(row, weight, spec.eps) for row in rows]
        states = convolved(w, f"{prefix}.mlp_conv", 0, normed, normed)
        mapped = [reference.mlp(w, layer, row) for row in states]
        mapped = convolved(w, f"{prefix}.mlp_conv", 1, mapped, normed)
        rows = [row + added for row, added in zip(rows, mapped, strict=True)]
    return [reference.rms_norm(row, w["norm.weight"], spec.eps) for row in rows]


def scores(w: Weights, logits: Tensor, hidden: Tensor, previous: int, top: int) -> dict[int, Tensor]:
    """The selector's score of each candidate, by token id."""
    candidates = sorted(range(len(logits)), key=lambda token: -float(logits[token].detach()))[:top]
    gate = w["candidate_selector.predecessor_codebook"][previous] * (
        w["candidate_selector.hidden_projection.weight"] @ hidden
    )
    codebook = w["candidate_selector.successor_codebook"]
    return {token: logits[token] + (gate * codebook[token]).sum() for token in candidates}


def loss(
    w: Weights,
    spec: Spec,
    top: int,
    samples: list[Sample],
    anchors: list[list[int]],
    *,
    gamma: float | None,
    ce_alpha: float,
    l1_alpha: float,
    selector_alpha: float,
    smoothing: float | None,
) -> dict[str, Any]:
    """The loss over all blocks, its terms, and each slot's acceptance, agreement and share of misses.

    Args:
        top: candidates of a slot.
        smoothing: D-PACE's, which divides by the number of blocks; None weighs by gamma.
    """
    terms: dict[str, list[Tensor]] = {"ce": [], "l1": [], "selector": []}
    weights: list[float] = []
    figures: dict[str, list[float]] = {"accepted": [], "matches": [], "missed": []}
    blocks = 0
    for sample, own in zip(samples, anchors, strict=True):
        for anchor in own:
            count = reference.supervised_slots(sample, anchor, spec.block_size - 1)
            blocks += count > 0
            confidences = []
            for row, hidden in list(enumerate(block_hidden(w, spec, sample, anchor)))[1 : count + 1]:
                label, previous = sample.input_ids[anchor + row], sample.input_ids[anchor + row - 1]
                logits = reference.base_logits(w, spec, hidden)
                teacher = reference.base_logits(w, spec, sample.last_hidden[anchor + row - 1]).detach()
                terms["ce"].append(-reference.log_softmax(logits)[label])
                terms["l1"].append(reference.total_variation_l1(logits, teacher))
                confidences.append(math.exp(-float(terms["ce"][-1].detach())))
                scored = scores(w, logits, hidden, previous, top)
                log_probs = reference.log_softmax(torch.stack(list(scored.values())))
                choice = dict(zip(scored, log_probs, strict=True))
                terms["selector"].append(
                    -choice[label] if label in choice else torch.zeros_like(log_probs[0])
                )
                figures["missed"].append(float(label not in choice))
                probs = torch.zeros_like(teacher)
                for token, log_prob in choice.items():
                    probs[token] = log_prob.detach().exp()
                distance = (probs - reference.log_softmax(teacher).exp()).abs().sum()
                figures["accepted"].append(1 - float(distance) / 2)
                best = max(choice, key=lambda token: float(choice[token].detach()))
                figures["matches"].append(float(best == int(teacher.argmax())))
            if smoothing is not None:
                weights += dpace(confidences, smoothing)
            else:
                weights += [1.0 if gamma is None else math.exp(-slot / gamma) for slot in range(count)]
    divisor = sum(weights) if smoothing is None else blocks
    means = {
        name: sum(weight * term for weight, term in zip(weights, own, strict=True)) / divisor
        for name, own in terms.items()
    }
    total = ce_alpha * means["ce"] + l1_alpha * means["l1"] + selector_alpha * means["selector"]
    return {"loss": total, **means, **figures, "weights": weights}
