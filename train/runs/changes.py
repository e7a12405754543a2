"""Settings of a run that may change while it continues, and their record in run.json.

Those in `FREE` do not touch a trained number. A longer run is allowed too: the learning rate follows the
longer schedule from then on, so the run is not the one that would have been that long from the start.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.errors import RunError
from train.config import RunConfig
from train.runs.names import CONFIG, RUN
from train.runs.state import Progress

FREE = (
    "train.log_every",
    "train.local_cache_bytes",
    "train.local_cache_dir",
    "train.reader",
    "train.report_to",
    "train.eval_every",
    "train.early_stopping_patience",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
)
LENGTH = ("train.epochs", "train.max_steps")
_LIMIT = 16 * 2**20
_CHANGES = "changes"


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return settings by their dotted names, as `--set` takes them."""
    tables = dataclasses.asdict(config).items()
    return {f"{table}.{key}": value for table, values in tables for key, value in values.items()}


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two configs differ, by dotted name: the old value and the new one."""
    before, after = flat_settings(old), flat_settings(new)
    both = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: (ours, theirs) for key, (ours, theirs) in both.items() if ours != theirs}


def lengthen(run: Path, progress: Progress, total: int) -> None:
    """Give a run's progress another number of optimiser steps, and let a complete run go on.

    Args:
        run: the run's directory, for the message.

    Raises:
        RunError: the run would end earlier than before.
    """
    if total < progress.total_steps:
        raise RunError(
            f"{run} is a run of {progress.total_steps:,} optimiser steps, {progress.step:,} of them done, "
            f"and can't become one of {total:,}: set train.max_steps to {progress.total_steps} or more, "
            "choose another --run, or pass --fresh to start over"
        )
    if total > progress.total_steps:
        progress.total_steps, progress.complete, progress.evaluations_without_gain = total, False, 0


def record_changes(run: Path, old: RunConfig, new: RunConfig, step: int) -> str | None:
    """Write changed settings to a run's config, and to run.json with the step from which they hold.

    Returns:
        A line for the user; None if nothing has changed.
    """
    changed = changed_settings(old, new)
    if not changed:
        return None
    facts = json.loads(files.read_small(run / RUN, _LIMIT))
    entry = json.loads(json.dumps({"step": step, "settings": changed}))
    changes = facts.setdefault(_CHANGES, [])
    if changes[-1:] != [entry]:  # else killed between the two files
        changes.append(entry)
    files.publish_bytes(run / RUN, (json.dumps(facts, indent=1) + "\n").encode())
    files.publish_bytes(run / CONFIG, configuration.to_toml(new).encode())
    shown = "; ".join(f"{key}: {before}, now {after}" for key, (before, after) in changed.items())
    longer = ", and the learning rate follows the longer schedule" if changed.keys() & set(LENGTH) else ""
    return f"settings changed from step {step} on ({shown}){longer}"
