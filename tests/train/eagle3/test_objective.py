"""EAGLE-3's loss and figures against naive loops, for any vocabulary and for trained and frozen heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.train.eagle3.drafts import STEPS, VOCAB, chosen, pack, small_model
from tests.train.eagle3.reference import Naive, capped
from train.draft.eagle3.module import Eagle3TrainerModule
from train.draft.eagle3.settings import Eagle3Loss
from train.losses.slots import Objective

MASKS = [[0, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
KEPT = [0, 2, 3, 5, 8, 9, 11, 12, 15, 16, 17, 20, 21, 25, 28, 30]
DECAY = 0.6


def run(model, batch: dict[str, Tensor], loss: Eagle3Loss, training: bool, **more):
    module = Eagle3TrainerModule(model, Objective.of(loss)).train(training)
    return module(**batch, **more)


def naive_terms(
    model, weights: dict[str, Tensor], batch: dict[str, Tensor], exact: bool
) -> dict[str, list[tuple[int, Tensor]]]:
    """Each supervised slot's terms by name, with the slot's number; `exact` counts what lies outside."""
    naive, head = Naive(weights, model.config), model.target_head
    kept = KEPT if model.reduced else list(range(VOCAB))
    mask, found = batch["loss_mask"][0].tolist(), {"ce": [], "soft_ce": [], "l1": [], "match": []}
    for start, length in ((0, 8), (8, 5)):
        rows = slice(start, start + length)
        tokens = batch["input_ids"][0, rows].tolist()
        features = batch["target_hidden_states"][0, rows].flatten(1)
        for a in range(1, length - 1):
            count = 0
            while (
                a + count + 1 < length and mask[start + a + count + 1] and mask[start + a] and count < STEPS
            ):
                count += 1
            if not count:
                continue
            finals = naive.finals(features, tokens, a, tokens[a : a + count])
            for k, final in enumerate(finals):
                logs = naive.logits(final).log_softmax(-1)
                teacher = capped(head @ batch["target_last_hidden_states"][0, start + a + k], model.config)
                inside = teacher[kept].softmax(-1)
                label = tokens[a + k + 1]
                zero = torch.zeros((), dtype=torch.float64)
                found["ce"].append((k, -logs[kept.index(label)] if label in kept else zero))
                found["soft_ce"].append((k, -(inside * logs).sum()))
                spread = torch.zeros(VOCAB, dtype=torch.float64)
                spread[kept] = logs.exp()
                if exact:
                    l1 = (spread - teacher.softmax(-1)).abs().sum()
                else:
                    l1 = (logs.exp() - inside).abs().sum()
                found["l1"].append((k, l1))
                best = kept[int(logs.argmax())] == int(teacher.argmax())
                found["match"].append((k, torch.tensor(float(best))))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"kept": KEPT},
        {"kept": KEPT, "train_head": False, "final_logit_softcapping": 3.0, "logit_scale": 0.5},
    ],
    ids=["whole", "reduced", "frozen"],
)
def test_terms_and_gradients_are_those_of_naive_loops(own: dict, training: bool) -> None:
    """The fused pass over the vocabulary, with weights on all three terms."""
    model, batch = small_model(**own), pack(MASKS)
    loss = Eagle3Loss(soft_ce_alpha=1.0, ce_alpha=0.3, l1_alpha=0.7, step_decay=DECAY)
    with torch.set_grad_enabled(training):
        result = run(model, batch, loss, training, observe=True)
    weights = {n: w.detach().clone() for n, w in model.state_dict().items()}
    weights = {n: w.requires_grad_(w.is_floating_point()) for n, w in weights.items()}
    naive = naive_terms(model, weights, batch, exact=not training)
    total = sum(DECAY**k for k, _ in naive["ce"])
    means = {name: sum(DECAY**k * v for k, v in naive[name]) / total for name in ("ce", "soft_ce", "l1")}
    for name, mean in means.items():
        torch.testing.assert_close(result.sums.terms[name] / total, mean.detach(), rtol=1e-6, atol=1e-6)
    assert result.sums.slots.tolist() == [sum(k == s for k, _ in naive["ce"]) for s in range(STEPS)]
    expected = means["soft_ce"] + 0.3 * means["ce"] + 0.7 * means["l1"]
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)
    if not training and model.reduced:
        matches = result.slots.supervised.lay_out(result.slots.matches.double()).sum((0, 1))
        counted = [sum(float(v) for k, v in naive["match"] if k == s) for s in range(STEPS)]
        assert matches.tolist() == counted
    if not training:
        return
    result.loss.backward()
    expected.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-5, atol=1e-6, msg=name)
            compared += 1
    assert compared == 12 + model.config.train_head


def test_steps_weigh_powers_of_the_decay() -> None:
    objective = Objective.of(Eagle3Loss(step_decay=0.8))
    assert objective.weights == {"soft_ce": 1.0, "ce": 0.0, "l1": 0.0}
    assert math.exp(-3 / objective.decay_gamma) == pytest.approx(0.8**3)
    assert Objective.of(Eagle3Loss(step_decay=1.0)).decay_gamma is None


def test_parts_of_a_choice_add_up_to_the_whole() -> None:
    """Evaluation splits a pack's anchors into parts, each with what the host knows of it."""
    model, batch = small_model(kept=KEPT), pack(MASKS) | chosen([1, 4, 5, 10])
    module = Eagle3TrainerModule(model, Objective.of(Eagle3Loss())).eval()
    with torch.no_grad():
        whole = module(**batch)
        parts = [module(**each) for each in module.pieces(batch, 2)]
    assert len(parts) == 3
    total = parts[0].sums + parts[1].sums + parts[2].sums
    for one, other in zip(total.tensors(), whole.sums.tensors(), strict=True):
        torch.testing.assert_close(one, other)


def test_no_term_goes_without_its_teacher() -> None:
    model, batch = small_model(), pack(MASKS)
    del batch["target_last_hidden_states"]
    with pytest.raises(ValueError, match="soft cross entropy needs target_last_hidden_states"):
        run(model, batch, Eagle3Loss(), True)
    result = run(model, batch, Eagle3Loss(soft_ce_alpha=0.0, ce_alpha=1.0), True)
    assert torch.isfinite(result.loss)
    assert result.slots.soft_ce is None
