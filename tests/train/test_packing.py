"""A pack gives what its documents give alone: losses, gradients, and nothing seen across a border."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests import reference
from tests.train.drafts import BLOCK, as_batch, as_pack, random_samples, sliding, small_model, spec_of
from train.draft.blocks.anchors import (
    build_anchor_candidate_mask,
    build_eval_mask,
    label_positions,
    restarting_positions,
    sample_anchor_positions,
)
from train.draft.blocks.masks import block_attention_mask, flex_block_mask
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.module import DSparkTrainerModule
from train.losses import compute_dspark_loss

# Documents that end in the middle of an answer, so that a block could run on into the next one.
MASKS = [[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
ANCHORS = [[1, 3, 4], [0, 1, 4], [2], [0, 2, 5]]
HEADS = {name: {"markov_head_type": name} for name in MARKOV_HEADS}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", HEADS)
def test_a_pack_is_its_documents_alone(head: str) -> None:
    model, samples = small_model(**HEADS[head]), random_samples(MASKS)
    expected = reference.loss(
        model.state_dict(keep_vars=True), spec_of(model), samples, ANCHORS, 4.0, 0.3, 0.9, 0.7
    )
    wanted = torch.autograd.grad(expected["loss"], list(model.parameters()), allow_unused=True)
    metrics = DSparkTrainerModule(model, 4.0, 0.3, 0.9, 0.7)(**as_pack(samples, ANCHORS))
    metrics.loss.backward()
    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss"):
        torch.testing.assert_close(
            getattr(metrics, name).double(), expected[name].double().detach(), rtol=2e-5, atol=2e-6, msg=name
        )
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-4, atol=1e-5 * scale + 1e-12, msg=f"{name}: {parameter.grad}"
        )


@pytest.mark.parametrize("head", HEADS)
def test_dummy_blocks_change_no_number(head: str) -> None:
    """Sums over more rows are added up in another order, so a gradient may move by float64's rounding."""
    found = []
    for dummies in (0, 61):
        batch, model = as_pack(random_samples(MASKS), ANCHORS), small_model(**HEADS[head])
        for name, filler in (("anchor_positions", 0), ("block_keep_mask", False)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, dummies), value=filler)
        metrics = DSparkTrainerModule(model, 4.0, 0.3, 0.9, 0.7)(**batch)
        metrics.loss.backward()
        found.append((metrics, gradients(model)))
    (few, wanted), (many, moved) = found
    assert few.loss == many.loss
    for one, other in zip(few.sums.tensors(), many.sums.tensors(), strict=True):
        assert torch.equal(one, other)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            moved[name], gradient, rtol=0, atol=1e-14 * gradient.abs().max().item(), msg=name
        )


def test_a_pack_and_padded_rows_add_up_to_the_same() -> None:
    samples, packed, padded = random_samples(MASKS), small_model(), small_model()
    a = DSparkTrainerModule(packed, 4.0)(**as_pack(samples, ANCHORS))
    b = DSparkTrainerModule(padded, 4.0)(**as_batch(samples, ANCHORS))
    a.loss.backward()
    b.loss.backward()
    torch.testing.assert_close(a.sums.slots, b.sums.slots)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients(padded).items():
        torch.testing.assert_close(gradients(packed)[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_the_public_forward_takes_a_pack() -> None:
    model, batch = small_model(), as_pack(random_samples(MASKS), ANCHORS)
    dense = compute_dspark_loss(model(**batch), 4.0)
    fused = DSparkTrainerModule(model, 4.0)(**batch)
    torch.testing.assert_close(dense.loss, fused.loss, rtol=1e-5, atol=1e-6)


def test_no_document_sees_another() -> None:
    """Change everything about one document and only its own blocks move."""
    model, samples = small_model(), random_samples(MASKS)
    batch = as_pack(samples, ANCHORS)
    outputs = model(**batch)
    before, supervised = outputs.draft_logits.detach()[0], outputs.eval_mask[0]
    document_of_block = batch["document_ids"][0, batch["anchor_positions"][0]]
    for changed in range(len(samples)):
        inside = batch["document_ids"] == changed
        moved_batch = dict(batch)
        states = batch["target_hidden_states"].clone()
        states[inside] += 1.0
        moved_batch["target_hidden_states"] = states
        moved_batch["input_ids"] = torch.where(inside, (batch["input_ids"] + 1) % 31, batch["input_ids"])
        moved = (model(**moved_batch).draft_logits.detach()[0] != before).any(dim=-1)  # [N, K]
        assert torch.equal(moved & supervised, (document_of_block == changed)[:, None] & supervised)


def test_candidates_and_labels_stay_in_their_document_by_hand() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    assert build_anchor_candidate_mask(6, mask, documents).int().tolist() == [[1, 1, 0, 1, 0, 0]]
    anchors = torch.tensor([[0, 1, 3]])
    labels, safe = label_positions(anchors, 3, 6)
    keep = torch.ones(1, 3, dtype=torch.bool)
    supervised = build_eval_mask(6, mask, labels, safe, keep, documents)
    assert supervised.int().tolist() == [[[1, 1, 0], [1, 0, 0], [1, 0, 0]]]
    assert restarting_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0]]
    drawn, kept = sample_anchor_positions(6, mask, 8, torch.device("cpu"), document_ids=documents)
    assert drawn[kept].tolist() == [0, 1, 3]


@pytest.mark.parametrize("window", [None, 3, 5])
def test_both_masks_say_the_same(window: int | None) -> None:
    batch = as_pack(random_samples(MASKS), ANCHORS)
    for documents in (batch["document_ids"], None):
        width = batch["input_ids"].shape[1]
        arguments = (batch["anchor_positions"], width, BLOCK, documents, window)
        dense, flex = block_attention_mask(*arguments), flex_block_mask(*arguments)
        queries, keys = dense.shape[2:]
        row = torch.zeros(queries, keys, dtype=torch.long)
        got = flex.mask_mod(row, row, torch.arange(queries)[:, None] + row, torch.arange(keys) + row)
        assert torch.equal(got, dense[0, 0])


@pytest.mark.parametrize("window", [None, 9, 200])
@pytest.mark.parametrize("blocks", [1, 48, 150])
@pytest.mark.parametrize("documents", [1, 7, 300])
def test_tiles_are_those_that_torch_finds_by_looking_at_every_entry(
    window: int | None, blocks: int, documents: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def ascending(most: int, count: int) -> torch.Tensor:
        return torch.randint(most, (2, count), generator=generator).sort(1).values

    length, size = 700, 7
    mask = flex_block_mask(ascending(length, blocks), length, size, ascending(documents, length), window)
    queries = blocks * size
    wanted = create_block_mask(mask.mask_mod, 2, None, queries, length + queries, device="cpu")
    assert wanted.full_kv_num_blocks.any() == (blocks > 1 and documents == 1 and window is None)
    for name, value in vars(wanted).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(mask, name), value), name
        elif name != "mask_mod":
            assert getattr(mask, name) == value, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("fields", [{}, sliding(4, "full_attention", "sliding_attention")], ids=str)
def test_both_kernels_give_the_same(fields: dict) -> None:
    """Forward only: flex_attention has no backward on a CPU; test_cuda.py has it."""
    model, batch = small_model(**fields), as_pack(random_samples(MASKS), ANCHORS)
    with torch.no_grad():
        plain = DSparkTrainerModule(model, 4.0)(**batch)
        model.attention = "flex"
        flex = DSparkTrainerModule(model, 4.0)(**batch)
    torch.testing.assert_close(flex.loss, plain.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flex.accept_by_position, plain.accept_by_position, rtol=1e-6, atol=1e-7)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, saving = small_model(), small_model()
    saving.activation_checkpointing = True
    for model in (plain, saving):
        DSparkTrainerModule(model, 4.0)(**as_pack(random_samples(MASKS), ANCHORS)).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(saving)[name], gradient), name


def test_a_pack_of_nothing_but_padding_has_a_loss_of_zero() -> None:
    model = small_model()
    batch = as_pack(random_samples([[1, 1]]), [[]])
    batch["document_ids"][:] = -1
    batch["loss_mask"][:] = 0
    metrics = DSparkTrainerModule(model, 4.0)(**batch)
    metrics.loss.backward()
    assert metrics.loss.item() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
