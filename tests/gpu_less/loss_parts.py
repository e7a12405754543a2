"""Cases of the soft cross entropy, of a draft's own head and of a reduced vocabulary, for both kernels."""

from __future__ import annotations

from tests.gpu_less.loss_cases import LossCase

PART = {"target_vocab": 61, "slots": 21, "vocab": 37}
FROZEN = {
    "soft": LossCase(soft=True),
    "soft, bias a slot": LossCase(soft=True, bias="slot"),
    "soft, scaled and capped": LossCase(soft=True, bias=None, softcap=1.5, scale=2.5),
    "no teacher": LossCase(soft=True, teacher=False, **PART),
    "teacher's head": LossCase(own_head=True, soft=True, softcap=2.0),
    "a part": LossCase(soft=True, **PART),
    "a part, capped, bias a slot": LossCase(soft=True, bias="slot", softcap=2.0, scale=0.3, **PART),
    "a part of the whole": LossCase(whole=True, **PART),
    "a part of the whole, soft": LossCase(whole=True, soft=True, own_head=True, **PART),
    "a part of the whole, capped": LossCase(whole=True, soft=True, softcap=1.5, scale=2.5, **PART),
    "a part of the whole, several chunks": LossCase(
        whole=True, soft=True, rows=16, slots=43, positions=30, vocab=37, target_vocab=61
    ),
}
"""By name; the draft's head is not trained."""
ALL = ("hidden", "head", "latent", "weight")
TRAINED = {
    "own head": LossCase(own_head=True, soft=True, trained=ALL),
    "own head, capped": LossCase(own_head=True, soft=True, softcap=1.5, scale=2.5, trained=ALL),
    "own head of a part": LossCase(own_head=True, soft=True, bias=None, trained=ALL, **PART),
    "own head of a part of the whole": LossCase(
        own_head=True, soft=True, whole=True, bias="slot", softcap=2.0, trained=ALL, **PART
    ),
}
"""By name; it is."""


def assert_covers(case: LossCase) -> None:
    """Labels and likely tokens inside and outside, matches and others: else a case says nothing of them."""
    if case.target_vocab is None:
        return
    x = case.operands()
    assert 0 < (x["labels"] < 0).sum() < case.slots
    if case.whole:
        assert 0.1 < x["teacher_mass"].min() < x["teacher_mass"].max() < 0.999
        assert 0 < x["reachable"].sum() < case.positions
