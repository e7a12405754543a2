"""What a block may attend to."""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention_mask(anchor_positions: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Visibility of `[context ; blocks]` from every block slot, for scaled_dot_product_attention.

    A block sees the context strictly before its anchor and its own K slots in both directions;
    nothing else. A dummy block (anchor 0) sees only itself, so no row of the mask is empty and none
    gives NaN. Padding is on the right of a row, behind every anchor, so it is never seen.

    Args:
        anchor_positions: `[B, N]`.
        seq_len: S.
        block_size: K.

    Returns:
        `[B, 1, N*K, S + N*K]` bool, True where attention is allowed.
    """
    device, num_anchors = anchor_positions.device, anchor_positions.shape[1]
    anchor_of_slot = anchor_positions.repeat_interleave(block_size, dim=1)  # [B, N*K]
    context = torch.arange(seq_len, device=device) < anchor_of_slot[..., None]  # [B, N*K, S]
    block_of_slot = torch.arange(num_anchors, device=device).repeat_interleave(block_size)  # [N*K]
    own = block_of_slot[:, None] == block_of_slot[None, :]  # [N*K, N*K]
    return torch.cat([context, own.expand(len(anchor_positions), -1, -1)], dim=-1)[:, None]
