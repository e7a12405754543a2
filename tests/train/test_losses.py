"""The loss by hand: three tokens in the vocabulary, figures that fit on paper."""

from __future__ import annotations

import math

import pytest
import torch

from tests.train.drafts import as_batch, random_samples, small_model
from train.draft.dspark.model import DSparkForwardOutput
from train.draft.dspark.module import DSparkTrainerModule
from train.losses import compute_dspark_loss
from train.losses.slots import slot_weights


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits whose softmax is the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def one_block(mask: list[bool], confidence: list[float] | None) -> DSparkForwardOutput:
    return DSparkForwardOutput(
        draft_logits=logits_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])[None, None],
        target_ids=torch.tensor([[[0, 1]]]),
        eval_mask=torch.tensor([[mask]]),
        block_keep_mask=torch.tensor([[True]]),
        confidence_pred=None if confidence is None else torch.tensor([[confidence]], dtype=torch.float64),
        aligned_target_logits=logits_of([0.25, 0.25, 0.5], [0.2, 0.6, 0.2])[None, None],
    )


def test_two_slots_by_hand() -> None:
    # L1: |.25| + 0 + |.25| = 0.5 and .1 + .2 + .1 = 0.4, so a = 0.75 and 0.8.
    # gamma 2 weighs the slots 1 and exp(-1/2).
    metrics = compute_dspark_loss(
        outputs=one_block([True, True], [0.0, math.log(4.0)]),  # confidence 1/2 and 4/5
        loss_decay_gamma=2.0,
        ce_loss_alpha=0.1,
        l1_loss_alpha=0.9,
        confidence_head_alpha=2.0,
    )
    w = math.exp(-0.5)
    ce = (math.log(2) + w * -math.log(0.8)) / (1 + w)
    l1 = (0.5 + w * 0.4) / (1 + w)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    confidence = (math.log(2) + w * entropy) / (1 + w)
    assert metrics.ce_loss.item() == pytest.approx(ce)
    assert metrics.l1_loss.item() == pytest.approx(l1)
    assert metrics.confidence_loss.item() == pytest.approx(confidence)
    assert metrics.loss.item() == pytest.approx(0.1 * ce + 0.9 * l1 + 2 * confidence)
    assert metrics.accept_by_position.tolist() == pytest.approx([0.75, 0.8])
    assert metrics.accept_rate.item() == pytest.approx(0.775)
    assert metrics.tau.item() == pytest.approx(1 + 0.75 + 0.75 * 0.8)


def test_a_cut_block_counts_what_it_has() -> None:
    metrics = compute_dspark_loss(outputs=one_block([True, False], None), loss_decay_gamma=2.0)
    assert metrics.ce_loss.item() == pytest.approx(math.log(2))
    assert metrics.l1_loss.item() == pytest.approx(0.5)
    assert metrics.confidence_loss.item() == 0
    assert metrics.tau.item() == pytest.approx(1.75)
    assert metrics.accept_by_position.tolist() == pytest.approx([0.75, 0.0])
    assert metrics.sums.slots.tolist() == [1, 0]


def test_nothing_supervised_is_zero_with_a_gradient() -> None:
    model = small_model()
    batch = as_batch(random_samples([[0, 1, 0, 1]]), [[1]])
    metrics = DSparkTrainerModule(model, 4.0)(**batch)
    metrics.loss.backward()
    assert metrics.loss.item() == 0
    assert metrics.tau.item() == 1
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_teacher_and_acceptance_get_no_gradient() -> None:
    """The confidence target c* is a constant: only the confidence logit moves that term."""
    outputs = one_block([True, True], [0.3, -0.2])
    for tensor in (outputs.draft_logits, outputs.confidence_pred, outputs.aligned_target_logits):
        tensor.requires_grad_(True)
    compute_dspark_loss(outputs, None, 0.0, 0.0, 1.0).loss.backward()
    assert outputs.confidence_pred.grad.abs().min() > 0
    assert outputs.draft_logits.grad is None or not outputs.draft_logits.grad.any()
    assert outputs.aligned_target_logits.grad is None


def test_weights() -> None:
    assert slot_weights(3, None).tolist() == [1, 1, 1]
    assert slot_weights(3, 4.0).tolist() == pytest.approx([1, math.exp(-0.25), math.exp(-0.5)])


def test_without_a_teacher_the_l1_term_is_refused() -> None:
    batch = as_batch(random_samples([[1, 1, 1]]), [[0]])
    del batch["target_last_hidden_states"]
    with pytest.raises(ValueError, match="target_last_hidden_states"):
        DSparkTrainerModule(small_model(), 4.0)(**batch)
    metrics = DSparkTrainerModule(small_model(), 4.0, l1_loss_alpha=0.0)(**batch)
    assert metrics.loss.item() == pytest.approx(0.1 * metrics.ce_loss.item())
    assert metrics.ce_loss.item() > 0
