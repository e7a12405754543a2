"""FLOPs of a forward and backward, the basis of model FLOP/s utilisation.

Counted as usual (Chowdhery et al. 2022, PaLM, appendix B): two operations per multiply-add, one forward and
one backward without recomputation, matrix products and attention only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.dspark.anchors import build_eval_mask, label_positions, restarting_positions
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.masks import GroupedMask, layer_windows, sdpa_mask


def _attended(seen: Tensor, size: int, window: int | None) -> int:
    """Return the number of keys that all slots of the blocks see together, their own blocks' included.

    Args:
        seen: context positions before each block's anchor, `[n]`.
        size: K.
        window: as in `train.draft.dspark.masks`.
    """
    context = seen[:, None].expand(-1, size)  # [n, K]
    if window is not None:
        context = context.minimum(window - 1 - torch.arange(size, device=seen.device))
    return int(context.sum()) + seen.numel() * size * size


def training_flops(config: PretrainedConfig, pack: Pack) -> float:
    """Return the model FLOPs of one forward and backward over a pack, the teacher's logits included.

    A trained matrix costs three times its forward: the forward, the gradient of its input and its own
    gradient. The frozen head and `fc` cost two times their forward: the head has no gradient of its own, and
    the input of `fc` needs none.

    Args:
        config: the draft's config.
        pack: the pack, with its anchors.
    """
    size, tokens = config.block_size, pack.num_tokens
    width = pack.input_ids.shape[1]
    anchors, keep = pack.collated["anchor_positions"], pack.collated["block_keep_mask"]
    labels, safe = label_positions(anchors, size, width)
    supervised = build_eval_mask(width, pack.loss_mask, labels, safe, keep, pack.document_ids)
    slots, positions = int(supervised.sum()), len(safe[supervised].unique())
    blocks = int(keep.sum())
    seen = restarting_positions(pack.document_ids).gather(1, anchors)[keep]

    hidden, vocab, rank = config.hidden_size, config.vocab_size, config.markov_rank
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    rows = blocks * size
    layer = 6 * rows * hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layer += 6 * tokens * hidden * 2 * keys
    total = config.num_hidden_layers * layer
    total += sum(12 * queries * _attended(seen, size, window) for window in layer_windows(config))
    total += 4 * tokens * len(config.target_layer_ids) * hidden * hidden
    total += 4 * slots * hidden * vocab + 2 * positions * hidden * vocab
    if rank:
        head = MARKOV_HEADS[config.markov_head_type]
        total += 6 * (positions if head.by_position else slots) * rank * vocab
        total += 6 * rows * head.multiply_adds(hidden, rank)
    if config.enable_confidence_head:
        total += 6 * rows * (hidden + rank * bool(config.confidence_head_with_markov))
    return float(total)


def hidden_flops(config: PretrainedConfig, tokens: int) -> float:
    """Return the FLOPs that sdpa spends on context which no slot sees, in one forward and backward.

    The pack is one document with its anchors evenly spread, so that each block sees half of it on average.
    flex_attention skips nearly all of this. The groups' backward also computes their forward again.

    Args:
        config: the draft's config.
        tokens: P, the document's length.
    """
    size = config.block_size
    anchors = torch.linspace(1, tokens - 1, config.num_anchors).long()[None]
    pairs = 0
    for window in layer_windows(config):
        mask = sdpa_mask(anchors, tokens, size, window=window)
        if isinstance(mask, GroupedMask):
            for group in mask.groups:
                queries = (group.blocks.stop - group.blocks.start) * size
                context = group.context.stop - group.context.start
                pairs += 16 * queries * (context + queries)
        else:
            pairs += 12 * mask.numel()
        pairs -= 12 * _attended(anchors[0], size, window)
    return float(pairs * config.num_attention_heads * config.head_dim)
