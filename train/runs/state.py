"""The page of a checkpoint, training.json: everything that it knows besides tensors."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.cache import Identity
from pipeline.errors import ConfigError, RunError
from train.config import RunConfig

# A checkpoint's own page; with it, the checkpoint is whole.
TRAINING = "training.json"
_LIMIT = 64 * 2**20


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


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an imported draft comes from."""

    name: str
    """Of its directory."""


@dataclass(frozen=True, kw_only=True)
class TrainingPage:
    """training.json."""

    progress: Progress
    config: RunConfig
    cache: Identity
    """Of the cache that the draft was trained on."""
    version: dict[str, str]
    """Of this project and of libraries."""
    machine: dict[str, Any]
    """What a run computes on; empty for an imported draft."""
    imported: Origin | None = None
    """Set for a draft that was trained elsewhere."""

    def values(self) -> dict[str, Any]:
        """Return the page as plain values, as its JSON has them."""
        values = json.loads(json.dumps(asdict(self)))
        return values if self.imported else {k: v for k, v in values.items() if k != "imported"}


def read_training(folder: Path) -> TrainingPage:
    """Read a checkpoint's `training.json`.

    Raises:
        RunError: it can't be read.
    """
    try:
        values = json.loads(files.read_small(folder / TRAINING, _LIMIT))
        return configuration.build(TrainingPage, values, TRAINING)
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> RunError:
    """Return the error for a checkpoint that can't be read, for whatever reason."""
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # not its own fault
        return RunError(f"the checkpoint {folder} can't be read ({reason}): fix that, then run it again")
    return RunError(
        f"the checkpoint {folder} is damaged ({reason}): remove it, and the run continues from the one "
        "before, or from the start if there is none"
    )
