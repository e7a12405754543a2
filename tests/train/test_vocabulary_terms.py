"""Soft cross entropy, a draft's own head and a reduced vocabulary, against naive loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu_less import loss_parts
from tests.gpu_less.loss_cases import LossCase, assert_same, compute, define, define_naively, naive_inputs
from tests.vocabulary_reference import reach
from train.losses import chunks, plain
from train.losses.fused import SlotOperands, vocabulary_loss
from train.losses.reach import teacher_reach
from train.losses.slots import slot_losses

CASES = loss_parts.FROZEN | loss_parts.TRAINED
WHOLE = {name: case for name, case in CASES.items() if case.whole}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    case = CASES[name]
    loss_parts.assert_covers(case)
    wanted = define_naively(case)
    assert_same(compute(case, "torch"), wanted, 1e-5)
    assert_same(compute(case, "torch", dtype=torch.float64), wanted, 1e-11)
    assert_same(define(case), wanted, 1e-11)


def test_a_few_rows_at_a_time_are_the_same(monkeypatch) -> None:
    case = CASES["own head of a part of the whole"]
    monkeypatch.setattr(plain, "PART_ELEMENTS", 5 * case.vocab)
    assert_same(compute(replace(case, rows=16), "torch"), define_naively(case), 1e-5)


def test_gradients_of_the_soft_cross_entropy_are_p_minus_q() -> None:
    """With the head as the hidden states' basis, their gradient is that of the logits."""
    draft, teacher = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.5, 0.0, 3.0]])
    nothing = torch.zeros(1)
    draft.requires_grad_(True)
    losses = vocabulary_loss(
        SlotOperands(
            hidden=draft,
            head=torch.eye(3),
            labels=torch.tensor([-1]),
            positions=torch.tensor([0]),
            ce_weights=torch.ones(1),
            l1_weights=nothing,
            soft_weights=torch.full((1,), 2.0),
            teacher_hidden=teacher,
        )
    )
    p, q = draft.detach().softmax(-1), teacher.softmax(-1)
    assert losses.ce.item() == 0
    torch.testing.assert_close(losses.soft_ce, -(q * p.log()).sum(-1))
    torch.testing.assert_close(losses.sum.detach(), 2 * losses.soft_ce[0])
    torch.testing.assert_close(torch.autograd.grad(losses.sum, draft)[0], 2 * (p - q))


def test_the_teachers_head_gets_no_gradient() -> None:
    case = CASES["own head"]
    x = case.operands()
    trained = {name: x[name].requires_grad_(True) for name in ("hidden", "head", "teacher_head")}
    names = ("labels", "positions", "ce_weights", "l1_weights", "soft_weights", "teacher_hidden")
    vocabulary_loss(SlotOperands(**trained, **{name: x[name] for name in names})).sum.backward()
    assert trained["head"].grad.abs().max() > 0
    assert trained["teacher_head"].grad is None


def test_a_logit_of_minus_infinity_costs_nothing_where_the_teacher_gives_it_nothing() -> None:
    ninf = float("-inf")
    logits, teacher = torch.tensor([[0.0, 1.0, ninf]]), torch.tensor([[[2.0, 1.0, ninf]]]).softmax(-1)[0]
    *_, soft_ce = plain.differentiate(
        logits, None, teacher, torch.tensor([0]), torch.tensor([[0]]), *torch.ones(3, 1, 1)
    )
    p = logits.softmax(-1)
    assert soft_ce.item() == pytest.approx(-(teacher[0, :2] * p[0, :2].log()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_part_that_is_the_whole_changes_no_bit(softcap: float | None, autocast: bool) -> None:
    case = LossCase(
        vocab=1013, target_vocab=1013, whole=True, soft=True, softcap=softcap, autocast=autocast, slots=31
    )
    x = case.operands()
    assert torch.equal(x["teacher_mass"], torch.ones(case.positions))
    assert x["reachable"].all()
    without, given = compute(replace(case, whole=False), "torch"), compute(case, "torch")
    assert without.keys() == given.keys()
    assert all(torch.equal(given[name], value) for name, value in without.items())


@pytest.mark.parametrize("order", ["ascending", "any"])
def test_the_mass_of_everything_is_exactly_one(order: str) -> None:
    """Rounded sums of 5,000 probabilities are not."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 16, generator=generator) for n in (300, 5003))
    kept = torch.arange(5003) if order == "ascending" else torch.randperm(5003, generator=generator)
    assert ((hidden @ head.T).softmax(-1).sum(-1) != 1).any()
    mass, reachable = teacher_reach(hidden, head, kept, None, 1.0)
    assert (mass == 1).all()
    assert reachable.all()


@pytest.mark.parametrize("rows", [1000, 16])
@pytest.mark.parametrize("name", WHOLE)
def test_reach_against_loops(name: str, rows: int, monkeypatch) -> None:
    case = replace(WHOLE[name], positions=41)
    x = case.operands(torch.float64)
    wanted_mass, wanted_reachable = reach(naive_inputs(case, x))
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", rows * case.target_vocab)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hidden, head = x["teacher_hidden"].to(dtype), x["target_head"].to(dtype)
        mass, reachable = teacher_reach(hidden, head, x["kept"], case.softcap, case.scale)
        assert mass.dtype == dtype
        torch.testing.assert_close(mass, torch.tensor(wanted_mass, dtype=dtype), rtol=tolerance, atol=0)
        assert reachable.tolist() == wanted_reachable


def test_reach_multiplies_in_the_autocast_dtype_and_adds_up_in_fp32() -> None:
    """As the pass does: equal to fp32 of operands rounded to bf16, but for the products' own rounding."""
    x = WHOLE["a part of the whole"].operands()
    given = x["teacher_hidden"], x["target_head"], x["kept"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass, _ = teacher_reach(*given)
    logits = (x["teacher_hidden"].bfloat16() @ x["target_head"].bfloat16().T).float()
    wanted = logits.softmax(-1)[:, x["kept"]].sum(-1)
    assert mass.dtype == torch.float32
    assert not mass.requires_grad
    torch.testing.assert_close(mass, wanted, rtol=1e-5, atol=0)
    assert not torch.equal(mass, teacher_reach(*given)[0])


def test_reach_holds_a_chunk_at_a_time(monkeypatch) -> None:
    """Never [U, V]."""
    held = []
    original = plain.torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda t: (held.append(t.shape), original(t))[1])
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 16 * 61)
    x = replace(WHOLE["a part of the whole"], positions=43).operands()
    assert {tuple(shape) for shape in held} == {(15, 61), (13, 61)}
    assert len(x["teacher_mass"]) == 43


def test_an_unlikely_part_keeps_its_digits() -> None:
    """A mass of 1e-9 is not what is left of 1."""
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[20.0], [0.0], [0.0]])
    mass, reachable = teacher_reach(hidden, head, torch.tensor([1, 2]), None, 1.0)
    assert mass.item() == pytest.approx(2 / (2 + torch.tensor(20.0).double().exp().item()), rel=1e-6)
    assert not reachable.item()


def test_labels_outside_have_no_cross_entropy_in_the_definition() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    ce = slot_losses(logits, torch.tensor([-1, 2, -1]), None).ce
    assert ce[[0, 2]].tolist() == [0, 0]
    gradient = torch.autograd.grad(ce.sum(), logits)[0]
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()


def test_the_plain_pass_without_soft_weights_computes_nothing_of_it(monkeypatch) -> None:
    seen = []
    original = torch.where
    monkeypatch.setattr(torch, "where", lambda *args: (seen.append(args), original(*args))[1])
    compute(LossCase(), "torch")
    assert not seen
    compute(LossCase(soft=True), "torch")
    assert seen
