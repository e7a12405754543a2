"""The state of a run between two optimiser steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Best:
    """An evaluation."""

    step: int
    tau: float


@dataclass(kw_only=True)
class Progress:
    """The state of a run between two optimiser steps."""

    total_steps: int
    """Optimiser steps of the whole run: the learning rate's schedule depends on it."""
    parameters: int
    """Of the draft, those that are trained."""
    step: int = 0
    """Optimiser steps done, skipped ones among them."""
    epoch: int = 0
    """Epoch of the next step."""
    steps_of_epoch: int = 0
    """Steps of that epoch that are done."""
    evaluated: int = 0
    """Step of the last evaluation."""
    evaluation: dict[str, Any] | None = None
    """Figures of the last evaluation: a plain dict, since every loss term adds one."""
    best: Best | None = None
    """The evaluation of the best held-out tau."""
    evaluations_without_gain: int = 0
    """Evaluations since the best one."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last good one."""
    seconds: float = 0.0
    """Spent on steps, in all sessions together."""
    tokens: int = 0
    """Drafted from, over all ranks."""
    metrics_bytes: int = 0
    """Size of metrics.jsonl; later bytes belong to steps that will be taken again."""
    window: dict[str, Any] | None = None
    """Sums since the last log line."""
    complete: bool = False
    """Nothing is left to train."""

    @property
    def measured(self) -> dict[str, Any] | None:
        """Figures of the evaluation at this very step, if there was one."""
        last = self.evaluation
        return last if last and last.get("step") == self.step else None
