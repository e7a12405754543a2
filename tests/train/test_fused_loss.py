"""The chunked loss against its definition: values, gradients, in every cut and every case."""

from __future__ import annotations

import pytest
import torch

from train.losses import chunks, plain
from train.losses import fused as fused_loss
from train.losses.fused import LowRankBias, SlotOperands
from train.losses.slots import slot_losses

SLOTS, POSITIONS, HIDDEN, RANK, VOCAB = 23, 9, 12, 5, 37
CASES = {
    "bias a slot": {},
    "bias a position": {"by_position": True},
    "no markov head": {"markov": False},
    "no teacher": {"teacher": False},
    "no teacher, bias a position": {"teacher": False, "by_position": True},
    "softcap": {"softcap": 2.0, "by_position": True},
    "softcap and scale": {"softcap": 1.5, "scale": 2.5},
    "scale": {"scale": 0.3, "by_position": True},
}


def operands(case: dict, dtype: torch.dtype, slots: int = SLOTS) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = POSITIONS if case.get("by_position") else slots
    markov = case.get("markov", True)
    return {
        "hidden": normal(slots, HIDDEN),
        "latent": normal(rows, RANK) if markov else None,
        "head": normal(VOCAB, HIDDEN),
        "markov_w2": normal(VOCAB, RANK) if markov else None,
        "labels": torch.randint(VOCAB, (slots,), generator=generator),
        "teacher_hidden": normal(POSITIONS, HIDDEN) if case.get("teacher", True) else None,
        "which": torch.randint(POSITIONS, (slots,), generator=generator),
        "ce_weights": torch.rand(slots, generator=generator, dtype=torch.float64).to(dtype),
        "l1_weights": torch.rand(slots, generator=generator, dtype=torch.float64).to(dtype),
    }


def vocabulary_loss(x: dict, case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The chunked loss of a case's operands: sum, cross entropy and L1."""
    bias = None
    if x["latent"] is not None:
        by_position = bool(case.get("by_position"))
        bias = LowRankBias(latent=x["latent"], weight=x["markov_w2"], by_position=by_position)
    names = ("hidden", "head", "labels", "teacher_hidden", "ce_weights", "l1_weights")
    found = fused_loss.vocabulary_loss(
        SlotOperands(
            **{name: x[name] for name in names},
            positions=x["which"],
            bias=bias,
            softcap=case.get("softcap"),
            logit_scale=case.get("scale", 1.0),
        )
    )
    assert found.soft_ce is None  # no weights, no work
    return found.sum, found.ce, found.l1


def plainly(x: dict, case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """By the definition in train/losses/slots.py, with everything of size [M, V] at once."""

    def capped(states: torch.Tensor) -> torch.Tensor:
        logits = states @ x["head"].T * case.get("scale", 1.0)
        cap = case.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits = capped(x["hidden"])
    if x["latent"] is not None:
        latent = x["latent"][x["which"]] if case.get("by_position") else x["latent"]
        logits = logits + latent @ x["markov_w2"].T
    teacher = None if x["teacher_hidden"] is None else capped(x["teacher_hidden"])[x["which"]]
    losses = slot_losses(logits, x["labels"], teacher)
    ce, l1 = losses.ce, losses.l1
    total = (x["ce_weights"] * ce).sum()
    return (total if l1 is None else total + (x["l1_weights"] * l1).sum()), ce, l1


TRAINED = ("hidden", "latent", "head", "markov_w2")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("rows", "few"), [(1000, 1000), (16, 5), (16, 1)], ids=["whole", "chunks of 16 in fives", "one by one"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(case: str, rows: int, few: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", rows * VOCAB)
    monkeypatch.setattr(plain, "PART_ELEMENTS", few * VOCAB)
    settings = CASES[case]
    x = operands(settings, dtype, slots=47)
    trained = [x[name].requires_grad_(True) for name in TRAINED if x[name] is not None]
    total, ce, l1 = vocabulary_loss(x, settings)
    got = torch.autograd.grad(3 * total, trained)
    wanted_total, wanted_ce, wanted_l1 = plainly(x, settings)
    wanted = torch.autograd.grad(3 * wanted_total, trained)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(total, wanted_total, **close)
    torch.testing.assert_close(ce, wanted_ce, **close)
    assert (l1 is None) == (wanted_l1 is None) == (x["teacher_hidden"] is None)
    if l1 is not None:
        torch.testing.assert_close(l1, wanted_l1, **close)
    for name, a, b in zip([n for n in TRAINED if x[n] is not None], got, wanted, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, **close, msg=f"{name}: {a} {b}")


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    settings = CASES[case]
    x = operands(settings, torch.float64, slots=5)
    # The teacher is a constant by definition, which moving the head would not leave it.
    constant = {"head"} if x["teacher_hidden"] is not None else set()
    names = [name for name in TRAINED if x[name] is not None and name not in constant]

    def total(*trained: torch.Tensor) -> torch.Tensor:
        return vocabulary_loss(x | dict(zip(names, trained, strict=True)), settings)[0]

    assert torch.autograd.gradcheck(total, [x[name].requires_grad_(True) for name in names], eps=1e-7)


def test_frozen_weights_cost_no_products(monkeypatch) -> None:
    """The gradients of weights, and without a graph all gradients, are not even computed."""
    products = []
    for name in ("product", "add_product"):
        original = getattr(plain, name)
        monkeypatch.setattr(
            plain, name, lambda *args, run=original: (products.append(args[-1].shape), run(*args))[1]
        )
    x = operands({}, torch.float32)

    def counted(*trained: str) -> int:
        products.clear()
        for name in TRAINED:
            x[name].requires_grad_(name in trained)
        vocabulary_loss(x, {})
        return len(products)

    forward = counted()  # draft, teacher and bias
    assert forward == 3
    assert counted("hidden") == forward + 1
    assert counted("hidden", "latent", "markov_w2") == forward + 3
    assert counted(*TRAINED) == forward + 4
    with torch.no_grad():
        assert counted(*TRAINED) == forward


@pytest.mark.parametrize("by_position", [True, False])
def test_no_slots_at_all(by_position: bool) -> None:
    x = operands({"by_position": by_position}, torch.float32, slots=0)
    trained = [x[name].requires_grad_(True) for name in TRAINED]
    total, ce, l1 = vocabulary_loss(x, {"by_position": by_position})
    assert total.item() == 0
    assert len(ce) == len(l1) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(total, trained))


def test_bf16_autocast_rounds_products_only() -> None:
    """Against float64 of the same operands rounded to bf16: sums and softmaxes are not rounded."""
    x = operands({"by_position": True}, torch.float32, slots=200)
    rounded = {
        name: value.bfloat16().double() if value is not None and value.is_floating_point() else value
        for name, value in x.items()
    }
    rounded |= {name: x[name].double() for name in ("ce_weights", "l1_weights")}
    wanted, wanted_ce, wanted_l1 = plainly(rounded, {"by_position": True})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, ce, l1 = vocabulary_loss(x, {"by_position": True})
    assert total.dtype == ce.dtype == l1.dtype == torch.float32
    assert abs(total.item() / wanted.item() - 1) < 2e-3
    torch.testing.assert_close(ce.double(), wanted_ce, rtol=0, atol=0.1)
    torch.testing.assert_close(l1.double(), wanted_l1, rtol=0, atol=0.05)


def test_bf16_weights_match_the_definition_in_float64() -> None:
    x = operands({}, torch.float32)
    x |= {name: x[name].bfloat16() for name in TRAINED}
    trained = [x[name].requires_grad_(True) for name in TRAINED]
    total, _, _ = vocabulary_loss(x, {})
    got = torch.autograd.grad(total, trained)
    exact = {n: v.double() if v is not None and v.is_floating_point() else v for n, v in x.items()}
    exact |= {name: x[name].detach().double().requires_grad_(True) for name in TRAINED}
    wanted_total = plainly(exact, {})[0]
    wanted = torch.autograd.grad(wanted_total, [exact[name] for name in TRAINED])
    assert abs(total.item() / wanted_total.item() - 1) < 5e-3
    for name, a, b in zip(TRAINED, got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm(), name
