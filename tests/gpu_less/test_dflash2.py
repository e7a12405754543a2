"""Training of a DFlash2 draft on a GPU that is not here: the host waits for none of its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_less.session import Session
from tests.gpu_less.test_waits import added, waits
from tests.train.exports import KINDS
from tests.train.runs import train_arguments

pytestmark = pytest.mark.gpu_less


def test_a_micro_batch_waits_for_nothing(gpu: Session, gpu_cache: Path, tmp_path: Path) -> None:
    """Two more in each of two steps add no wait, with the L1 distance and D-PACE's weights."""
    found = []
    for count in (1, 3):
        words = train_arguments(
            gpu_cache,
            tmp_path / str(count),
            **KINDS["dflash2"],
            loss__l1_alpha=0.9,
            loss__slot_weights="dpace",
            train__max_steps=2,
            train__micro_batches_per_step=count,
            train__precision="bf16",
        )
        words[words.index("cpu")] = "cuda"
        found.append(waits(gpu.ok(*words).syncs, "Training._step"))
    assert added(*found) == {}
