"""The Triton kernel of the loss, interpreted on the CPU, against the definition and the plain pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu_less import loss_parts
from tests.gpu_less.loss_cases import (
    Interpreter,
    LossCase,
    assert_same,
    compute,
    compute_with_other_weights,
    compute_without_gradients,
    computed_with,
    define,
    define_naively,
)

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.gpu_less


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter()
    yield made
    made.close()


HEADS = {"a row a position": "position", "a row a slot": "slot", "no bias": None}
LOGITS = {
    "plain": {},
    "capped": {"softcap": 2.0},
    "scaled": {"scale": 0.3},
    "scaled and capped": {"softcap": 1.5, "scale": 2.5},
}


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "no teacher"])
@pytest.mark.parametrize("head", HEADS)
def test_it_has_the_definitions_numbers(interpreter, head: str, teacher: bool, logits: str) -> None:
    case = LossCase(bias=HEADS[head], teacher=teacher, **LOGITS[logits])
    got = interpreter.compute(case)
    assert_same(got, define(case))
    assert_same(got, compute(case, "torch"))


@pytest.mark.parametrize("name", loss_parts.FROZEN)
def test_further_terms_and_parts_of_a_vocabulary_against_loops(interpreter, name: str) -> None:
    case = loss_parts.FROZEN[name]
    loss_parts.assert_covers(case)
    got = interpreter.compute(case)
    assert_same(got, define_naively(case))
    assert_same(got, compute(case, "torch"))


def test_a_part_that_is_the_whole_changes_no_bit(interpreter) -> None:
    case = LossCase(vocab=4099, target_vocab=4099, whole=True, soft=True, slots=5)
    got, without = interpreter.compute(case), interpreter.compute(replace(case, whole=False))
    assert got.keys() == without.keys()
    assert all(torch.equal(got[name], value) for name, value in without.items())


@pytest.mark.parametrize("vocab", [4097, 10_007])
def test_the_soft_cross_entropy_of_several_steps(interpreter, vocab: int) -> None:
    case = LossCase(soft=True, whole=True, vocab=vocab, target_vocab=vocab + 9000, slots=3)
    assert_same(interpreter.compute(case), define(case))


SHAPES = {
    "one slot": {"slots": 1, "positions": 1},
    "no slot": {"slots": 0, "positions": 3},
    "several chunks": {"slots": 43, "positions": 30, "rows": 16},
    "one position": {"slots": 12, "positions": 1},
    "positions that no slot has": {"slots": 5, "positions": 40},
    "a vocabulary of one token": {"vocab": 1},
    "a power of two": {"vocab": 64},
    "a step and one token": {"vocab": 4097, "slots": 3},
    "two steps": {"vocab": 8192, "slots": 3},
    "an odd vocabulary of several steps": {"vocab": 10_007, "slots": 3},
    "Qwen3's vocabulary": {"vocab": 151_936, "slots": 3, "positions": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", ["position", "slot"])
def test_ugly_shapes(interpreter, shape: str, bias: str) -> None:
    case = LossCase(bias=bias, **SHAPES[shape])
    # Among very many tokens, some are so near the teacher's that rounding decides the sign.
    assert_same(interpreter.compute(case), define(case), tolerance=1e-5 if case.vocab < 10_000 else 1e-4)


@pytest.mark.parametrize("logits", ["plain", "scaled and capped"])
@pytest.mark.parametrize("vocab", [47, 4096 * 2 + 8])
def test_products_in_bf16_write_the_gradient_over_half_of_the_logits(interpreter, vocab, logits) -> None:
    """Against float64 of the same operands in bf16: the gradient is rounded, no sum is."""
    case = LossCase(vocab=vocab, slots=6, autocast=True, **LOGITS[logits])
    got, wanted = interpreter.compute(case), define(case)
    torch.testing.assert_close(got["ce"].double(), wanted["ce"], rtol=0, atol=0.05)
    torch.testing.assert_close(got["l1"].double(), wanted["l1"], rtol=0, atol=0.02)
    for name in case.names():
        assert (got[name].double() - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


@pytest.mark.parametrize("trained", [(), ("hidden",), ("latent",), ("weight",), ("latent", "weight")])
@pytest.mark.parametrize("logits", ["plain", "capped"])
def test_only_what_is_trained_gets_a_gradient(interpreter, trained: tuple[str, ...], logits: str) -> None:
    case = LossCase(trained=trained, **LOGITS[logits])
    assert_same(interpreter.compute(case), define(case))


def far_apart(x: dict[str, Tensor]) -> None:
    x["hidden"] *= 10_000
    x["teacher_hidden"] *= -10_000


def beyond_fp32(x: dict[str, Tensor]) -> None:
    """Half of the logits of one slot and of one position are -inf; no label is."""
    x["hidden"][2], x["teacher_hidden"][1] = 1e20, 1e20
    x["head"][::2] = -1e20
    x["labels"] = x["labels"].clamp(max=45) // 2 * 2 + 1


def equal_integers(x: dict[str, Tensor]) -> None:
    """Draft and teacher have the same logits, exactly, and cross entropy has no weight."""
    x["teacher_hidden"], x["head"] = x["teacher_hidden"].round(), x["head"].mul(2).round()
    x["hidden"] = x["teacher_hidden"][x["positions"]]
    x["ce_weights"] *= 0


def nan_in_a_slot(x: dict[str, Tensor]) -> None:
    x["hidden"][2, 3] = float("nan")


def nan_in_the_teacher(x: dict[str, Tensor]) -> None:
    x["teacher_hidden"][1] = float("nan")


def infinite_in_a_slot(x: dict[str, Tensor]) -> None:
    x["head"] = x["head"].abs() + 1
    x["hidden"][2] = 3e38  # all its logits are inf


def test_logits_far_apart(interpreter) -> None:
    case = LossCase(change=far_apart, bias=None)
    assert_same(interpreter.compute(case), define(case))


def test_logits_of_minus_infinity_have_no_probability(interpreter) -> None:
    case = LossCase(change=beyond_fp32, bias=None)
    wanted = compute(case, "torch")
    assert wanted["l1"].isfinite().all()
    assert_same(interpreter.compute(case), wanted)


@pytest.mark.parametrize("vocab", [47, 5000])
def test_where_draft_and_teacher_agree_the_sign_is_0(interpreter, vocab: int) -> None:
    got = interpreter.compute(LossCase(change=equal_integers, bias=None, vocab=vocab))
    assert not got["l1"].any()
    assert not got["hidden"].any()
    assert got["matches"].all()


@pytest.mark.parametrize("change", [nan_in_a_slot, nan_in_the_teacher, infinite_in_a_slot])
@pytest.mark.parametrize("bias", [None, "slot"])
def test_what_is_no_number_spreads_as_in_the_plain_pass(interpreter, change, bias) -> None:
    case = LossCase(change=change, bias=bias, trained=("hidden", "latent"))
    got, wanted = interpreter.compute(case), compute(case, "torch")
    assert got["total"].isnan()
    assert got["l1"].isnan().sum() in range(1, case.slots)  # others are not touched
    for name in ("ce", "l1", "hidden"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_weights_that_change_are_seen(interpreter) -> None:
    """The head is copied once, beside the bias's weight."""
    found = interpreter.call(compute_with_other_weights, LossCase())
    assert len({total for total, _ in found}) == 3
    for plain, kernel in found:
        assert kernel == pytest.approx(plain, rel=1e-5)


def test_inference_mode_leaves_nothing_behind(interpreter) -> None:
    found = interpreter.call(compute_without_gradients, LossCase())
    assert found == [found[0]] * 3


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_a_draft_has_the_same_loss_and_gradients_by_both(interpreter, head: str) -> None:
    found = interpreter.call(computed_with, head)
    plain, kernel = found["torch"], found["triton"]
    assert plain.keys() == kernel.keys()
    assert len(plain) > 20
    for name, wanted in plain.items():
        scale = max(1e-3, float(np.abs(wanted).max()))
        np.testing.assert_allclose(kernel[name] / scale, wanted / scale, rtol=1e-4, atol=1e-5, err_msg=name)


def test_only_the_kernel_needs_triton() -> None:
    code = "import sys, train.losses.fused; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
