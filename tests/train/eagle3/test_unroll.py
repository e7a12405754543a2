"""The unroll against naive loops: states, masks, gradients, kernels."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tests.train.eagle3.drafts import HIDDEN, LAYERS, STEPS, VOCAB, chosen, pack, small_model
from tests.train.eagle3.reference import Naive
from train.draft.blocks.masks import TILE
from train.draft.eagle3 import attention
from train.draft.eagle3.attention import attend_context, flex_view, grouped_view, join_own

MASKS = [[0, 1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1]]
STARTS = (0, 9, 15)


def forward(model, batch: dict[str, Tensor]) -> Tensor:
    return model.draft_blocks(**{k: v for k, v in batch.items() if k != "target_last_hidden_states"})


def naive_states(model, batch: dict[str, Tensor], position: int) -> list[Tensor]:
    """Final states of the chain of an anchor, as far as its document goes."""
    document = batch["document_ids"][0]
    start = STARTS[int(document[position])]
    rows = (document == document[position]).nonzero().squeeze(1)
    tokens = batch["input_ids"][0, rows].tolist()
    anchor = position - start
    naive = Naive(model.state_dict(), model.config)
    fed = tokens[anchor : anchor + STEPS]
    return naive.finals(batch["target_hidden_states"][0, rows].flatten(1), tokens, anchor, fed)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"fc_norm": True, "norm_output": True},
        {"num_key_value_heads": 4, "embedding_scale": 2.5},
    ],
    ids=["plain", "3.1", "ungrouped"],
)
def test_states_are_those_of_naive_loops(own: dict) -> None:
    """Each step of each anchor's chain, in three documents of a pack."""
    model, batch = small_model(**own), pack(MASKS)
    blocks = forward(model, batch)
    compared = 0
    for position in (1, 2, 4, 7, 11, 14, 16, 17):
        expected = torch.stack(naive_states(model, batch, position))
        torch.testing.assert_close(
            blocks.hidden[0, position, : len(expected)], expected, atol=1e-6, rtol=1e-6
        )
        compared += len(expected)
    assert compared == 4 + 4 + 4 + 2 + 4 + 1 + 2 + 1


def test_supervision_is_that_of_all_kinds() -> None:
    """Slot k needs supervised labels a+1 .. a+k+1 in the document; an anchor needs a row before it."""
    model, batch = small_model(), pack(MASKS)
    blocks = forward(model, batch)
    mask, documents = batch["loss_mask"][0].tolist(), batch["document_ids"][0].tolist()
    for a in range(len(mask)):
        for k in range(STEPS):
            labels = range(a + 1, a + k + 2)
            inside = all(p < len(mask) and mask[p] and documents[p] == documents[a] for p in labels)
            begins = a in STARTS or documents[a] < 0
            expected = bool(mask[a]) and inside and not begins
            assert bool(blocks.eval_mask[0, a, k]) == expected, (a, k)
            if expected:
                assert blocks.target_ids[0, a, k] == batch["input_ids"][0, a + k + 1]
                assert blocks.teacher_positions[0, a, k] == a + k


def test_a_choice_of_anchors_computes_the_same_chains() -> None:
    """Evaluation's choice gives the states of all positions' forward, wherever they stand in the choice."""
    model, batch = small_model(), pack(MASKS)
    every = forward(model, batch)
    some = forward(model, batch | chosen([4, 7, 11, 12, 17]))
    torch.testing.assert_close(some.hidden[0, :5], every.hidden[0, [4, 7, 11, 12, 17]])
    assert torch.equal(some.eval_mask[0, :5], every.eval_mask[0, [4, 7, 11, 12, 17]])
    assert not some.eval_mask[0, 5].any()
    assert torch.isfinite(some.hidden).all()


@pytest.mark.parametrize("what", ["target_hidden_states", "input_ids"])
def test_nothing_that_a_chain_may_not_see_moves_it(what: str) -> None:
    """Step k knows its document's features before the anchor and tokens up to a + k, bit for bit no more.

    A document's first token stands in no row. Steps that leave the document are not supervised.
    """
    model, batch = small_model(), pack(MASKS)
    before, documents = forward(model, batch).hidden, batch["document_ids"][0].tolist()
    for position in (0, 5, 8, 9, 12, 17, 18):
        changed = batch[what].clone()
        if what == "input_ids":
            changed[0, position] = (changed[0, position] + 1) % VOCAB
        else:
            changed[0, position] *= -1
        moved = (before != forward(model, batch | {what: changed}).hidden).any(-1)[0]  # [S, K]
        for a, k in itertools.product(range(18), range(STEPS)):
            if a in STARTS or a + k >= 18 or documents[a + k] != documents[a]:
                continue
            sees = documents[position] == documents[a]
            sees &= position <= a + k and position not in STARTS if what == "input_ids" else position < a
            assert bool(moved[a, k]) == sees, (position, a, k)


def test_gradients_are_those_of_naive_loops() -> None:
    """Of every weight, through all steps: the states fed back, and the keys of earlier steps."""
    model, batch = small_model(fc_norm=True), pack([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    model.train()
    direction = torch.randn(12, STEPS, HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    blocks = forward(model, batch | {"loss_mask": batch["loss_mask"]})
    at = [(2, 4), (3, 4), (9, 2)]  # anchors, and their steps inside the document
    (sum((blocks.hidden[0, a, :n] * direction[a, :n]).sum() for a, n in at)).backward()
    weights = {n: w.detach().clone().requires_grad_() for n, w in model.state_dict().items()}
    naive, total = Naive(weights, model.config), torch.zeros((), dtype=torch.float64)
    for a, count in at:
        rows, start = (slice(0, 7), 0) if a < 7 else (slice(7, 12), 7)
        tokens = batch["input_ids"][0, rows].tolist()
        fed = tokens[a - start : a - start + count]
        features = batch["target_hidden_states"][0, rows].flatten(1)
        finals = naive.finals(features, tokens, a - start, fed)
        total = total + sum((f * direction[a, k]).sum() for k, f in enumerate(finals))
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("lm_head"):
            torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_small_groups_and_checkpointing_change_nothing(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Groups of 2 chains and recomputed steps give the states and gradients of one group."""

    def run(own: bool) -> tuple[Tensor, list[Tensor]]:
        model, batch = small_model(), pack(MASKS)
        model.activation_checkpointing = own and checkpointing
        hidden = forward(model.train(), batch).hidden
        hidden.pow(3).sum().backward()
        return hidden.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    states, gradients = run(False)
    monkeypatch.setattr(attention, "GROUP", 2)
    found, others = run(True)
    torch.testing.assert_close(found, states)
    assert len(gradients) == len(others) == 12
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)


def states(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_grouped_attention_has_its_own_derivatives() -> None:
    """Of the attended values and of the logarithms, by finite differences."""
    first, end = torch.tensor([[0, 0, 2]]), torch.tensor([[1, 2, 5]])
    view = grouped_view(first, end)
    operands = states(1, 4, 3, 2), states(1, 2, 5, 2), states(1, 2, 5, 2)
    assert torch.autograd.gradcheck(lambda *each: attend_context(*each, view), operands)


def ranges() -> tuple[Tensor, Tensor]:
    """Rows that 300 chains see of 290, in tiles that are seen whole, in part and not at all."""
    first = torch.cat([torch.zeros(150), torch.full((150,), 140)]).long()[None]
    end = torch.cat([torch.arange(1, 151), torch.arange(290, 440) // 3 + 60]).long()[None]
    end[0, 100] = 129  # alone of its tile in seeing a key of the next one
    return first, end


def test_flex_attention_sees_what_the_groups_see() -> None:
    """The kernel for GPUs, run on the CPU, where it looks at each entry of the mask."""
    operands = states(1, 4, 300, 4), states(1, 2, 290, 4), states(1, 2, 290, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled, and how slow that is
        found = attend_context(*(e.detach() for e in operands), flex_view(*ranges(), 290))
    expected = attend_context(*operands, grouped_view(*ranges()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_flex_attention_skips_just_the_hidden_tiles() -> None:
    """On a GPU it looks at no entry of a tile that is hidden, or seen whole: these are torch's own."""
    view = flex_view(*ranges(), 290)
    torchs = create_block_mask(view.mask_mod, 1, None, 300, 290, device="cpu", BLOCK_SIZE=TILE)
    assert torch.equal(view.to_dense(), torchs.to_dense())
    assert view.full_kv_num_blocks.tolist() == torchs.full_kv_num_blocks.tolist()
    assert view.kv_num_blocks.tolist() == torchs.kv_num_blocks.tolist()
    for ours, theirs, counts in (
        (view.kv_indices, torchs.kv_indices, view.kv_num_blocks),
        (view.full_kv_indices, torchs.full_kv_indices, view.full_kv_num_blocks),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            assert ours[0, 0, row, :count].tolist() == theirs[0, 0, row, :count].tolist()


def test_own_keys_join_as_further_columns() -> None:
    """Joined by logarithms, or as columns of one softmax: the same."""
    query, keys, values = states(1, 4, 5, 8), states(1, 2, 7, 8), states(1, 2, 7, 8)
    own_keys, own_values = [states(1, 2, 5, 8), states(1, 2, 5, 8) * 3], [states(1, 2, 5, 8)] * 2
    view = grouped_view(torch.zeros(1, 5).long(), torch.arange(3, 8)[None])
    found = join_own(query, *attend_context(query, keys, values, view), own_keys, own_values)
    for head in range(4):
        for chain in range(5):
            q, seen = query[0, head, chain], 3 + chain
            columns = [*keys[0, head // 2, :seen], *(k[0, head // 2, chain] for k in own_keys)]
            rows = [*values[0, head // 2, :seen], *(v[0, head // 2, chain] for v in own_values)]
            shares = torch.stack([q @ c / 8**0.5 for c in columns]).softmax(0)
            torch.testing.assert_close(found[0, head, chain], shares @ torch.stack(rows))


def test_spans_of_the_host_are_looked_at() -> None:
    """Facts from the collate function replace what would be asked of the device."""
    model, batch = small_model(), pack(MASKS) | chosen([4, 7, 11])
    spans = np.array([[[0, 4], [0, 7], [9, 11], [0, 0]]])
    expected = forward(model, batch).hidden
    assert torch.equal(forward(model, batch | {"spans": spans}).hidden, expected)
    with pytest.raises(ValueError, match=f"width {LAYERS * HIDDEN}.*got {2 * HIDDEN}"):
        forward(model, batch | {"target_hidden_states": batch["target_hidden_states"][:, :, :2]})
