"""Collate function of EAGLE-3 drafts. There is nothing to draw: every candidate is an anchor.

Training passes the choice of all candidates. Evaluation passes a choice of its own, so that the figures of
all kinds of draft are over the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train.data.loader import Arguments, Collate, PackedSample
from train.data.sampling import AnchorChoice
from train.draft.blocks.collate import collate_anchors


def collate_chains(choose: AnchorChoice, blocks: int = 0) -> Collate:
    """Return the collate function of EAGLE-3 drafts: the anchors of a pack, one chain each.

    Arguments and results are as of `collate_anchors`, but for two. An anchor that begins its document is not
    kept: a chain begins with the target's state before it, and there is none. And a dummy is a copy of the
    last anchor, so that it adds nothing to the context that its neighbours are computed with.
    """
    anchors = collate_anchors(choose, blocks)

    def collate(samples: Sequence[PackedSample]) -> Arguments:
        found = anchors(samples)
        positions, keep = found["anchor_positions"], found["block_keep_mask"]
        spans, following = found["spans"], found["supervised_tokens"]
        assert isinstance(positions, Tensor)
        assert isinstance(keep, Tensor)
        assert isinstance(spans, np.ndarray)
        assert isinstance(following, np.ndarray)
        count = int(keep.sum())
        if count:
            positions[:, count:], spans[:, count:] = positions[:, count - 1], spans[:, count - 1]
        begun = spans[..., 0] < spans[..., 1]
        keep = keep & torch.from_numpy(begun)
        return found | {"block_keep_mask": keep, "supervised_tokens": following * begun}

    return collate
