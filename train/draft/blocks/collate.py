"""Collate function of block drafters: the anchors of a pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from train.data.loader import Arguments, Collate, PackedSample
from train.data.sampling import AnchorChoice
from train.draft.blocks.masks import context_spans

# Dummy blocks round the number of blocks up to a multiple of this, so that a GPU sees few shapes.
ANCHOR_MULTIPLE = 16


def collate_anchors(choose: AnchorChoice, blocks: int = 0) -> Collate:
    """Return the collate function of block drafters: each sample's anchors, as positions of the pack.

    Args:
        choose: the anchors of each sample.
        blocks: dummy blocks make up for what a pack has less than this.

    It returns `anchor_positions` `[1, N]` int64 and `block_keep_mask` `[1, N]` bool; and on the host `spans`,
    as `masks.context_spans` makes it, and `supervised_tokens` `[1, N]`: how many follow an anchor in its
    sample without a break. A dummy block has position 0, no such tokens, and is not kept.
    """

    def collate(samples: Sequence[PackedSample]) -> Arguments:
        chosen = choose([_candidates(sample.loss_mask) for sample in samples], [s.id for s in samples])
        count = sum(map(len, chosen))
        width = -(-max(count, blocks, 1) // ANCHOR_MULTIPLE) * ANCHOR_MULTIPLE
        anchors, first, following = np.zeros((3, 1, width), dtype=np.int64)
        if count:
            starts = [np.full(len(own), sample.start) for own, sample in zip(chosen, samples, strict=True)]
            first[0, :count] = np.concatenate(starts)
            anchors[0, :count] = np.concatenate(chosen) + first[0, :count]
            pairs = zip(chosen, samples, strict=True)
            following[0, :count] = np.concatenate([_following(own, s.loss_mask) for own, s in pairs])
        return {
            "anchor_positions": torch.from_numpy(anchors),
            "block_keep_mask": (torch.arange(width) < count)[None],
            "spans": context_spans(anchors, first),
            "supervised_tokens": following,
        }

    return collate


def _following(anchors: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """Return the number of supervised tokens after each anchor of a sample, up to the first that is not."""
    ends = np.append(np.flatnonzero(loss_mask == 0), len(loss_mask))
    return ends[np.searchsorted(ends, anchors, side="right")] - anchors - 1


def _candidates(loss_mask: np.ndarray) -> np.ndarray:
    """Return the supervised positions of a sample whose successor is supervised, ascending."""
    supervised = loss_mask.astype(bool)
    return np.flatnonzero(supervised[:-1] & supervised[1:])
