"""Attention masks of blocks, for scaled_dot_product_attention (sdpa) and for flex_attention.

A block sees only the context of its own document strictly before its anchor, and its own K slots in both
directions. So a dummy block (anchor 0) sees only itself: no row of a mask is empty, and none gives NaN. Keys
are `[context ; blocks]`: S context positions, then N*K slots.

With a window of W positions, slot k of a block, at position anchor + k, sees of that context only positions
after anchor + k - W: W positions with its own. It sees all slots of its block, as W is at least K. Engines
count a draft's window the same way: vLLM 0.33.0 in `FlashAttentionImpl`, SGLang 0.5.23 in `dflash_utils.py`
and its attention backends, llama.cpp in `is_masked_swa`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig

from train.draft.body import FULL, SLIDING
from train.draft.dspark.anchors import create_position_ids, restarting_positions
from train.runtime.compiled import compiled

# Blocks that sdpa computes together. More see more that is hidden; fewer take more launches.
GROUP = 64


def layer_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return the window of each layer of a draft; None for a layer that sees all of its context."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return tuple(config.sliding_window if kind == SLIDING else None for kind in types)


def block_attention_mask(
    anchor_positions: Tensor,
    seq_len: int,
    block_size: int,
    document_ids: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return the mask as a tensor, for scaled_dot_product_attention.

    Args:
        anchor_positions: `[B, N]`.
        seq_len: S.
        block_size: K.
        document_ids: `[B, S]`, the document of each position; None if a row is one document.
        window: W; None if slots see all of their context.

    Returns:
        `[B, 1, N*K, S + N*K]` bool, True where attention is allowed.
    """
    device, (rows, num_anchors) = anchor_positions.device, anchor_positions.shape
    positions = torch.arange(seq_len, device=device)
    context = positions < anchor_positions[..., None]  # [B, N, S]
    if document_ids is not None:
        context &= document_ids[:, None] == document_ids.gather(1, anchor_positions)[..., None]
    blocks = torch.eye(num_anchors, dtype=torch.bool, device=device).expand(rows, -1, -1)  # [B, N, N]
    own = blocks.repeat_interleave(block_size, dim=2)  # [B, N, N*K]
    mask = torch.cat([context, own], dim=-1).repeat_interleave(block_size, dim=1)  # [B, N*K, S + N*K]
    if window is not None:
        slots = create_position_ids(anchor_positions, block_size)  # [B, N*K]
        mask[..., :seq_len] &= positions > slots[..., None] - window
    return mask[:, None]


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of one row that attend together, to a part of the row's keys."""

    row: int
    blocks: slice
    """Numbers of the blocks."""
    context: slice
    """Context positions from the first to the last one that any of them sees; empty if none sees any."""


@dataclass(frozen=True)
class GroupedMask:
    """The mask of `block_attention_mask`, a group of blocks at a time, for rows with many blocks.

    The whole mask has N*K x (S + N*K) entries, most of them False. A group's part leaves out other groups'
    blocks and the context that none of its own blocks sees, such as other documents.
    """

    groups: tuple[BlockGroup, ...]
    first: Tensor
    """First context position of each block's document, `[B, N]`."""
    anchor_positions: Tensor
    """`[B, N]`."""
    seq_len: int
    block_size: int
    window: int | None

    def queries(self, group: BlockGroup) -> slice:
        """Return the group's rows of the mask: slots, counted over all blocks."""
        return slice(group.blocks.start * self.block_size, group.blocks.stop * self.block_size)

    def of(self, group: BlockGroup) -> Tensor:
        """Return the group's part, `[n*K, C + n*K]` bool for n blocks and C context positions."""
        anchors = self.anchor_positions[group.row, group.blocks, None]  # [n, 1]
        device, count = anchors.device, len(anchors)
        positions = torch.arange(group.context.start, group.context.stop, device=device)
        context = (positions >= self.first[group.row, group.blocks, None]) & (positions < anchors)  # [n, C]
        own = torch.eye(count, dtype=torch.bool, device=device).repeat_interleave(self.block_size, dim=1)
        mask = torch.cat([context, own], dim=1).repeat_interleave(self.block_size, dim=0)
        if self.window is not None:
            slots = create_position_ids(anchors.T, self.block_size)[0]  # [n*K]
            mask[:, : len(positions)] &= positions > slots[:, None] - self.window
        return mask


Mask = Tensor | GroupedMask | BlockMask
"""Mask of a layer; its class decides the kernel."""


def context_spans(anchor_positions: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the context of each block on the host, as `hidden_states` takes it.

    Args:
        anchor_positions: `[B, N]`.
        first: first position of each anchor's document, `[B, N]`.

    Returns:
        `[B, N, 2]`: the first context position, and the one after the last, which is the anchor.
    """
    return np.stack([first, anchor_positions], axis=-1)


def sdpa_mask(
    anchor_positions: Tensor,
    seq_len: int,
    block_size: int,
    document_ids: Tensor | None = None,
    window: int | None = None,
    spans: np.ndarray | None = None,
) -> Tensor | GroupedMask:
    """Return the mask for sdpa: a tensor for up to `GROUP` blocks, else one in groups.

    Args:
        spans: from `context_spans`. Without it, a GPU is waited for.

    Other arguments are as in `block_attention_mask`.
    """
    rows, num_anchors = anchor_positions.shape
    if num_anchors <= GROUP:
        return block_attention_mask(anchor_positions, seq_len, block_size, document_ids, window)
    first = torch.zeros_like(anchor_positions)
    if document_ids is not None:
        first = anchor_positions - restarting_positions(document_ids).gather(1, anchor_positions)
    if spans is None:
        spans = context_spans(anchor_positions.cpu().numpy(), first.cpu().numpy())
    groups = []
    for row in range(rows):
        for start in range(0, num_anchors, GROUP):
            blocks = slice(start, min(start + GROUP, num_anchors))
            low, high = spans[row, blocks].T
            if window is not None:
                low = np.maximum(low, high - window + 1)  # of slot 0, which sees furthest back
            sees = low < high  # a dummy sees none
            context = slice(int(low[sees].min()), int(high[sees].max())) if sees.any() else slice(0, 0)
            groups.append(BlockGroup(row, blocks, context))
    return GroupedMask(tuple(groups), first, anchor_positions, seq_len, block_size, window)


def decoding_mask(slots: int, length: int, start: int, window: int, device: torch.device) -> Tensor:
    """Return the mask of one block that follows its context, for a key-value cache cut at `start`.

    Args:
        slots: K.
        length: S, the number of context positions, and the anchor's position.
        start: position of the first key.
        window: W.

    Returns:
        `[K, S - start + K]` bool, True where attention is allowed.
    """
    keys = torch.arange(start, length + slots, device=device)
    seen = keys > torch.arange(length, length + slots, device=device)[:, None] - window
    return seen | (keys >= length)


def flex_block_mask(
    anchor_positions: Tensor,
    seq_len: int,
    block_size: int,
    document_ids: Tensor | None = None,
    window: int | None = None,
) -> BlockMask:
    """Return the same mask for flex_attention, which skips hidden tiles; arguments as above."""
    device, (rows, num_anchors) = anchor_positions.device, anchor_positions.shape
    if document_ids is None:
        document_ids = torch.zeros(rows, seq_len, dtype=torch.int32, device=device)
    documents = document_ids.gather(1, anchor_positions)  # [B, N]
    # A part of a pack's anchors has the strides of the whole, and would be compiled once more.
    anchor_positions = anchor_positions.clone(memory_format=torch.contiguous_format)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        anchor = anchor_positions[row, block]
        before = key < anchor  # always False for keys of blocks
        if window is not None:
            before = before & (key > anchor + query % block_size - window)
        same = document_ids[row, key.clamp(max=seq_len - 1)] == documents[row, block]
        own = (key >= seq_len) & ((key - seq_len) // block_size == block)
        return (before & same) | own

    queries = num_anchors * block_size
    make = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    with torch.no_grad():  # compiled once for training and evaluation
        return make(visible, rows, None, queries, seq_len + queries, device=device)
