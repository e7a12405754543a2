"""FLOPs of a DFlash2 draft: a block drafter's, and those of convolutions and selector."""

from __future__ import annotations

from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.blocks.flops import block_flops, block_work
from train.draft.dflash2.model import Qwen3DFlash2Model


def training_flops(config: PretrainedConfig, pack: Pack) -> float:
    """Return the model FLOPs of one forward and backward over a pack; see `block_flops`.

    The candidates' logits are counted once, though they are computed again for the selector.
    """
    slots = config.block_size - Qwen3DFlash2Model.first_slot
    work, _ = block_work(config, pack, slots)
    groups = config.hidden_size // config.conv_group_size
    kernels = 2 * 2 * config.conv_kernel_size * groups  # of attention and MLP, input and output
    total = block_flops(config, pack, slots)
    total += 6 * work.rows * config.num_hidden_layers * config.hidden_size * kernels
    total += 6 * work.slots * config.selector_rank * (config.hidden_size + config.selector_top_k)
    return float(total)
