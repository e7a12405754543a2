"""sdpa in groups of blocks: the same attention as with one mask, in memory that grows with the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.train.drafts import BLOCK, as_batch, as_pack, random_samples, sliding, small_model
from tests.train.memory import Allocations
from train.data.sampling import spread_anchors
from train.draft.blocks import masks
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.masks import GroupedMask, block_attention_mask, sdpa_mask
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.settings import run_config

MASKS = [[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1] * 9]
ANCHORS = [[1, 2, 6, 9], [0, 1, 4], [0, 2, 3, 7]]
WINDOWS = [{}, sliding(4), sliding(3, "full_attention", "sliding_attention")]


def batches() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Documents in one row, with dummies among the blocks, and in a row each."""
    samples = random_samples(MASKS)
    yield "pack", as_pack(samples, ANCHORS)
    yield "rows", as_batch(samples, ANCHORS)


@pytest.mark.parametrize("window", [None, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_groups_make_up_the_mask(monkeypatch, window: int | None, size: int) -> None:
    """What no group has is hidden in the whole mask, and a group's context is no longer than it has to be."""
    monkeypatch.setattr(masks, "GROUP", size)
    for name, batch in batches():
        anchors, width = batch["anchor_positions"], batch["input_ids"].shape[1]
        arguments = (anchors, width, BLOCK, batch.get("document_ids"), window)
        whole, grouped = block_attention_mask(*arguments)[:, 0], sdpa_mask(*arguments)
        assert isinstance(grouped, GroupedMask)
        made = torch.zeros_like(whole)
        for group in grouped.groups:
            queries, part = grouped.queries(group), grouped.of(group)
            count = group.context.stop - group.context.start
            assert part.any(dim=1).all(), "an empty row would be NaN"
            seen = part[:, :count].any(dim=0)
            assert not count or (seen[0] and seen[-1]), (name, group)
            made[group.row, queries, group.context] = part[:, :count]
            own = slice(width + queries.start, width + queries.stop)
            made[group.row, queries, own] = part[:, count:]
        assert torch.equal(made, whole), name


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("fields", WINDOWS, ids=str)
def test_losses_and_gradients_are_those_of_one_mask(monkeypatch, fields: dict, size: int) -> None:
    """In float64, so that what is left is rounding. The mask in one piece is the reference."""
    for _, batch in batches():
        found = []
        for group in (size, 10**9):
            monkeypatch.setattr(masks, "GROUP", group)
            model = small_model(**fields)
            metrics = DSparkTrainerModule(model, 4.0)(**batch)
            metrics.loss.backward()
            found.append({"loss": metrics.loss} | {n: p.grad for n, p in model.named_parameters()})
        for name, value in found[1].items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_checkpointing_and_no_gradients_change_nothing(monkeypatch) -> None:
    monkeypatch.setattr(masks, "GROUP", 3)
    plain, saving = small_model(), small_model()
    saving.activation_checkpointing = True
    batch = as_pack(random_samples(MASKS), ANCHORS)
    losses = [DSparkTrainerModule(model, 4.0)(**batch).loss for model in (plain, saving)]
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        losses.append(DSparkTrainerModule(plain, 4.0)(**batch).loss)
    assert losses[0] == losses[1] == losses[2]
    for name, parameter in plain.named_parameters():
        assert torch.equal(saving.get_parameter(name).grad, parameter.grad), name


def test_few_blocks_have_one_mask() -> None:
    """Up to 64 blocks, the numbers are to the last bit those of a version without groups."""
    for count, kind in ((64, Tensor), (65, GroupedMask)):
        assert isinstance(sdpa_mask(torch.arange(count)[None], 80, BLOCK), kind)


def test_collated_spans_are_what_the_anchors_say(monkeypatch) -> None:
    """They come from the host with the pack, so that nothing waits for a GPU to know the groups."""
    from train.data.loader import PackedSample

    monkeypatch.setattr(masks, "GROUP", 4)
    lengths, documents = [20, 7, 31], []
    samples, start = [], 0
    for number, length in enumerate(lengths):
        samples.append(PackedSample(bytes([number]), start, np.ones(length, np.uint8)))
        documents += [number] * length
        start += length
    collated = collate_anchors(spread_anchors(6))(samples)
    ids = torch.tensor([documents + [-1] * 6])
    for window in (None, 5):
        arguments = (collated["anchor_positions"], 64, BLOCK, ids, window)
        told, found = sdpa_mask(*arguments, collated["spans"]), sdpa_mask(*arguments)
        assert told.groups == found.groups
        assert len(told.groups) == 8  # 18 anchors and 14 dummies
    assert isinstance(collated["spans"], np.ndarray), "a tensor would go to the device"


def test_evaluation_splits_the_spans_with_the_anchors() -> None:
    batch = {**as_pack(random_samples(MASKS), ANCHORS), "spans": np.arange(26).reshape(1, 13, 2)}
    parts = list(DSparkTrainerModule.pieces(batch, 5))
    assert [part["anchor_positions"].shape[1] for part in parts] == [5, 5, 3]
    for name in ("anchor_positions", "block_keep_mask", "spans"):
        joined = np.concatenate([np.asarray(part[name]) for part in parts], axis=1)
        assert np.array_equal(joined, np.asarray(batch[name])), name


def step_bytes(model: Qwen3DSparkModel, length: int, blocks: int) -> tuple[int, int]:
    """Return the bytes of the largest tensor of a step, and of what its forward keeps for the backward."""
    anchors = torch.linspace(0, length - 2, blocks).long()[None]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Allocations() as mode:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            metrics = DSparkTrainerModule(model, 4.0, l1_loss_alpha=0.0)(
                torch.zeros(1, length, dtype=torch.long),
                torch.zeros(1, length, model.fc.in_features),
                torch.ones(1, length),
                anchor_positions=anchors,
                block_keep_mask=torch.ones_like(anchors, dtype=torch.bool),
            )
        metrics.loss.backward()
    return mode.largest, sum(kept.values())


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """A document four times as long with four times the blocks; one mask would take 16 times the bytes."""
    model = small_model(num_hidden_layers=1).float()
    short, long = step_bytes(model, 2_000, 250), step_bytes(model, 8_000, 1_000)
    for before, after in zip(short, long, strict=True):
        assert after < 5 * before, (short, long)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_serve_packs_of_any_groups(monkeypatch, checkpointing: bool) -> None:
    """Groups have other shapes in every pack. Graphs are made for the first one only, whatever is kept."""
    monkeypatch.setattr(masks, "GROUP", 3)
    real = torch.compile

    def traced(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return a function whose graphs run op by op: they are of interest, and there may be no g++."""
        return real(function, dynamic=options["dynamic"], backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    settings = {"train": {"precision": "fp32", "compile": "on", "activation_checkpointing": checkpointing}}
    config = run_config(settings, "test")
    plain, compiled = small_model(), small_model()
    module = DSparkTrainerModule(compiled, 4.0)
    module.prepare(config, torch.device("cpu"))
    module.compile_loss = False
    samples = random_samples([[1] * 12, [1] * 8])
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for anchors in (
        [[0, 1, 2, 3], [0, 1, 2, 3]],
        [[0, 9], [0, 1, 2, 3, 5, 6]],
        [[1, 3, 4, 5, 6, 7, 8, 9], []],
    ):
        batch = as_pack(samples, anchors)
        for each in (DSparkTrainerModule(plain, 4.0), module):
            each.draft_model.zero_grad()
            each(**batch).loss.backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 2  # before and after the attention
    assert graphs == graphs[:1] * 3
