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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig

from train.draft.blocks.anchors import create_position_ids, restarting_positions
from train.draft.blocks.config import FULL, SLIDING

# Blocks that sdpa computes together. More see more that is hidden; fewer take more launches.
GROUP = 64
# Queries and keys of a tile of flex_attention's mask: its kernels skip hidden tiles, and look at no entry of
# those that are seen whole.
TILE = 128


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
    # In 32 bits, as kernels compute in. A part of a pack's anchors has the strides of the whole, for which
    # all would be compiled once more: hence a copy.
    anchors = anchor_positions.to(torch.int32).clone(memory_format=torch.contiguous_format)  # [B, N]
    first = torch.zeros_like(anchors)
    if document_ids is not None:
        first = anchors - restarting_positions(document_ids).gather(1, anchor_positions).to(torch.int32)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        anchor, lowest = anchors[row, block], first[row, block]
        if window is not None:
            lowest = torch.maximum(lowest, anchor + query % block_size - window + 1)
        own = seq_len + block * block_size
        return ((key >= lowest) & (key < anchor)) | ((key >= own) & (key < own + block_size))

    seen = _seen_of_tiles(anchors, first, seq_len, block_size, window)[:, None]  # [B, 1, Q tiles, key tiles]
    queries = anchors.shape[1] * block_size
    return BlockMask.from_kv_blocks(
        *_ordered((seen > 0) & (seen < TILE * TILE)),
        *_ordered(seen == TILE * TILE),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(queries, seq_len + queries),
    )


def _seen_of_tiles(
    anchors: Tensor, first: Tensor, seq_len: int, block_size: int, window: int | None
) -> Tensor:
    """Return how many entries of each tile of the mask are True, `[B, query tiles, key tiles]`.

    Counted slot by slot from the two ranges of keys that it sees, so that no entry is looked at.
    """
    queries, device = anchors.shape[1] * block_size, anchors.device
    blocks = torch.arange(anchors.shape[1], dtype=torch.int32, device=device)
    own = (seq_len + block_size * blocks).expand_as(anchors)
    ranges = torch.stack([first, anchors, own, own + block_size], dim=-1)  # [B, N, 4]
    lowest, anchor, own, end = ranges.repeat_interleave(block_size, dim=1)[..., None].unbind(2)  # [B, Q, 1]
    if window is not None:
        slots = torch.arange(queries, dtype=torch.int32, device=device)[:, None] % block_size
        lowest = torch.maximum(lowest, anchor + slots - window + 1)
    starts = torch.arange(0, seq_len + queries, TILE, dtype=torch.int32, device=device)
    seen = (anchor.minimum(starts + TILE) - lowest.maximum(starts)).clamp(min=0)
    seen += (end.minimum(starts + TILE) - own.maximum(starts)).clamp(min=0)
    seen = F.pad(seen, (0, 0, 0, -queries % TILE))
    return seen.unflatten(1, (-1, TILE)).sum(2)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of True in the last dimension, and all places there with those of True first."""
    places = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), places.to(torch.int32)
