"""DFlash's counted operations by hand, and against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.train.dflash.drafts import small_config, small_model
from tests.train.drafts import as_pack, random_samples, sliding
from train.data.loader import Pack
from train.draft.dflash.kind import DFLASH
from train.draft.dflash.module import DFlashTrainerModule
from train.losses.slots import Objective

MASKS, ANCHORS = [[1] * 7, [0, 1, 1, 1, 1, 1]], [[0, 2, 5], [1, 2]]
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.addmm_)
# H = 16, V = 31, two captured layers; 4 heads of width 8 for queries, 2 for keys and values; MLP of 24.
LAYER = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24  # weights that a row of a block meets


def batch_and_pack() -> tuple[dict[str, torch.Tensor], Pack]:
    """Without dummies and padding: 13 tokens, five blocks of four rows."""
    batch = as_pack(random_samples(MASKS), ANCHORS, padding=0)
    for name in ("anchor_positions", "block_keep_mask"):
        batch[name] = batch[name][:, :-2]
    collated = {name: batch[name] for name in ("anchor_positions", "block_keep_mask")}
    own = {name: batch[name] for name in ("input_ids", "loss_mask", "document_ids")}
    return batch, Pack(**own, collated=collated, num_tokens=13)


def test_a_count_by_hand() -> None:
    """A multiply-add is two operations; a trained matrix costs three products, a frozen one and fc two."""
    rows, slots = 5 * 4, 3 + 3 + 1 + 3 + 3
    # Teachers are at the position before a label: 0 1 2, 2 3 4, 5; and 1 2 3, 2 3 4 of the second document.
    positions = 6 + 4
    layers = 2 * 3 * 2 * (rows * LAYER + 13 * 2 * 16 * 16)  # keys and values of the context too
    pairs = 4 * sum(anchor + 4 for own in ANCHORS for anchor in own)
    attention = 2 * 3 * 2 * 2 * 32 * pairs  # scores and values
    context = 2 * 2 * 13 * (2 * 16) * 16
    head = 2 * 2 * slots * 16 * 31 + 2 * positions * 16 * 31
    _, pack = batch_and_pack()
    assert DFLASH.flops(small_config(), pack) == layers + attention + context + head
    seen = sum(min(anchor, 3 - row) for own in ANCHORS for anchor in own for row in range(4))  # W = 4
    windowed = 2 * 3 * 2 * 2 * 32 * (seen + 4 * 4 * 5)
    found = DFLASH.flops(small_config(**sliding(4)), pack)
    assert found == layers + windowed + context + head


def test_products_are_those_that_run() -> None:
    """All but attention, whose hidden scores a dense kernel computes too."""
    model, (batch, pack) = small_model(), batch_and_pack()
    model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        DFlashTrainerModule(model, Objective({"ce": 0.5, "l1": 0.5}))(**batch).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    ran = sum(counts.get(product, 0) for product in PRODUCTS)
    pairs = 4 * sum(anchor + 4 for own in ANCHORS for anchor in own)
    wanted = DFLASH.flops(model.config, pack) - 2 * 12 * 32 * pairs
    # The blocks' input gets no gradient, so the first layer costs a little less.
    assert ran == pytest.approx(wanted, rel=0.03)
