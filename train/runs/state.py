"""How far a run is: everything that a checkpoint knows besides tensors."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.errors import ConfigError, RunError

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
    """Of the data order, the epoch that the next step is looked for in."""
    steps_of_epoch: int = 0
    """How many of its steps are done."""
    evaluated: int = 0
    """The step of the last evaluation."""
    evaluation: dict[str, Any] | None = None
    """Its figures."""
    best: Best | None = None
    """That of the best held-out tau."""
    evaluations_without_gain: int = 0
    """How many have passed since."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without another between them."""
    seconds: float = 0.0
    """Spent on steps, in all sessions together."""
    tokens: int = 0
    """Drafted from, over all ranks."""
    metrics_bytes: int = 0
    """The size of metrics.jsonl; what is behind belongs to steps that will be taken again."""
    window: dict[str, Any] | None = None
    """Sums since the last log line."""
    complete: bool = False
    """Whether there is nothing left to do."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_training(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """A checkpoint's progress, and all of its `training.json`. Raises RunError when it can't be read."""
    try:
        page = json.loads(files.read_small(folder / TRAINING, _LIMIT))
        progress = configuration.build(Progress, page["progress"], TRAINING)
        if not all(isinstance(page[name], dict) for name in ("config", "cache", "version", "machine")):
            raise ValueError("not what this version writes")
        return progress, page
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> RunError:
    """The error for a checkpoint that can't be read, for whatever reason."""
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # not its own fault
        return RunError(f"the checkpoint {folder} can't be read ({reason}): mend that, then run it again")
    return RunError(
        f"the checkpoint {folder} is damaged ({reason}): remove it, and the run continues from the one "
        "before, or from the start if there is none"
    )
