"""Anchors: the positions that blocks start at, their labels, and the supervised slots.

An anchor is a position p with `loss_mask[p]` and `loss_mask[p + 1]`. Its block of K slots drafts tokens
p+1 .. p+K: slot k predicts token p+k+1. (DSpark paper, section 3.1; names follow NVIDIA
NeMo-Automodel's documented API, nemo_automodel.components.speculative.dspark.common.)

A row may hold several documents (a pack). `document_ids` `[B, S]` then gives the document of each position.
A block's supervised slots stay in its anchor's document. None stands for one document per row.

Shapes: B rows, S tokens, N anchors, K block size, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def build_anchor_candidate_mask(
    seq_len: int, loss_mask: Tensor, document_ids: Tensor | None = None
) -> Tensor:
    """Return the positions that can be an anchor: supervised, with a supervised successor in their document.

    Args:
        seq_len: S; later tokens of a row are ignored.
        loss_mask: `[B, S]`, non-zero on supervised tokens.
        document_ids: `[B, S]`, or None.

    Returns:
        `[B, S]` bool; the last position is never a candidate.
    """
    supervised = loss_mask[:, :seq_len] > 0.5
    candidates = torch.zeros_like(supervised)
    candidates[:, :-1] = supervised[:, :-1] & supervised[:, 1:]
    if document_ids is not None:
        candidates[:, :-1] &= document_ids[:, : seq_len - 1] == document_ids[:, 1:seq_len]
    return candidates


def sample_anchor_positions(
    seq_len: int,
    loss_mask: Tensor,
    num_anchors: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw anchors uniformly without replacement, independently per row.

    Args:
        seq_len: S.
        loss_mask: `[B, S]`.
        num_anchors: N.
        device: device of the result.
        generator: random generator on `loss_mask`'s device; None uses torch's default.
        document_ids: `[B, S]`, or None.

    Returns:
        `anchor_positions` `[B, N]` int64, ascending, and `block_keep_mask` `[B, N]` bool. A row with
        fewer than N candidates takes them all; its other entries are dummies: position 0, mask False.
    """
    candidates = build_anchor_candidate_mask(seq_len, loss_mask, document_ids)  # [B, S]
    order = torch.rand(candidates.shape, generator=generator, device=candidates.device)
    order = order.masked_fill(~candidates, 2.0)  # above every draw, so that candidates come first
    width = min(num_anchors, candidates.shape[1])
    positions = order.argsort(dim=1)[:, :width]  # [B, <=N]
    keep = candidates.gather(1, positions)
    positions = positions.masked_fill(~keep, seq_len).sort(dim=1).values  # dummies last
    positions = nn.functional.pad(positions, (0, num_anchors - width), value=seq_len)
    keep = positions < seq_len
    return positions.masked_fill(~keep, 0).to(device), keep.to(device)


def build_eval_mask(
    seq_len: int,
    loss_mask: Tensor,
    label_indices: Tensor,
    safe_label_indices: Tensor,
    block_keep_mask: Tensor,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return the supervised slots: labels in the anchor's document that form an unbroken supervised prefix.

    Args:
        seq_len: S.
        loss_mask: `[B, S]`.
        label_indices: positions of the labels, `[B, N, K]`; may be past the end of the row.
        safe_label_indices: these positions, clamped into the row.
        block_keep_mask: `[B, N]`, False for dummy blocks.
        document_ids: `[B, S]`, or None.

    Returns:
        `[B, N, K]` bool.
    """
    rows = torch.arange(loss_mask.shape[0], device=loss_mask.device)[:, None, None]
    supervised = (loss_mask[rows, safe_label_indices] > 0.5) & (label_indices < seq_len)
    if document_ids is not None:
        anchors = safe_label_indices[..., :1] - 1  # an anchor has a successor, so this is not clamped
        supervised &= document_ids[rows, safe_label_indices] == document_ids[rows, anchors]
    unbroken = supervised.int().cumprod(dim=-1).bool()
    return unbroken & block_keep_mask[..., None]


def label_positions(anchor_positions: Tensor, block_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return the position of each slot's label `[B, N, K]`, first unclamped, then clamped into the row."""
    slots = torch.arange(1, block_size + 1, device=anchor_positions.device)
    labels = anchor_positions[..., None] + slots
    return labels, labels.clamp(max=seq_len - 1)


def restarting_positions(document_ids: Tensor) -> Tensor:
    """Return positions counted from the start of each document: `[B, S]` to `[B, S]` int64.

    Each document must be contiguous.
    """
    positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return positions - (positions * begins).cummax(dim=1).values


def create_position_ids(anchor_positions: Tensor, block_size: int) -> Tensor:
    """Return the position ids of the blocks' slots, anchor + k: `[B, N]` to `[B, N*K]`."""
    slots = torch.arange(block_size, device=anchor_positions.device)
    return (anchor_positions[..., None] + slots).flatten(1)


def create_noise_embed(
    embed_tokens: nn.Module,
    input_ids: Tensor,
    anchor_positions: Tensor,
    block_keep_mask: Tensor,
    mask_token_id: int,
    block_size: int,
) -> Tensor:
    """Return the blocks' input: the anchor token's embedding in slot 0, the mask token's in the others.

    Args:
        embed_tokens: token embedding, `[..]` to `[.., H]`.
        input_ids: `[B, S]`.
        anchor_positions: `[B, N]`.
        block_keep_mask: `[B, N]`; a dummy block consists of mask tokens.
        mask_token_id: id that stands for a token to be drafted.
        block_size: K.

    Returns:
        `[B, N*K, H]`.
    """
    anchors = input_ids.gather(1, anchor_positions).masked_fill(~block_keep_mask, mask_token_id)
    ids = torch.full((*anchors.shape, block_size), mask_token_id, dtype=torch.long, device=input_ids.device)
    ids[..., 0] = anchors
    return embed_tokens(ids.flatten(1))
