"""A naive float64 reference of the DSpark draft model and its loss: the tests' independent answer.

Written from the design's text alone and meant to be read next to it. It trades all speed for
plainness: one sample, one anchor, one slot, one head and one query/key pair at a time, in Python
loops, with the visibility rule as an explicit predicate (`visible`). There is no batch, no
padding, no mask tensor and no packing, so none of those can be wrong here. Everything is an
ordinary differentiable torch expression, so gradients can be compared as well as values.

Shapes: S tokens of a sample, H hidden size, L captured layers, K block size, V vocabulary,
R Markov rank, D head size. Weights are a dict of float64 tensors, named as in the draft's
`state_dict`. Anchor p drafts tokens p+1 .. p+K: slot k (from 0) sits at position p+k, predicts
token p+k+1, and its previous token is token p+k. Anchors are taken as given: they need not be
candidates, and one listed twice counts twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """Everything about a draft that its weights do not say."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    block_size: int
    mask_token_id: int
    markov_head: str | None  # "vanilla", "gated", "rnn" or None
    confidence: bool
    confidence_with_markov: bool
    embed_scale: float = 1.0  # multiplies token embeddings
    logit_scale: float = 1.0  # multiplies lm_head's output, before the soft cap
    final_logit_softcap: float | None = None  # on lm_head's output, of draft and teacher alike
    windows: tuple[int | None, ...] | None = None  # of each layer: positions seen, one's own included


@dataclass
class Sample:
    """One unpadded document: S tokens, `context` [S, L*H], post-norm `last_hidden` [S, H]."""

    input_ids: list[int]
    loss_mask: list[int]
    context: Tensor
    last_hidden: Tensor


# --- Anchors and labels -------------------------------------------------------------------------


def candidates(sample: Sample) -> list[int]:
    """All positions p where p and p+1 are both supervised."""
    mask = sample.loss_mask
    return [p for p in range(len(mask) - 1) if mask[p] and mask[p + 1]]


def supervised_slots(sample: Sample, anchor: int, block_size: int) -> int:
    """Length of the unbroken run of supervised labels p+1 .. p+K inside the sequence (K: block_size)."""
    count = 0
    for label in range(anchor + 1, anchor + block_size + 1):
        if label >= len(sample.loss_mask) or not sample.loss_mask[label]:
            break
        count += 1
    return count


def token_at(sample: Sample, position: int) -> int:
    """The token at a position; token 0 beyond the end, where nothing depends on it."""
    return sample.input_ids[position] if position < len(sample.input_ids) else 0


# --- The backbone -------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[n] -> [n]: x / rms(x) * weight."""
    return x * torch.rsqrt((x * x).mean() + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one head [D]: the pair (x[i], x[i + D/2]) turns by position * theta^(-2i/D)."""
    half = x.shape[0] // 2
    angles = [position * theta ** (-2 * i / x.shape[0]) for i in range(half)]
    cos = x.new_tensor([math.cos(angle) for angle in angles])
    sin = x.new_tensor([math.sin(angle) for angle in angles])
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def visible(is_context: bool, key_position: int, anchor: int, slot: int, window: int | None) -> bool:
    """A slot sees context strictly before its anchor and, in both directions, its own block.

    With a window, the positions that it sees back to the context's oldest, and its own, are that many.
    """
    if not is_context:
        return True
    return key_position < anchor and (window is None or anchor + slot - key_position + 1 <= window)


def head_of(x: Tensor, head: int, spec: Spec) -> Tensor:
    """[heads * D] -> [D]."""
    return x[head * spec.head_dim : (head + 1) * spec.head_dim]


def attention(
    w: Weights, spec: Spec, layer: int, context: list[Tensor], block: list[Tensor], anchor: int
) -> list[Tensor]:
    """The normed block, K rows [H], attends to [context ; block]; K rows [H] after o_proj."""
    name = f"layers.{layer}.self_attn."
    window = spec.windows[layer] if spec.windows else None
    q_proj, k_proj = w[name + "q_proj.weight"], w[name + "k_proj.weight"]
    v_proj, o_proj = w[name + "v_proj.weight"], w[name + "o_proj.weight"]
    rows = [(True, position, x) for position, x in enumerate(context)]
    rows += [(False, anchor + k, x) for k, x in enumerate(block)]

    keys: list[list[Tensor]] = []  # keys[row][kv_head], values likewise
    values: list[list[Tensor]] = []
    for _, position, x in rows:
        k_row, v_row = k_proj @ x, v_proj @ x
        keys.append([])
        values.append([])
        for kv_head in range(spec.num_kv_heads):
            key = rms_norm(head_of(k_row, kv_head, spec), w[name + "k_norm.weight"], spec.eps)
            keys[-1].append(rotate(key, position, spec.rope_theta))
            values[-1].append(head_of(v_row, kv_head, spec))

    outputs = []
    for slot, x in enumerate(block):
        q_row = q_proj @ x
        heads = []
        for head in range(spec.num_heads):
            kv_head = head // (spec.num_heads // spec.num_kv_heads)
            query = rms_norm(head_of(q_row, head, spec), w[name + "q_norm.weight"], spec.eps)
            query = rotate(query, anchor + slot, spec.rope_theta)
            scores, seen = [], []
            for row, (is_context, position, _) in enumerate(rows):
                if visible(is_context, position, anchor, slot, window):
                    scores.append((query * keys[row][kv_head]).sum() * spec.head_dim**-0.5)
                    seen.append(values[row][kv_head])
            shares = log_softmax(torch.stack(scores)).exp()
            heads.append(sum(share * value for share, value in zip(shares, seen, strict=True)))
        outputs.append(o_proj @ torch.cat(heads))
    return outputs


def mlp(w: Weights, layer: int, x: Tensor) -> Tensor:
    """SwiGLU, [H] -> [H]."""
    name = f"layers.{layer}.mlp."
    gate, up = w[name + "gate_proj.weight"] @ x, w[name + "up_proj.weight"] @ x
    return w[name + "down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


def block_hidden(w: Weights, spec: Spec, sample: Sample, anchor: int) -> Tensor:
    """The K slots' hidden states after the final `norm`, [K, H]."""
    assert 0 <= anchor < len(sample.input_ids)
    norm = w["hidden_norm.weight"]
    context = [rms_norm(w["fc.weight"] @ x, norm, spec.eps) for x in sample.context]
    tokens = [sample.input_ids[anchor]] + [spec.mask_token_id] * (spec.block_size - 1)
    block = [w["embed_tokens.weight"][token] * spec.embed_scale for token in tokens]
    for layer in range(spec.num_layers):
        before = w[f"layers.{layer}.input_layernorm.weight"]
        normed = [rms_norm(x, before, spec.eps) for x in block]
        attended = attention(w, spec, layer, context, normed, anchor)
        block = [x + y for x, y in zip(block, attended, strict=True)]
        after = w[f"layers.{layer}.post_attention_layernorm.weight"]
        block = [x + mlp(w, layer, rms_norm(x, after, spec.eps)) for x in block]
    return torch.stack([rms_norm(x, w["norm.weight"], spec.eps) for x in block])


# --- The heads ----------------------------------------------------------------------------------


def base_logits(w: Weights, spec: Spec, hidden: Tensor) -> Tensor:
    """`lm_head` and the soft cap, [H] -> [V]: the teacher's logits and the draft's base."""
    logits = spec.logit_scale * (w["lm_head.weight"] @ hidden)
    cap = spec.final_logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def gated_bias(w: Weights, hidden: Tensor, embedding: Tensor) -> Tensor:
    """W2 (sigmoid(G [h; W1[x]]) * W1[x]), [V]."""
    weight, bias = w["markov_head.gate_proj.weight"], w["markov_head.gate_proj.bias"]
    gate = torch.sigmoid(weight @ torch.cat([hidden, embedding]) + bias)
    return w["markov_head.markov_w2.weight"] @ (gate * embedding)


def rnn_bias(w: Weights, state: Tensor, hidden: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """One step: ([V] bias, [R] next state) from the state before it; g, c and o share one z."""
    z = torch.cat([state, embedding, hidden])
    joint = w["markov_head.joint_proj.weight"] @ z + w["markov_head.joint_proj.bias"]
    rank = embedding.shape[0]
    g, c, o = joint[:rank], joint[rank : 2 * rank], joint[2 * rank :]
    keep = torch.sigmoid(g)
    bias = w["markov_head.markov_w2.weight"] @ torch.tanh(o)
    return bias, keep * state + (1 - keep) * torch.tanh(c)


def block_logits(
    w: Weights, spec: Spec, sample: Sample, anchor: int, hidden: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Teacher-forced logits [K, V] from `hidden` [K, H], and the raw W1[x_k] [R] of every slot.

    The Markov bias is added to the soft-capped base logits. No Markov head: an empty list.
    """
    logits = [base_logits(w, spec, hidden[k]) for k in range(spec.block_size)]
    if spec.markov_head is None:
        return torch.stack(logits), []
    embedding_table = w["markov_head.markov_w1.weight"]
    embeddings = [embedding_table[token_at(sample, anchor + k)] for k in range(spec.block_size)]
    state = torch.zeros_like(embeddings[0])
    biased = []
    for k, embedding in enumerate(embeddings):
        if spec.markov_head == "vanilla":
            bias = w["markov_head.markov_w2.weight"] @ embedding
        elif spec.markov_head == "gated":
            bias = gated_bias(w, hidden[k], embedding)
        elif spec.markov_head == "rnn":
            bias, state = rnn_bias(w, state, hidden[k], embedding)
        else:
            raise ValueError(f"unknown Markov head {spec.markov_head!r}")
        biased.append(logits[k] + bias)
    return torch.stack(biased), embeddings


def confidence_logit(w: Weights, hidden: Tensor, embedding: Tensor | None) -> Tensor:
    """proj([h; W1[x]]), or proj(h) without an embedding: a scalar logit."""
    features = hidden if embedding is None else torch.cat([hidden, embedding])
    return (w["confidence_head.proj.weight"] @ features + w["confidence_head.proj.bias"])[0]


# --- The loss -----------------------------------------------------------------------------------


def log_softmax(x: Tensor) -> Tensor:
    """[n] -> [n]."""
    return x - torch.logsumexp(x, dim=0)


def total_variation_l1(draft: Tensor, teacher: Tensor) -> Tensor:
    """sum_v |p_draft - p_teacher| from two [V] logit vectors; not halved, so in [0, 2]."""
    return (log_softmax(draft).exp() - log_softmax(teacher).exp()).abs().sum()


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """-(c log sigmoid(z) + (1 - c) log(1 - sigmoid(z))), with log sigmoid(z) = -log(1 + e^-z)."""
    zero = torch.zeros_like(logit)
    return target * torch.logaddexp(zero, -logit) + (1 - target) * torch.logaddexp(zero, logit)


def weighted_mean(weights: list[float], terms: list[Tensor]) -> Tensor:
    """sum(w * term) / sum(w); zero when there is nothing to average."""
    if not terms:
        return torch.zeros((), dtype=torch.float64)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)) / sum(weights)


def mean(values: list[float]) -> float:
    """The plain mean; nan when there is nothing to average."""
    return sum(values) / len(values) if values else math.nan


def loss(
    w: Weights,
    spec: Spec,
    samples: list[Sample],
    anchors: list[list[int]],
    gamma: float | None,
    ce_alpha: float,
    l1_alpha: float,
    confidence_alpha: float,
) -> dict:
    """The three-term loss over all blocks of all samples, with one denominator for all of them.

    Scalars `loss`, `ce_loss`, `l1_loss`, `confidence_loss` are tensors (zero when no slot counts).
    `accept_by_position` (K floats) and `accept_rate` average a = 1 - L1/2 over supervised slots;
    `tau` is 1 + the mean over blocks with a supervised slot of sum_k prod_{j<=k} a_j, the sum
    ending with the block's supervised prefix. All three are nan with nothing to average.
    """
    weights: list[float] = []
    ce_terms: list[Tensor] = []
    l1_terms: list[Tensor] = []
    confidence_terms: list[Tensor] = []
    accepted: list[list[float]] = [[] for _ in range(spec.block_size)]
    accepted_lengths: list[float] = []

    for sample, sample_anchors in zip(samples, anchors, strict=True):
        for anchor in sample_anchors:
            count = supervised_slots(sample, anchor, spec.block_size)
            if count == 0:
                continue
            hidden = block_hidden(w, spec, sample, anchor)
            logits, embeddings = block_logits(w, spec, sample, anchor, hidden)
            product, length = 1.0, 0.0
            for k in range(count):
                label = anchor + k + 1
                teacher = base_logits(w, spec, sample.last_hidden[label - 1]).detach()
                l1 = total_variation_l1(logits[k], teacher)
                weights.append(1.0 if gamma is None else math.exp(-k / gamma))
                ce_terms.append(-log_softmax(logits[k])[sample.input_ids[label]])
                l1_terms.append(l1)
                if spec.confidence:
                    embedding = embeddings[k] if spec.confidence_with_markov else None
                    target = (1 - l1 / 2).clamp(0, 1).detach()
                    logit = confidence_logit(w, hidden[k], embedding)
                    confidence_terms.append(binary_cross_entropy(logit, target))
                accept = 1 - float(l1.detach()) / 2
                accepted[k].append(accept)
                product *= accept
                length += product
            accepted_lengths.append(length)

    ce_loss, l1_loss = weighted_mean(weights, ce_terms), weighted_mean(weights, l1_terms)
    confidence_loss = weighted_mean(weights, confidence_terms)
    return {
        "loss": ce_alpha * ce_loss + l1_alpha * l1_loss + confidence_alpha * confidence_loss,
        "ce_loss": ce_loss,
        "l1_loss": l1_loss,
        "confidence_loss": confidence_loss,
        "accept_by_position": [mean(values) for values in accepted],
        "accept_rate": mean([a for values in accepted for a in values]),
        "tau": 1 + mean(accepted_lengths),
    }
