"""An objective of named terms: a term of the table reaches loss, gradients, logs and results."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from tests.conftest import run_ok
from tests.train.drafts import as_batch, random_samples, small_model
from tests.train.runs import progress_of, train_arguments
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.dspark.settings import DSparkLoss
from train.losses import slots as definition
from train.losses.slots import LossSums, Objective, SlotFigures, Supervised, acceptance, divide, sum_slots
from train.trainer.metrics import Window

WEIGHTS = {"ce": 0.1, "l1": 0.9, "confidence": 1.0}
CPU = torch.device("cpu")


def brier(slots: SlotFigures) -> Tensor:
    """The squared error of the confidence."""
    return (torch.sigmoid(slots.confidence) - acceptance(slots.l1)) ** 2


@pytest.fixture
def with_brier(monkeypatch: pytest.MonkeyPatch) -> Objective:
    monkeypatch.setitem(definition.TERMS, "brier", brier)
    return Objective({**WEIGHTS, "brier": 3.0}, 4.0)


def batch() -> dict[str, Tensor]:
    return as_batch(random_samples([[0, 1, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]]), [[1, 2, 6], [0, 1, 4]])


def test_the_weights_are_those_of_the_loss_table() -> None:
    loss = DSparkLoss(ce_alpha=0.25, l1_alpha=0.5, confidence_alpha=2.0, decay_gamma=None)
    assert Objective.of(loss) == Objective({"ce": 0.25, "l1": 0.5, "confidence": 2.0}, None)
    loss = DSparkLoss(ce_alpha=0.0, l1_alpha=0.0, soft_ce_alpha=0.1)
    assert Objective.of(loss).weights == {"ce": 0.0, "l1": 0.0, "soft_ce": 0.1, "confidence": 1.0}
    with pytest.raises(ConfigError, match="can't all be 0"):
        DSparkLoss(ce_alpha=0.0, l1_alpha=0.0, soft_ce_alpha=0.0)
    with pytest.raises(ConfigError, match="soft_ce_alpha must not be negative"):
        DSparkLoss(soft_ce_alpha=-0.1)


def test_terms_without_a_weight_in_the_table_are_left_out() -> None:
    table = SimpleNamespace(ce_alpha=0.0, soft_ce_alpha=0.5, slot_decay=2.0)
    assert Objective.of(table) == Objective({"ce": 0.0, "soft_ce": 0.5}, 2.0)


def test_a_term_is_weighed_with_the_others(with_brier: Objective) -> None:
    """Slot by slot: losses that fit on paper, w = 1 and exp(-1/4)."""
    slots = SlotFigures(
        supervised=Supervised.of(torch.tensor([[[True, True]]])),
        ce=torch.tensor([1.0, 2.0], dtype=torch.float64),
        l1=torch.tensor([0.5, 1.0], dtype=torch.float64),  # acceptance 0.75, 0.5
        confidence=torch.tensor([0.0, 0.0], dtype=torch.float64),  # 0.5, so errors of 0.0625 and 0
    )
    metrics = divide(sum_slots(slots, with_brier), with_brier)
    second = torch.exp(torch.tensor(-0.25)).item()
    assert metrics.terms["brier"].item() == pytest.approx(0.0625 / (1 + second))
    known = {name: value.item() for name, value in metrics.terms.items()}
    wanted = sum(weight * known[name] for name, weight in WEIGHTS.items()) + 3 * known["brier"]
    assert metrics.loss.item() == pytest.approx(wanted)
    assert list(metrics.values())[:5] == ["loss", "ce_loss", "l1_loss", "confidence_loss", "brier_loss"]


def test_a_term_moves_what_it_depends_on(with_brier: Objective) -> None:
    """The module's gradients are those without the term, plus the term's own on the plain forward."""
    model = small_model()
    data = batch()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = {}
    for key, objective in (("with", with_brier), ("without", Objective(WEIGHTS, 4.0))):
        model.zero_grad()
        DSparkTrainerModule(model, objective=objective)(**data).loss.backward()
        grads = {name: model.get_parameter(name).grad for name in names}
        found[key] = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    outputs = model(**data)
    mask = outputs.eval_mask
    draft, teacher = (x[mask].softmax(-1) for x in (outputs.draft_logits, outputs.aligned_target_logits))
    accept = (1 - (draft - teacher).abs().sum(-1) / 2).detach()
    weights = torch.exp(-torch.arange(mask.shape[-1]) / 4.0).expand(mask.shape)[mask]
    own = ((torch.sigmoid(outputs.confidence_pred[mask]) - accept) ** 2 * weights).sum() / weights.sum()
    model.zero_grad()
    (3 * own).backward()
    moved = 0
    for name in names:
        extra = model.get_parameter(name).grad
        zero = torch.zeros_like(model.get_parameter(name))
        left, right = (
            zero if part is None else part for part in (found["with"][name], found["without"][name])
        )
        torch.testing.assert_close(left - right, zero if extra is None else extra, rtol=1e-4, atol=1e-7)
        moved += extra is not None and bool(extra.any())
    assert moved > 3


def test_the_soft_cross_entropy_is_a_term_like_the_others() -> None:
    """Loss, figures and gradients by the plain forward, w = exp(-k/4)."""
    model = small_model()
    data, objective = batch(), Objective({"ce": 0.3, "soft_ce": 0.7}, 4.0)
    metrics = DSparkTrainerModule(model, objective=objective)(**data)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(metrics.loss, trained, allow_unused=True)
    outputs = model(**data)
    mask = outputs.eval_mask
    log_p, teacher = (x[mask].log_softmax(-1) for x in (outputs.draft_logits, outputs.aligned_target_logits))
    weights = torch.exp(-torch.arange(mask.shape[-1]) / 4.0).expand(mask.shape)[mask]
    soft = -(teacher.exp() * log_p).sum(-1)
    ce = -log_p.gather(1, outputs.target_ids[mask][:, None])[:, 0]
    wanted = ((0.3 * ce + 0.7 * soft) * weights).sum() / weights.sum()
    torch.testing.assert_close(metrics.slots.soft_ce.double(), soft.detach().double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.loss.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        metrics.sums.terms["soft_ce"].double(), (soft * weights).sum().double(), rtol=1e-5, atol=1e-6
    )
    for left, right in zip(got, torch.autograd.grad(wanted, trained, allow_unused=True), strict=True):
        assert (left is None or not left.any()) if right is None else True
        if right is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_a_draft_without_the_term_does_not_know_it() -> None:
    metrics = DSparkTrainerModule(small_model(), 4.0)(**batch())
    assert metrics.slots.soft_ce is None
    assert list(metrics.sums.terms) == ["ce", "l1", "confidence"]


def test_a_term_is_logged_and_survives_a_checkpoint(with_brier: Objective) -> None:
    model = small_model().float()  # as in training
    sums = DSparkTrainerModule(model, objective=with_brier)(**batch()).sums.detach()
    window, again = (Window(with_brier, CPU, None) for _ in range(2))
    window.add(sums, torch.tensor(1.0))
    window.count(tokens=10, flops=1, seconds=2, waited=0)
    again.load(window.state())
    lines = [each.line(3, 0, 1e-3) for each in (window, again)]
    assert lines[0]["brier_loss"] == pytest.approx((sums.terms["brier"] / sums.weight).item())
    assert {k: v for k, v in lines[0].items() if k != "peak_memory_bytes"} == {
        k: v for k, v in lines[1].items() if k != "peak_memory_bytes"
    }
    with pytest.raises(ValueError, match="expected 8 sums"):
        Window(Objective(WEIGHTS, 4.0), CPU, None).load(window_state_of(with_brier, sums))


def window_state_of(objective: Objective, sums: LossSums) -> dict:
    window = Window(objective, CPU, None)
    window.add(sums, torch.tensor(1.0))
    window.count(seconds=1)
    return window.state()


def test_a_term_is_the_same_in_training_and_in_evaluate(
    with_brier: Objective, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_dir: Path
) -> None:
    """Over the same anchors: the term, and the loss that it is part of."""
    monkeypatch.setattr(DSparkLoss, "brier_alpha", 3.0, raising=False)
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=4, train__eval_anchors=1000))
    during = progress_of(run)["evaluation"]
    after = json.loads(run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu", "--json"))
    assert after["blocks"] == during["blocks"]
    assert after["further_losses"] == {"brier": pytest.approx(during["brier_loss"], rel=1e-4)}
    assert during["brier_loss"] > 1e-3
    assert after["loss"] == pytest.approx(during["loss"], rel=1e-4)
    stored = json.loads((run / "best" / "evaluation.json").read_text())
    assert stored["further_losses"] == after["further_losses"]
    known = [stored[f"{name}_loss"] * weight for name, weight in WEIGHTS.items()]
    assert stored["loss"] == pytest.approx(sum(known) + 3 * stored["further_losses"]["brier"])
    shown = run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu")
    assert f", brier {after['further_losses']['brier']:.4f}" in shown


def test_an_objective_may_leave_terms_out() -> None:
    metrics = DSparkTrainerModule(small_model(), objective=Objective({"ce": 1.0}, 4.0))(**batch())
    assert metrics.loss.item() == pytest.approx(metrics.ce_loss.item())
    assert metrics.l1_loss.item() == metrics.confidence_loss.item() == 0


def test_sums_of_parts_are_sums_of_the_whole() -> None:
    module = DSparkTrainerModule(small_model(), 4.0)
    one = module(**batch()).sums.detach()
    both = one + one
    assert [t.tolist() for t in both.tensors()] == [(2 * t).tolist() for t in one.tensors()]
    assert list(both.terms) == ["ce", "l1", "confidence"]
