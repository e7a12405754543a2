"""Anchors, labels and block inputs, by hand and by property."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.draft.blocks.anchors import (
    build_anchor_candidate_mask,
    build_eval_mask,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)

masks = st.integers(1, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def test_candidates_by_hand() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1]])
    got = build_anchor_candidate_mask(7, mask)
    assert got.int().tolist() == [[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert got.dtype == torch.bool


@given(masks, st.integers(1, 15), st.integers(0, 3))
@settings(max_examples=150)
def test_sampling_properties(rows: list[list[int]], count: int, seed: int) -> None:
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    anchors, keep = sample_anchor_positions(
        mask.shape[1], mask, count, torch.device("cpu"), generator=generator
    )
    assert anchors.shape == keep.shape == (len(rows), count)
    for row, positions, kept in zip(rows, anchors.tolist(), keep.tolist(), strict=True):
        candidates = [p for p in range(len(row) - 1) if row[p] and row[p + 1]]
        chosen = [p for p, k in zip(positions, kept, strict=True) if k]
        assert len(chosen) == min(count, len(candidates))
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(candidates)
        assert kept == sorted(kept, reverse=True)  # dummies come last
        assert all(p == 0 for p, k in zip(positions, kept, strict=True) if not k)


def test_sampling_is_uniform_and_seeded() -> None:
    mask = torch.ones(1, 11)
    counts = torch.zeros(11)
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        anchors, _ = sample_anchor_positions(11, mask, 3, torch.device("cpu"), generator=generator)
        counts[anchors[0]] += 1
        again, _ = sample_anchor_positions(
            11, mask, 3, torch.device("cpu"), generator=torch.Generator().manual_seed(seed)
        )
        assert torch.equal(anchors, again)
    # 10 candidates, 3 of 10 each time: 600 expected, standard deviation 20.5; five of them.
    assert counts[10] == 0
    assert (counts[:10] - 600).abs().max() < 103


def test_eval_mask_by_hand() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]])
    labels = torch.tensor([[[1, 2, 3], [5, 6, 7], [4, 5, 6], [1, 2, 3]]])
    keep = torch.tensor([[True, True, True, False]])
    got = build_eval_mask(6, mask, labels, labels.clamp(max=5), keep)
    assert got.int().tolist() == [[[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]]


@given(masks, st.integers(1, 5))
@settings(max_examples=100)
def test_eval_mask_is_the_unbroken_prefix(rows: list[list[int]], block: int) -> None:
    mask = torch.tensor(rows)
    width = mask.shape[1]
    anchors = torch.arange(width).expand(len(rows), -1)
    labels = anchors[..., None] + torch.arange(1, block + 1)
    got = build_eval_mask(width, mask, labels, labels.clamp(max=width - 1), torch.ones_like(anchors).bool())
    for r, row in enumerate(rows):
        for p in range(width):
            run = 0
            while run < block and p + run + 1 < width and row[p + run + 1]:
                run += 1
            assert got[r, p].tolist() == [True] * run + [False] * (block - run)


def test_position_ids_by_hand() -> None:
    got = create_position_ids(torch.tensor([[2, 9], [0, 4]]), 3)
    assert got.tolist() == [[2, 3, 4, 9, 10, 11], [0, 1, 2, 4, 5, 6]]


def test_noise_embed_by_hand() -> None:
    table = torch.nn.Embedding(6, 2)
    ids = torch.tensor([[3, 1, 4, 1]])
    keep = torch.tensor([[True, True, False]])
    got = create_noise_embed(table, ids, torch.tensor([[2, 0, 0]]), keep, 5, 2)
    assert torch.equal(got, table(torch.tensor([[4, 5, 3, 5, 5, 5]])))
