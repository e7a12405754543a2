"""Page of a checkpoint (training.json): its progress, settings, cache, versions and machine."""

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
from pipeline.text import one_line
from train.config import RunConfig
from train.draft.settings import run_config
from train.runs.names import TRAINING
from train.runs.state import Progress

_LIMIT = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of an imported draft."""

    name: str
    """Name of the directory that it was imported from."""


@dataclass(frozen=True, kw_only=True)
class TrainingPage:
    """Content of training.json."""

    progress: Progress
    config: RunConfig
    cache: Identity
    """Identity of the cache that the draft was trained on."""
    version: dict[str, str]
    """Versions of this project and of its libraries."""
    machine: dict[str, Any]
    """Device, ranks, precision and attention kernel of the run; empty for an imported draft."""
    imported: Origin | None = None
    """Set for a draft that was trained elsewhere."""

    def values(self) -> dict[str, Any]:
        """Return the page as the plain values of its JSON."""
        values = json.loads(json.dumps(asdict(self)))
        best = values["progress"]["best"]
        if best is not None and best["ce_loss"] is None:  # earlier versions read the page of most runs
            del best["ce_loss"]
        return values if self.imported else {k: v for k, v in values.items() if k != "imported"}


def read_training(folder: Path) -> TrainingPage:
    """Read a checkpoint's `training.json`. Settings that a newer version has added are skipped.

    Raises:
        RunError: the file can't be read.
    """
    try:
        values = json.loads(files.read_small(folder / TRAINING, _LIMIT))
        # Progress alone is read strictly: training has to know all of it.
        configuration.build(Progress, values["progress"], f"{TRAINING}.progress")
        values["config"] = run_config(values["config"], f"{TRAINING}.config", skip_unknown=True)
        return configuration.build(TrainingPage, values, TRAINING, skip_unknown=True)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> RunError:
    """Return the error for a checkpoint that can't be read. It says whether to fix or to remove it."""
    reason = one_line(error)
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # not damage
        return RunError(f"the checkpoint {folder} can't be read ({reason}): fix that, then run it again")
    return RunError(
        f"the checkpoint {folder} is damaged ({reason}): remove it, and the run continues from the one "
        "before it, or starts over if there is none"
    )
