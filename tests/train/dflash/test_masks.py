"""Context of a block, bit for bit: change one thing at a time, and see which states move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.dflash.drafts import ANCHORS, BLOCK, MASKS, small_model
from tests.train.drafts import VOCAB, as_pack, random_samples, sliding
from train.draft.blocks import masks

# A kernel, the blocks of a group, and the window.
CASES = {
    "dense": ("sdpa", 64, None),
    "dense, the shortest window": ("sdpa", 64, BLOCK),
    "groups": ("sdpa", 2, None),
    "groups, window": ("sdpa", 2, 6),
    "flex, window": ("flex", 64, 6),
}


def states(model, batch: dict[str, Tensor]) -> Tensor:
    """All rows that draft, of the blocks that are kept: `[n, K, H]`."""
    with torch.no_grad():
        return model.draft_blocks(**batch).hidden[batch["block_keep_mask"]]


def pack() -> dict[str, Tensor]:
    batch = as_pack(random_samples(MASKS), ANCHORS)
    del batch["target_last_hidden_states"]
    return batch


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES)
def test_a_block_sees_the_context_before_its_anchor_and_nothing_else(monkeypatch, case: str) -> None:
    """A layer, so that each row shows what it sees itself. Position by position of a pack, padding too."""
    attention, group, window = CASES[case]
    monkeypatch.setattr(masks, "GROUP", group)
    model = small_model(num_hidden_layers=1, **(sliding(window, "sliding_attention") if window else {}))
    model.attention = attention
    batch = pack()
    before, documents = states(model, batch), batch["document_ids"][0]
    anchors = batch["anchor_positions"][batch["block_keep_mask"]]
    rows = anchors[:, None] + torch.arange(1, BLOCK)  # positions of the rows that draft
    for position in range(len(documents)):
        features = batch["target_hidden_states"].clone()
        features[0, position] += 1
        moved = (states(model, {**batch, "target_hidden_states": features}) != before).any(-1)
        seen = (documents[anchors] == documents[position]) & (position < anchors)
        wanted = seen[:, None] & (position > rows - window if window else True)
        assert torch.equal(moved, wanted.expand_as(moved)), position
        ids = batch["input_ids"].clone()
        ids[0, position] = (ids[0, position] + 1) % VOCAB
        moved = (states(model, {**batch, "input_ids": ids}) != before).any(-1)
        assert torch.equal(moved, (anchors == position)[:, None].expand_as(moved)), position


def test_no_block_sees_another() -> None:
    """Two layers. Move one anchor at a time to the position behind it, or drop the block."""
    model, batch = small_model(), pack()
    before, kept = states(model, batch), int(batch["block_keep_mask"].sum())
    for block in range(kept):
        others = [number for number in range(kept) if number != block]
        anchors = batch["anchor_positions"].clone()
        anchors[0, block] += 1
        after = states(model, {**batch, "anchor_positions": anchors})
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[block], before[block])
        keep = batch["block_keep_mask"].clone()
        keep[0, block] = False
        assert torch.equal(states(model, {**batch, "block_keep_mask": keep}), before[others])
