"""Draft and loss against tests/reference.py, a naive float64 loop written from the design alone."""

from __future__ import annotations

import math

import pytest
import torch

from tests import reference
from tests.train.drafts import as_batch, random_samples, sliding, small_model, spec_of
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.module import DSparkTrainerModule
from train.losses import compute_dspark_loss

# RoPE angles are fp32 in the draft by design, so float64 agreement ends here.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
MASKS = [[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1]]
ANCHORS = [[1, 2, 6, 9], [0, 1, 4], [2]]

CASES = {
    **{name: {"markov_head_type": name} for name in MARKOV_HEADS},
    "no markov": {"markov_rank": 0, "markov_head_type": "none", "confidence_head_with_markov": False},
    "confidence without markov": {"confidence_head_with_markov": False},
    "no confidence": {"enable_confidence_head": False},
    "softcap and scale": {"final_logit_softcapping": 2.0, "embedding_scale": 4.0},
    "logit scale": {"logit_scale": 0.3},
    "logit scale under a softcap": {"logit_scale": 2.5, "final_logit_softcapping": 1.5},
    "a window": sliding(4),
    "the shortest window": sliding(3),
    "a window in one layer": sliding(5, "sliding_attention", "full_attention"),
    "one slot": {"block_size": 1},
    "block longer than any answer": {"block_size": 9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gamma", [4.0, None])
def test_losses_and_gradients(case: str, gamma: float | None) -> None:
    model = small_model(**CASES[case])
    samples = random_samples(MASKS)
    weights = model.state_dict(keep_vars=True)
    expected = reference.loss(weights, spec_of(model), samples, ANCHORS, gamma, 0.3, 0.9, 0.7)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected["loss"], list(parameters.values()), allow_unused=True)

    metrics = DSparkTrainerModule(model, gamma, 0.3, 0.9, 0.7)(**as_batch(samples, ANCHORS))
    metrics.loss.backward()

    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss"):
        torch.testing.assert_close(
            getattr(metrics, name).double(), expected[name].double().detach(), **TOLERANCE, msg=name
        )
    assert metrics.tau.item() == pytest.approx(expected["tau"], rel=2e-5)
    assert metrics.accept_rate.item() == pytest.approx(expected["accept_rate"], rel=2e-5)
    for got, want in zip(metrics.accept_by_position.tolist(), expected["accept_by_position"], strict=True):
        assert got == pytest.approx(0.0 if math.isnan(want) else want, rel=2e-5)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_public_forward_gives_the_same_loss(case: str) -> None:
    model = small_model(**CASES[case])
    batch = as_batch(random_samples(MASKS), ANCHORS)
    dense = compute_dspark_loss(
        outputs=model(**batch),
        loss_decay_gamma=4.0,
        ce_loss_alpha=0.3,
        l1_loss_alpha=0.9,
        confidence_head_alpha=0.7,
    )
    gathered = DSparkTrainerModule(model, 4.0, 0.3, 0.9, 0.7)(**batch)
    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss", "tau", "accept_rate"):
        torch.testing.assert_close(getattr(dense, name), getattr(gathered, name), rtol=1e-5, atol=1e-6)


def test_logits_of_every_kept_block() -> None:
    model = small_model(markov_head_type="rnn")
    samples = random_samples(MASKS)
    outputs = model(**as_batch(samples, ANCHORS))
    spec, weights = spec_of(model), model.state_dict()
    for row, (sample, anchors) in enumerate(zip(samples, ANCHORS, strict=True)):
        for column, anchor in enumerate(anchors):
            hidden = reference.block_hidden(weights, spec, sample, anchor)
            logits, _ = reference.block_logits(weights, spec, sample, anchor, hidden)
            slots = reference.supervised_slots(sample, anchor, spec.block_size)
            assert outputs.eval_mask[row, column].tolist() == [k < slots for k in range(spec.block_size)]
            torch.testing.assert_close(
                outputs.draft_logits[row, column, :slots].double(), logits[:slots], **TOLERANCE
            )
    assert not outputs.eval_mask[1, 3:].any()
    assert not outputs.block_keep_mask[2, 1:].any()


def test_micro_batches_share_one_denominator() -> None:
    """Two halves with the whole's denominator add up to the whole, in value and in gradient."""
    samples = random_samples(MASKS)
    whole, halves = small_model(), small_model()
    expected = DSparkTrainerModule(whole, 4.0)(**as_batch(samples, ANCHORS))
    expected.loss.backward()
    module = DSparkTrainerModule(halves, 4.0)
    total = 0.0
    for part in (slice(0, 1), slice(1, 3)):
        batch = as_batch(samples[part], ANCHORS[part])
        metrics = module(**batch, denominator=expected.sums.weight.detach())
        metrics.loss.backward()
        total += metrics.loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-6)
    for (name, a), b in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)
