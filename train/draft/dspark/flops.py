"""FLOPs of a DSpark draft: a block drafter's, and its heads'."""

from __future__ import annotations

from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.blocks.flops import block_flops, block_work
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.vocabulary import draft_vocab_size


def training_flops(config: PretrainedConfig, pack: Pack) -> float:
    """Return the model FLOPs of one forward and backward over a pack; see `block_flops`."""
    total = block_flops(config, pack, config.block_size)
    work, _ = block_work(config, pack, config.block_size)
    hidden, vocab, rank = config.hidden_size, draft_vocab_size(config), config.markov_rank
    if rank:
        head = MARKOV_HEADS[config.markov_head_type]
        total += 6 * (work.positions if head.by_position else work.slots) * rank * vocab
        total += 6 * work.rows * head.multiply_adds(hidden, rank)
    if config.enable_confidence_head:
        total += 6 * work.rows * (hidden + rank * bool(config.confidence_head_with_markov))
    return float(total)
