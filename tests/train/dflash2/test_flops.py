"""DFlash2's counted operations by hand, and against PyTorch's own counter."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.train.dflash.test_flops import ANCHORS, PRODUCTS, batch_and_pack
from tests.train.dflash2.drafts import GROUP, RANK, TAPS, TOP, small_config, small_model
from train.draft.dflash.kind import DFLASH
from train.draft.dflash2.kind import DFLASH2
from train.draft.dflash2.module import DFlash2TrainerModule
from train.losses.slots import Objective

ROWS, SLOTS = 5 * 4, 3 + 3 + 1 + 3 + 3
KERNELS = 6 * ROWS * 2 * 2 * 16 * (2 * TAPS * 16 // GROUP)  # layers, of attention and MLP


def test_a_count_by_hand() -> None:
    """Beside DFlash's: what makes the kernels, the selector's projection, and a product per candidate."""
    config, (_, pack) = small_config(), batch_and_pack()
    selector = 6 * SLOTS * 16 * RANK + 6 * SLOTS * TOP * RANK
    assert DFLASH2.flops(config, pack) == DFLASH.flops(config, pack) + KERNELS + selector


def test_products_are_those_that_run() -> None:
    """All but attention, the selector's sums over its rank, and the logits that are computed once more."""
    model, (batch, pack) = small_model(), batch_and_pack()
    model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        objective = Objective({"ce": 0.5, "l1": 0.5, "selector": 1.0})
        DFlash2TrainerModule(model, objective)(**batch).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    ran = sum(counts.get(product, 0) for product in PRODUCTS)
    pairs = 4 * sum(anchor + 4 for own in ANCHORS for anchor in own)
    positions = 6 + 4
    again = 2 * (SLOTS + positions) * 16 * 31 + 2 * SLOTS * TOP * 16  # and the gradient through them
    wanted = DFLASH2.flops(model.config, pack) - 2 * 12 * 32 * pairs - 6 * SLOTS * TOP * RANK + again
    assert ran == pytest.approx(wanted, rel=0.03)
