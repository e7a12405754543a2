"""FLOPs of an EAGLE-3 draft, counted as a block drafter's are."""

from __future__ import annotations

from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.blocks.anchors import build_eval_mask, label_positions, restarting_positions


def training_flops(config: PretrainedConfig, pack: Pack) -> float:
    """Return the model FLOPs of one forward and backward over a pack, the teacher's logits included.

    A trained matrix costs three times its forward: the forward, the gradient of its input and its own
    gradient. A frozen head costs two times its forward, as `fc` does, whose input needs no gradient. A step
    computes keys and values of its own after the first, whose are the context's.

    Args:
        config: the draft's config.
        pack: the pack, with its anchors.
    """
    steps, hidden, head = config.ttt_steps, config.hidden_size, config.draft_vocab_size
    width, tokens = pack.input_ids.shape[1], pack.num_tokens
    anchors, keep = pack.collated["anchor_positions"], pack.collated["block_keep_mask"]
    labels, safe = label_positions(anchors, steps, width)
    supervised = build_eval_mask(width, pack.loss_mask, labels, safe, keep, pack.document_ids)
    slots, positions = int(supervised.sum()), len(safe[supervised].unique())
    chains = int(keep.sum())
    seen = int(restarting_positions(pack.document_ids).gather(1, anchors)[keep].sum())
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    total = 4 * tokens * config.num_aux_hidden_states * config.target_hidden_size * hidden
    total += 6 * (tokens + chains * (steps - 1)) * 2 * hidden * 2 * keys
    total += 6 * chains * steps * hidden * (2 * queries + queries + 3 * config.intermediate_size)
    total += 12 * queries * (steps * seen + chains * steps * (steps - 1) // 2)
    total += (6 if config.train_head else 4) * slots * hidden * head + 2 * positions * hidden * head
    return float(total)
