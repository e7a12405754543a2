"""DFlash's states, logits, losses and gradients against a naive float64 loop; D-PACE's weights likewise."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.train.dflash import reference as dflash_reference
from tests.train.dflash.drafts import ANCHORS, BLOCK, MASKS, small_model
from tests.train.drafts import as_batch, as_pack, random_samples, sliding, spec_of
from train.draft.blocks.masks import context_spans
from train.draft.dflash.module import DFlashTrainerModule, dpace_weights
from train.losses.slots import Objective, SlotFigures, Supervised, divide, slot_losses, sum_slots

# RoPE angles are fp32 in the draft by design, so float64 agreement ends here.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
SMOOTHING = 0.3
OBJECTIVES = {
    "decay": {"gamma": 3.0, "ce_alpha": 1.0, "l1_alpha": 0.0, "smoothing": None},
    "decay, L1": {"gamma": 3.0, "ce_alpha": 0.3, "l1_alpha": 0.9, "smoothing": None},
    "even": {"gamma": None, "ce_alpha": 1.0, "l1_alpha": 0.0, "smoothing": None},
    "D-PACE": {"gamma": None, "ce_alpha": 1.0, "l1_alpha": 0.0, "smoothing": SMOOTHING},
    "D-PACE, L1": {"gamma": None, "ce_alpha": 0.3, "l1_alpha": 0.9, "smoothing": SMOOTHING},
}
SHAPES = {
    "two rows": {"block_size": 2},
    "block longer than any answer": {"block_size": 8},
    "softcap and scales": {"final_logit_softcapping": 2.0, "embedding_scale": 4.0, "logit_scale": 0.3},
    "the shortest window": sliding(BLOCK),
    "a window in one layer": sliding(5, "sliding_attention", "full_attention"),
}
CASES = [
    pytest.param(as_pack, {}, list(OBJECTIVES), id="every objective"),
    pytest.param(as_batch, {}, ["D-PACE, L1"], id="padded rows"),
    *(pytest.param(as_pack, fields, ["D-PACE, L1"], id=name) for name, fields in SHAPES.items()),
]


def module_of(model, *, gamma, ce_alpha, l1_alpha, smoothing) -> DFlashTrainerModule:
    return DFlashTrainerModule(model, Objective({"ce": ce_alpha, "l1": l1_alpha}, gamma), smoothing)


@pytest.mark.parametrize(("layout", "fields", "objectives"), CASES)
def test_losses_and_gradients(layout, fields: dict, objectives: list[str]) -> None:
    model, samples = small_model(**fields), random_samples(MASKS)
    weights, spec, parameters = model.state_dict(keep_vars=True), spec_of(model), list(model.parameters())
    drafted = dflash_reference.all_logits(weights, spec, samples, ANCHORS)
    for objective in objectives:
        settings = OBJECTIVES[objective]
        expected = dflash_reference.loss(weights, spec, samples, ANCHORS, drafted, **settings)
        gradients = torch.autograd.grad(expected["loss"], parameters, retain_graph=True)
        model.zero_grad()
        result = module_of(model, **settings)(**layout(samples, ANCHORS))
        result.loss.backward()
        torch.testing.assert_close(result.loss.double(), expected["loss"].detach(), **TOLERANCE)
        for name in ("ce", "l1"):
            found = result.sums.terms[name] / result.sums.weight
            torch.testing.assert_close(found.double(), expected[name].detach(), **TOLERANCE, msg=name)
        assert result.sums.weight.item() == pytest.approx(expected["divisor"], rel=2e-5)
        if settings["smoothing"] is not None:
            wanted = torch.tensor(expected["weights"], dtype=torch.float64)
            torch.testing.assert_close(result.slots.weights.double(), wanted, **TOLERANCE)
            assert not result.slots.weights.requires_grad
        for (name, parameter), wanted in zip(model.named_parameters(), gradients, strict=True):
            scale = wanted.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_states_and_logits_of_every_block() -> None:
    """The whole block's, its anchor's row apart, beyond the end of its document too."""
    model, samples = small_model(**sliding(5, "full_attention", "sliding_attention")), random_samples(MASKS)
    batch = as_pack(samples, ANCHORS)
    del batch["target_last_hidden_states"]
    blocks = model.draft_blocks(**batch)
    assert blocks.hidden.shape[2] == BLOCK - 1
    found = blocks.hidden[blocks.block_keep_mask]
    supervised = blocks.eval_mask[blocks.block_keep_mask]
    spec, weights = spec_of(model), model.state_dict()
    pairs = [(sample, a) for sample, own in zip(samples, ANCHORS, strict=True) for a in own]
    assert len(found) == len(pairs)
    for (sample, anchor), hidden, mask in zip(pairs, found, supervised, strict=True):
        wanted = reference.block_hidden(weights, spec, sample, anchor)[1:]
        torch.testing.assert_close(hidden, wanted, **TOLERANCE)
        logits = dflash_reference.block_logits(weights, spec, sample, anchor)
        torch.testing.assert_close(model.draft_logits(hidden).double(), torch.stack(logits), **TOLERANCE)
        slots = reference.supervised_slots(sample, anchor, BLOCK - 1)
        assert mask.tolist() == [slot < slots for slot in range(BLOCK - 1)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_plain_definition_gives_the_same(objective: str) -> None:
    """From logits of all slots, through autograd, as `train.losses.slots` defines the loss."""
    settings, fused, plain = OBJECTIVES[objective], small_model(), small_model()
    batch = as_pack(random_samples(MASKS), ANCHORS)
    result = module_of(fused, **settings)(**batch)
    result.loss.backward()
    last = batch.pop("target_last_hidden_states")
    blocks = plain.draft_blocks(**batch)
    supervised = Supervised.of(blocks.eval_mask)
    teacher = plain.draft_logits(last[0, supervised.take(blocks.teacher_positions)])
    logits = plain.draft_logits(supervised.take(blocks.hidden))
    losses = slot_losses(logits, supervised.take(blocks.target_ids), teacher)
    weights = None
    if settings["smoothing"] is not None:
        confidences = supervised.lay_out(torch.exp(-losses.ce.detach()))
        weights = supervised.take(dpace_weights(confidences, blocks.eval_mask, settings["smoothing"]))
    figures = SlotFigures(supervised, losses.ce, losses.l1, None, weights=weights)
    objective_ = Objective({"ce": settings["ce_alpha"], "l1": settings["l1_alpha"]}, settings["gamma"])
    metrics = divide(sum_slots(figures, objective_), objective_)
    metrics.loss.backward()
    torch.testing.assert_close(result.loss, metrics.loss, rtol=1e-6, atol=1e-9)
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_what_the_host_knows_changes_nothing() -> None:
    """`spans` and `supervised_tokens`, which count more tokens than a block has slots."""
    samples, batch = random_samples(MASKS), as_pack(random_samples(MASKS), ANCHORS)
    starts, following, begin = [], [], 0
    for sample, own in zip(samples, ANCHORS, strict=True):
        starts += [begin] * len(own)
        following += [reference.supervised_slots(sample, anchor, 99) for anchor in own]
        begin += len(sample.input_ids)
    padded = {"first": [*starts, 0, 0], "tokens": [*following, 0, 0]}
    first, tokens = (torch.tensor([row]).numpy() for row in padded.values())
    assert max(following) > BLOCK - 1
    known = {"spans": context_spans(batch["anchor_positions"].numpy(), first), "supervised_tokens": tokens}
    found = [module_of(small_model(), **OBJECTIVES["D-PACE, L1"])(**batch, **given) for given in ({}, known)]
    assert torch.equal(found[0].loss, found[1].loss)
    for one, other in zip(found[0].sums.tensors(), found[1].sums.tensors(), strict=True):
        assert torch.equal(one, other)


def test_dpace_does_not_trust_a_label_that_cannot_be_drafted() -> None:
    """Outside the draft's vocabulary a label has no cross entropy, and no chance of being accepted."""
    model = small_model(draft_vocab_size=12)
    model.keep(torch.arange(0, 24, 2))
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(12, 16, generator=torch.Generator().manual_seed(1)))
    samples = random_samples(MASKS)
    module = module_of(model, **OBJECTIVES["D-PACE"])
    slots = module(**as_pack(samples, ANCHORS)).slots
    blocks = model.draft_blocks(**{k: v for k, v in as_pack(samples, ANCHORS).items() if "last" not in k})
    labels = model.draft_ids(slots.supervised.take(blocks.target_ids))
    confidences = torch.where(labels < 0, 0, torch.exp(-slots.ce.detach()))
    assert 0 < (labels < 0).sum() < len(labels)
    counts = slots.supervised.mask.sum(-1)[blocks.block_keep_mask].tolist()
    wanted = [w for own in confidences.split(counts) for w in dflash_reference.dpace(own.tolist(), SMOOTHING)]
    assert slots.weights.tolist() == pytest.approx(wanted, rel=1e-6)


def test_micro_batches_share_one_denominator() -> None:
    """D-PACE's weights are a block's own: two halves over the whole's denominator add up to the whole."""
    samples, settings = random_samples(MASKS), OBJECTIVES["D-PACE, L1"]
    whole, halves = small_model(), small_model()
    expected = module_of(whole, **settings)(**as_batch(samples, ANCHORS))
    expected.loss.backward()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        batch = as_batch(samples[part], ANCHORS[part])
        result = module_of(halves, **settings)(**batch, denominator=expected.sums.weight.detach())
        result.loss.backward()
        total += result.loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-6)
    for (name, one), other in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other[1].grad, rtol=1e-5, atol=1e-8, msg=name)


def test_a_measurement_weighs_all_drafts_alike() -> None:
    """D-PACE's weights follow the draft: losses weighed by them can't be compared between checkpoints."""
    for seed in (0, 1):
        model = small_model(seed)
        module = module_of(model, **OBJECTIVES["D-PACE"])
        with torch.no_grad():
            result = module(**as_pack(random_samples(MASKS), ANCHORS))
        torch.testing.assert_close(result.loss, result.slots.ce.mean())
        assert result.sums.weight == result.sums.slots.sum()


@pytest.mark.parametrize("smoothing", [0.05, 0.5, 1.0])
def test_dpace_weights_are_those_of_the_naive_loop(smoothing: float) -> None:
    """Prefixes of every length. What lies behind them must not matter."""
    generator, slots = torch.Generator().manual_seed(0), 5
    confidences = torch.rand(2, 6, slots, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 5, 0, 3, 1, 2]])
    mask = torch.arange(slots) < lengths[..., None]
    found = dpace_weights(confidences, mask, smoothing)
    for row in range(2):
        for block in range(6):
            count = int(lengths[row, block])
            wanted = dflash_reference.dpace(confidences[row, block, :count].tolist(), smoothing)
            assert found[row, block].tolist() == pytest.approx(wanted + [0.0] * (slots - count), rel=1e-12)
    later = torch.where(mask, confidences, 7.0)
    assert torch.equal(dpace_weights(later, mask, smoothing), found)
    if smoothing == 1:  # every slot is as good as certain: a slot weighs the slots from it on
        assert found[..., 0].tolist() == lengths.tolist()
