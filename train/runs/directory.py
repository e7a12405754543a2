"""A run's directory: whose it is, what is in it, and whether a command may go on with it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.cache.manifest import Identity, differing_fields
from pipeline.errors import ConfigError, RunError, WriteError
from train.config import RunConfig
from train.runs.checkpoint import newest, repair
from train.runs.names import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    LATEST,
    METRICS,
    RUN,
    TRACE,
    TRACKER_FOLDERS,
    TRACKERS,
)
from train.runs.page import read_training
from train.runs.provenance import code_version
from train.runs.state import Progress
from train.runtime.console import warn

_LOCK = ".lock"
# What is cleared, in this order; config and identity are written over.
_OURS = (CHECKPOINTS, LATEST, BEST, TRACE, METRICS, TRACKERS, *TRACKER_FOLDERS)
_LIMIT = 16 * 2**20


def load_run_config(run: Path) -> RunConfig:
    """The resolved config of a run. Raises RunError when there is no run."""
    if not (run / CONFIG).is_file():
        raise RunError(f"no run at {run}: expected {run / CONFIG}; run `dspark train --run {run}` first")
    return configuration.build(RunConfig, configuration.load_toml(run / CONFIG), str(run / CONFIG))


def load_run_cache(run: Path) -> Identity:
    """The identity of the cache that a run trains from. Raises RunError when it can't be read."""
    try:
        values = json.loads(files.read_small(run / RUN, _LIMIT))["cache"]
        return configuration.build(Identity, values, str(run / RUN))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{run / RUN} can't be read ({error}): start over with --fresh") from None


def read_progress(run: Path) -> Progress:
    """How far a run is, by its newest checkpoint.

    Raises:
        RunError: it has none, or that is damaged.
    """
    folder = newest(run)
    if folder is None:
        raise RunError(f"no finished checkpoint in {run}: run `dspark train --run {run}` first")
    return read_training(folder).progress


def check_run(run: Path, config: RunConfig, identity: Identity, *, fresh: bool) -> None:
    """Check that a run may begin or continue in a directory; change nothing.

    Raises:
        RunError: it holds something else, or a run of another config or cache.
        ConfigError: it would be cleared, and holds the draft to start from.
    """
    if not _holds_run(run):
        return
    if fresh:
        _check_clearing(run, config)
    else:
        _check_same(run, config, identity)


def _holds_run(run: Path) -> bool:
    """Return whether there is a run. Raises RunError where something else is in its place."""
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file, and a run is a directory: choose another --run")
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    if all(name in (_LOCK, RUN) or _is_left_over(name) for name in names):
        return False
    if not (run / CONFIG).is_file():
        raise RunError(f"{run} is not empty and is no run (it has no {CONFIG}): choose another --run")
    return True


def _check_clearing(run: Path, config: RunConfig) -> None:
    """Check that clearing a run loses nothing that training would not make again."""
    source = config.draft.init_from
    if source is not None and run.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise ConfigError(
            f"draft.init_from = {source} is in {run}, which --fresh clears: choose another --run"
        )
    if _is_imported(run):
        raise RunError(
            f"{run} holds an imported draft, which --fresh would clear: choose another --run, with "
            f"draft.init_from = {run} to train that draft further"
        )


def _check_same(run: Path, config: RunConfig, identity: Identity) -> None:
    """Check that a run has this config and this cache."""
    differing = [f"cache {line}" for line in differing_fields(load_run_cache(run), identity)]
    differing += differing_settings(load_run_config(run), config)
    if not differing:
        return
    remedy = "or pass --fresh to start it over"
    if _is_imported(run):
        remedy = f"with draft.init_from = {run} to train its imported draft further"
    raise RunError(
        f"{run} is a run of other settings (its own, against what is asked for: {'; '.join(differing)}): "
        f"choose another --run, {remedy}"
    )


def _is_imported(run: Path) -> bool:
    """Whether a run's draft came from elsewhere; no training would make it again."""
    folder = newest(run)
    with suppress(RunError):  # a damaged one is nothing to keep
        return folder is not None and read_training(folder).imported is not None
    return False


def differing_settings(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """The settings in which two configs differ, one `table.key: ours against theirs` each."""
    others = flat_settings(theirs)
    return [f"{key}: {v} against {others[key]}" for key, v in flat_settings(ours).items() if v != others[key]]


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Settings by their dotted names, as `--set` takes them."""
    tables = dataclasses.asdict(config).items()
    return {f"{table}.{key}": value for table, values in tables for key, value in values.items()}


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make a run's directory if need be and have it alone; the lock ends with the process.

    Raises:
        RunError: another process is at work in it.
        WriteError: it can't be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / _LOCK).open("w")
    except OSError as error:
        raise WriteError(f"{run} can't be written ({error.strerror}): choose another --run") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process trains {run} just now: wait for it, or choose another --run"
            ) from None
        except OSError:
            pass  # a file system that knows no locks
        yield


def begin(run: Path, config: RunConfig, identity: Identity, *, fresh: bool) -> None:
    """Write what a new run is, or repair an existing one; `fresh` clears it first.

    Killed at any moment, it leaves a run: the old one, or one that has no checkpoint yet.
    """
    _remove_left_overs(run)
    if fresh:
        _clear(run)
    repair(run, config.train.keep_checkpoints)
    if fresh or not (run / CONFIG).is_file():
        facts = {"version": code_version(), "cache": dataclasses.asdict(identity)}
        files.publish_bytes(run / RUN, (json.dumps(facts, indent=1) + "\n").encode())
        files.publish_bytes(run / CONFIG, configuration.to_toml(config).encode())


def _remove_left_overs(run: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for path in run.iterdir():
        if _is_left_over(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _clear(run: Path) -> None:
    """Remove everything that training made; config and identity are written over."""
    for name in _OURS:
        path, gone = run / name, run / f".{name}.partial"
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)  # at once: half of it is worth nothing
            shutil.rmtree(gone)


def _is_left_over(name: str) -> bool:
    """Whether it is the temporary name of one of a run's own files or folders."""
    ours = "|".join(map(re.escape, (*_OURS, RUN, CONFIG)))
    return re.fullmatch(rf"\.({ours})(~.+)?\.partial", name) is not None


class MetricsFile:
    """metrics.jsonl: one JSON object a line.

    Args:
        size: bytes of it that count; later ones belong to steps that are taken again.
    """

    def __init__(self, run: Path, size: int):
        self._path = run / METRICS
        self._path.touch()
        found = self._path.stat().st_size
        if found < size:
            lost = f"{self._path} has {found} bytes where the checkpoint knows of {size}"
            warn(f"{lost}: figures of earlier steps are gone")
        os.truncate(self._path, min(size, found))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Flush it to the disk; its size in bytes."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
