"""The draft's backbone as Inductor compiles it for GPUs that are not here, at Qwen3-4B's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gpu_less.mocked.preload import run

pytestmark = pytest.mark.gpu_less
# Packs are numbers of blocks, and whether gradients are wanted. Training packs have one size; evaluation's
# have any, down to the single tile of 128 queries that the compiler knows a kernel of its own for.
CASES: dict[str, dict[str, Any]] = {
    "flex": {
        "packs": [[512, True], [496, False], [16, False], [272, False], [512, True]],
        "machine_code": True,
    },
    "flex, a sliding window, checkpointing, fp32": {
        "packs": [[512, True]],
        "attention": "flex",
        "precision": "fp32",
        "checkpointing": True,
        "layers": 2,
        "use_sliding_window": True,
        "sliding_window": 2048,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "sdpa, checkpointing": {
        "packs": [[512, True], [496, False], [512, True]],
        "attention": "sdpa",
        "checkpointing": True,
    },
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Outcome of each case."""
    found = run("backbone", json.dumps(list(CASES.values())))
    return dict(zip(CASES, found, strict=True))


def test_each_kind_of_step_is_compiled_once(compiled) -> None:
    # A single tile of queries is a shape of its own.
    assert compiled["flex"]["graphs"] == {
        "backbone": 3,
        "backbone backward": 1,
    }


@pytest.mark.parametrize("case", CASES)
def test_each_case_compiles_for_the_kernel_that_auto_chooses(compiled, case) -> None:
    result = compiled[case]
    assert result["attention"] == CASES[case].get("attention", "flex")
    assert any("backward" in name for name in result["graphs"])


def test_a_window_is_a_mask_of_its_own_and_no_graph_more(compiled) -> None:
    assert compiled["flex, a sliding window, checkpointing, fp32"]["graphs"] == {
        "backbone": 1,
        "backbone backward": 1,
    }


def test_attention_is_read_16_bytes_at_a_time_and_fits_an_h100(compiled) -> None:
    kernels = compiled["flex"]["needs"]
    assert len(kernels) >= 3  # forward, backward, forward without gradients
    for kernel in kernels:
        assert 0 < kernel["shared"] <= 232_448, kernel
        assert max(kernel["loads"]) == 16, kernel
        assert not kernel["long_indices"], kernel


def test_attention_fits_a_small_gpu(compiled) -> None:
    """The compiler's own tiles need 101,888 bytes and more; an RTX 3090 has 101,376."""
    cases = [["bfloat16", 128], ["bfloat16", 256]]
    for case, (forward, backward) in zip(cases, run("flex", "rtx3090", json.dumps(cases)), strict=True):
        assert 0 < forward <= 101_376, case
        assert 0 < backward <= 101_376, case


def test_nothing_as_wide_as_the_context_is_copied(compiled) -> None:
    """The five layers' features are 5 x 2560 wide: only the product with fc reads them."""
    wide = [name for name, source in compiled["flex"]["kernels"].items() if f"{5 * 2560}" in source]
    assert wide == []
