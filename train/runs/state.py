"""State of a run between two optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its optimiser step and its held-out figure."""

    step: int
    tau: float | None = None
    """None if the cache has no last hidden states, which the acceptance is computed from."""
    ce_loss: float | None = None
    """Cross entropy, in place of tau."""

    @staticmethod
    def of(result: Mapping[str, Any]) -> Best:
        """Take step and figure of an evaluation."""
        tau = result["tau"]
        return Best(result["step"], tau, result["ce_loss"] if tau is None else None)

    def beats(self, other: Best | None) -> bool:
        """Return whether this one is finite and better than another one of the same run."""
        mine, theirs = self._score(), -math.inf if other is None else other._score()
        return math.isfinite(mine) and mine > theirs

    def _score(self) -> float:
        if self.tau is not None:
            return self.tau
        return math.nan if self.ce_loss is None else -self.ce_loss


@dataclass(kw_only=True)
class Progress:
    """State of a run between two optimiser steps."""

    total_steps: int
    """Optimiser steps of the whole run, which the learning rate's schedule depends on."""
    parameters: int
    """Number of trained parameters of the draft."""
    step: int = 0
    """Optimiser steps done, including skipped ones."""
    epoch: int = 0
    """Epoch of the next step."""
    steps_of_epoch: int = 0
    """Steps done in that epoch."""
    evaluated: int = 0
    """Step of the last evaluation."""
    evaluation: dict[str, Any] | None = None
    """Figures of the last evaluation. A plain dict, because every loss term adds a figure."""
    best: Best | None = None
    """Evaluation with the best held-out tau, or cross entropy where there is no tau."""
    evaluations_without_gain: int = 0
    """Evaluations since the best one."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Steps skipped in a row since the last one that was not."""
    seconds: float = 0.0
    """Seconds spent on steps, over all sessions."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    metrics_bytes: int = 0
    """Size of metrics.jsonl in bytes; later bytes belong to steps that will be repeated."""
    window: dict[str, Any] | None = None
    """Sums since the last log line."""
    complete: bool = False
    """True if nothing is left to train."""

    @property
    def measured(self) -> dict[str, Any] | None:
        """Figures of the evaluation at the current step; None without one."""
        last = self.evaluation
        return last if last and last.get("step") == self.step else None
