"""Attention masks of blocks, for scaled_dot_product_attention and for flex_attention.

A block sees only the context of its own document strictly before its anchor, and its own K slots in both
directions. So a dummy block (anchor 0) sees only itself: no row of a mask is empty, and none gives NaN. Keys
are `[context ; blocks]`: S context positions, then N*K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from train.runtime.compiled import compiled


def block_attention_mask(
    anchor_positions: Tensor, seq_len: int, block_size: int, document_ids: Tensor | None = None
) -> Tensor:
    """Return the mask as a tensor, for scaled_dot_product_attention.

    Args:
        anchor_positions: `[B, N]`.
        seq_len: S.
        block_size: K.
        document_ids: `[B, S]`, the document of each position; None if a row is one document.

    Returns:
        `[B, 1, N*K, S + N*K]` bool, True where attention is allowed.
    """
    device, (rows, num_anchors) = anchor_positions.device, anchor_positions.shape
    context = torch.arange(seq_len, device=device) < anchor_positions[..., None]  # [B, N, S]
    if document_ids is not None:
        context &= document_ids[:, None] == document_ids.gather(1, anchor_positions)[..., None]
    blocks = torch.eye(num_anchors, dtype=torch.bool, device=device).expand(rows, -1, -1)  # [B, N, N]
    own = blocks.repeat_interleave(block_size, dim=2)  # [B, N, N*K]
    return torch.cat([context, own], dim=-1).repeat_interleave(block_size, dim=1)[:, None]


def flex_block_mask(
    anchor_positions: Tensor, seq_len: int, block_size: int, document_ids: Tensor | None = None
) -> BlockMask:
    """Return the same mask for flex_attention, which skips hidden tiles; arguments as above."""
    device, (rows, num_anchors) = anchor_positions.device, anchor_positions.shape
    if document_ids is None:
        document_ids = torch.zeros(rows, seq_len, dtype=torch.int32, device=device)
    documents = document_ids.gather(1, anchor_positions)  # [B, N]

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        before = key < anchor_positions[row, block]  # always False for keys of blocks
        same = document_ids[row, key.clamp(max=seq_len - 1)] == documents[row, block]
        own = (key >= seq_len) & ((key - seq_len) // block_size == block)
        return (before & same) | own

    queries = num_anchors * block_size
    make = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(visible, rows, None, queries, seq_len + queries, device=device)
