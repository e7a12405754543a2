"""Logits are fp32 on a GPU, whatever the operands are rounded to."""

from __future__ import annotations

import pytest

from tests.gpu_less.session import Session

pytestmark = pytest.mark.gpu_less


def test_logits_are_not_rounded_to_half_precision(gpu: Session) -> None:
    errors = gpu.call("tests.gpu_less.logits:errors").value
    assert errors.keys() == {"half", "autocast", "autocast, gradients", "Markov bias"}
    for name, error in errors.items():
        assert error < 1e-6, name  # bf16 rounds to 2e-3
