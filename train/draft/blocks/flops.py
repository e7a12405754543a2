"""FLOPs of a forward and backward, the basis of model FLOP/s utilisation.

Counted as usual (Chowdhery et al. 2022, PaLM, appendix B): two operations per multiply-add, one forward and
one backward without recomputation, matrix products and attention only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.blocks.anchors import build_eval_mask, label_positions, restarting_positions
from train.draft.blocks.masks import GroupedMask, layer_windows, sdpa_mask
from train.draft.vocabulary import draft_vocab_size


def _attended(seen: Tensor, size: int, window: int | None) -> int:
    """Return the number of keys that all slots of the blocks see together, their own blocks' included.

    Args:
        seen: context positions before each block's anchor, `[n]`.
        size: K.
        window: as in `train.draft.blocks.masks`.
    """
    context = seen[:, None].expand(-1, size)  # [n, K]
    if window is not None:
        context = context.minimum(window - 1 - torch.arange(size, device=seen.device))
    return int(context.sum()) + seen.numel() * size * size


@dataclass(frozen=True)
class Work:
    """Rows of a pack that a draft computes."""

    rows: int
    """Rows of all blocks, the anchors' included."""
    slots: int
    """Supervised slots."""
    positions: int
    """Distinct positions of their teachers."""


def block_work(config: PretrainedConfig, pack: Pack, slots: int) -> tuple[Work, Tensor]:
    """Return what a pack asks of a block drafter, and each block's context positions, `[n]`.

    Args:
        config: the draft's config.
        pack: the pack, with its anchors.
        slots: K.
    """
    width = pack.input_ids.shape[1]
    anchors, keep = pack.collated["anchor_positions"], pack.collated["block_keep_mask"]
    labels, safe = label_positions(anchors, slots, width)
    supervised = build_eval_mask(width, pack.loss_mask, labels, safe, keep, pack.document_ids)
    seen = restarting_positions(pack.document_ids).gather(1, anchors)[keep]
    rows = int(keep.sum()) * config.block_size
    return Work(rows, int(supervised.sum()), len(safe[supervised].unique())), seen


def block_flops(config: PretrainedConfig, pack: Pack, slots: int) -> float:
    """Return the model FLOPs of one forward and backward over a pack, the teacher's logits included.

    A trained matrix costs three times its forward: the forward, the gradient of its input and its own
    gradient. The frozen head and `fc` cost two times their forward: the head has no gradient of its own, and
    the input of `fc` needs none. Further heads are the kinds' own.

    Args:
        config: the draft's config.
        pack: the pack, with its anchors.
        slots: K.
    """
    work, seen = block_work(config, pack, slots)
    size, tokens = config.block_size, pack.num_tokens
    hidden, vocab = config.hidden_size, draft_vocab_size(config)
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 6 * work.rows * hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layer += 6 * tokens * hidden * 2 * keys
    total = config.num_hidden_layers * layer
    total += sum(12 * queries * _attended(seen, size, window) for window in layer_windows(config))
    total += 4 * tokens * len(config.target_layer_ids) * hidden * hidden
    total += 4 * work.slots * hidden * vocab + 2 * work.positions * hidden * vocab
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
