"""Supervised slots as numbers: found once, or counted on the host before the device knows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.train.drafts import BLOCK, as_pack, random_samples, small_model
from train.data.loader import PackedSample
from train.data.sampling import drawn_anchors
from train.draft.blocks.anchors import build_eval_mask, label_positions
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.module import teacher_positions
from train.draft.dspark.module import DSparkTrainerModule
from train.losses.slots import Supervised, places

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=4)


def packed(masks: list[list[int]], room: int) -> tuple[list[PackedSample], torch.Tensor, torch.Tensor]:
    """Samples end to end, then padding: for the collate function, and as `[1, P]` tensors."""
    samples, ids, start = [], [], 0
    for number, mask in enumerate(masks):
        samples.append(PackedSample(bytes([number]), start, np.array(mask, np.uint8)))
        ids += [number] * len(mask)
        start += len(mask)
    loss_mask = [value for mask in masks for value in mask] + [0] * room
    return samples, torch.tensor([loss_mask]), torch.tensor([ids + [-1] * room])


@given(MASKS, st.integers(0, 3), st.integers(1, 5))
def test_the_host_counts_the_slots_that_the_device_finds(masks, room: int, block_size: int) -> None:
    samples, loss_mask, documents = packed(masks, room)
    collated = collate_anchors(drawn_anchors(None, 0))(samples)
    anchors, keep = collated["anchor_positions"], collated["block_keep_mask"]
    length = loss_mask.shape[1]
    labels, safe = label_positions(anchors, block_size, length)
    mask = build_eval_mask(length, loss_mask, labels, safe, keep, documents)
    known = teacher_positions(collated["spans"], collated["supervised_tokens"], block_size, length)
    assert known.tolist() == (safe - 1)[mask].tolist()
    supervised = Supervised.of(mask, len(known))
    assert supervised.numbers.tolist() == Supervised.of(mask).numbers.tolist()


@given(st.lists(st.booleans(), max_size=20))
def test_places_are_those_of_the_mask(flags: list[bool]) -> None:
    mask = torch.tensor(flags, dtype=torch.bool)
    wanted = [i for i, flag in enumerate(flags) if flag]
    assert places(mask).tolist() == wanted
    assert places(mask, len(wanted)).tolist() == wanted
    with pytest.raises(RuntimeError, match="counted"):
        places(mask, len(wanted) + 1)


def test_taking_and_laying_out_are_indexing_by_the_mask() -> None:
    mask = torch.tensor([[[True, True, False], [False, False, False], [True, False, False]]])
    supervised = Supervised.of(mask)
    values = torch.arange(18.0).view(1, 3, 3, 2).requires_grad_()
    taken = supervised.take(values)
    assert torch.equal(taken, values[mask])
    (taken**2).sum().backward()
    gradient, values.grad = values.grad, None
    (values[mask] ** 2).sum().backward()
    assert torch.equal(gradient, values.grad)
    wanted = torch.zeros(mask.shape)
    wanted[mask] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(supervised.lay_out(torch.tensor([1.0, 2.0, 3.0])), wanted)
    decay = float(np.exp(-1 / 4))
    assert supervised.weights(4.0).tolist() == pytest.approx([1, decay, 1])


@pytest.mark.parametrize("head", ["vanilla", "gated"])
def test_what_the_host_knows_changes_no_bit(head: str) -> None:
    """Loss, figures and gradients, with the counts of the loader and without."""
    masks = [[0, 1, 1, 1, 1, 1] * 3, [1, 1, 1, 0, 1, 1] * 2, [1] * 9]
    rows = [[1, 3, 4, 13], [0, 1, 4], [0, 2, 5, 7]]
    batch = as_pack(random_samples(masks), rows)
    starts = np.repeat(np.cumsum([0, 18, 12]), [len(row) for row in rows])
    anchors = batch["anchor_positions"].numpy()
    ends = [[*mask, 0] for mask in masks]
    following = [ends[i].index(0, p + 1) - p - 1 for i, row in enumerate(rows) for p in row]
    extra = anchors.shape[1] - len(following)
    assert extra >= 0
    told = {
        "spans": np.stack([np.pad(starts, (0, extra))[None], anchors], axis=-1),
        "supervised_tokens": np.pad(following, (0, extra))[None],
    }
    found = []
    for more in ({}, told):
        model = small_model(markov_head_type=head)
        assert model.block_size == BLOCK
        metrics = DSparkTrainerModule(model, 4.0)(**batch, **more)
        metrics.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([metrics.loss, metrics.slots.l1, metrics.slots.ce, *metrics.sums.tensors(), *gradients])
    assert len(found[0]) == len(found[1]) > 20
    for without, known in zip(*found, strict=True):
        assert torch.equal(without, known)
