"""Directory of a run: its lock, its files, and the checks before a command continues or clears it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.cache.manifest import Identity
from pipeline.cache.optional import plain_values
from pipeline.cache.same import differing_fields
from pipeline.errors import ConfigError, RunError, WriteError
from train.config import RunConfig
from train.draft.settings import run_config
from train.runs.changes import FREE, LENGTH, changed_settings
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
_SKIPPED = "skipped"  # in run.json, the samples that the cache skips, if any
# Removed by --fresh, in this order. The config and the identity are overwritten.
_OURS = (CHECKPOINTS, LATEST, BEST, TRACE, METRICS, TRACKERS, *TRACKER_FOLDERS)
_LIMIT = 16 * 2**20


def load_run_config(run: Path) -> RunConfig:
    """Return the resolved config of a run. Raise RunError if there is no run."""
    if not (run / CONFIG).is_file():
        raise RunError(f"no run at {run}: expected {run / CONFIG}; run `dspark train --run {run}` first")
    return run_config(configuration.load_toml(run / CONFIG), str(run / CONFIG))


def load_run_cache(run: Path) -> Identity:
    """Return the identity of the cache that a run trains from. Raise RunError if it can't be read."""
    return _load_run_cache(run)[0]


def _load_run_cache(run: Path) -> tuple[Identity, list[int]]:
    """Return identity and skipped samples of a run's cache. Raise RunError if they can't be read."""
    try:
        values = json.loads(files.read_small(run / RUN, _LIMIT))
        identity = configuration.build(Identity, values["cache"], str(run / RUN))
        return identity, [int(number) for number in values.get(_SKIPPED, [])]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{run / RUN} can't be read ({error}): start over with --fresh") from None


def read_progress(run: Path) -> Progress:
    """Return the progress of a run, from its newest checkpoint.

    Raises:
        RunError: the run has no checkpoint, or the newest one is damaged.
    """
    folder = newest(run)
    if folder is None:
        raise RunError(f"no finished checkpoint in {run}: run `dspark train --run {run}` first")
    return read_training(folder).progress


def check_run(
    run: Path, config: RunConfig, identity: Identity, *, fresh: bool, skipped: Sequence[int] | None = None
) -> None:
    """Check that a run may begin or continue in a directory. Change nothing.

    Args:
        skipped: samples that the cache skips, in which captures of one identity may differ; None does not
            compare them.

    Raises:
        RunError: the directory holds something else, or a run with another config or cache.
        ConfigError: the directory would be cleared, but holds the draft to start from.
    """
    if not _holds_run(run):
        return
    if fresh:
        _check_clearing(run, config)
    else:
        _check_same(run, config, identity, skipped)


def _holds_run(run: Path) -> bool:
    """Return whether the directory holds a run. Raise RunError if something else is in its place."""
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file, expected a directory: choose another --run")
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    if all(name in (_LOCK, RUN) or _is_left_over(name) for name in names):
        return False
    if not (run / CONFIG).is_file():
        raise RunError(f"{run} is not empty and is not a run (it has no {CONFIG}): choose another --run")
    return True


def _check_clearing(run: Path, config: RunConfig) -> None:
    """Check that clearing a run loses only files that training makes again."""
    source = config.draft.init_from
    if source is not None and run.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise ConfigError(
            f"draft.init_from = {source} is in {run}, which --fresh clears: choose another --run"
        )
    if _is_imported(run):
        raise RunError(
            f"{run} holds an imported draft, which --fresh would clear: choose another --run and set "
            f"draft.init_from = {run} to train that draft further"
        )


def _check_same(run: Path, config: RunConfig, identity: Identity, skipped: Sequence[int] | None) -> None:
    """Check that a run has this cache, and this config but for what may change.

    Raises:
        RunError: naming what differs.
    """
    theirs, left_out = _load_run_cache(run)
    differing = [f"cache {line}" for line in differing_fields(theirs, identity)]
    if skipped is not None and left_out != list(skipped):  # samples have other numbers
        differing.append(
            f"cache skipped samples: {len(left_out):,} against {len(skipped):,}, not the same ones"
        )
    changed = changed_settings(load_run_config(run), config)
    imported = _is_imported(run)
    if not differing and (not changed if imported else changed.keys() <= {*FREE, *LENGTH}):
        return
    differing += [f"{key}: {old} against {new}" for key, (old, new) in changed.items()]
    remedy = ", or pass --fresh to start over"
    if imported:
        remedy = f" and set draft.init_from = {run} to train its imported draft further"
    raise RunError(
        f"{run} is a run with other settings (the run's against yours: {'; '.join(differing)}): choose "
        f"another --run{remedy}"
    )


def _is_imported(run: Path) -> bool:
    """Return whether a run's draft was imported, so that training can't make it again."""
    folder = newest(run)
    with suppress(RunError):  # a damaged draft need not be kept
        return folder is not None and read_training(folder).imported is not None
    return False


def in_use(run: Path) -> bool:
    """Return whether a process is training a run."""
    try:
        with (run / _LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or the file system has no locks
        pass
    return False


@contextmanager
def locked(run: Path, *, work: str = "training", option: str = "--run") -> Iterator[None]:
    """Lock a directory, and make it if it does not exist. The lock ends with the process.

    Args:
        work: the verb for what the lock's holder does there, for messages.
        option: the option that names the directory.

    Raises:
        RunError: another process holds the lock.
        WriteError: the directory can't be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / _LOCK).open("w")
    except OSError as error:
        raise WriteError(f"{run} can't be written ({error.strerror}): choose another {option}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is {work} {run}: wait for it, or choose another {option}"
            ) from None
        except OSError:
            pass  # the file system has no locks
        yield


def begin(
    run: Path, config: RunConfig, identity: Identity, *, fresh: bool, skipped: Sequence[int] = ()
) -> None:
    """Write the config and the identity of a new run, or repair an existing run.

    If the process is killed, the directory still holds a run: the old one, or one without a checkpoint.

    Args:
        fresh: clear an existing run first.
        skipped: samples that the cache skips.
    """
    _remove_left_overs(run)
    if fresh:
        _clear(run)
    repair(run, config.train.keep_checkpoints)
    if fresh or not (run / CONFIG).is_file():
        facts = {"version": code_version(), "cache": plain_values(identity)}
        facts |= {_SKIPPED: list(skipped)} if skipped else {}
        files.publish_bytes(run / RUN, (json.dumps(facts, indent=1) + "\n").encode())
        files.publish_bytes(run / CONFIG, configuration.to_toml(config).encode())


def _remove_left_overs(run: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for path in run.iterdir():
        if _is_left_over(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _clear(run: Path) -> None:
    """Remove all files that training made, except the config and the identity, which are overwritten."""
    for name in _OURS:
        path, gone = run / name, run / f".{name}.partial"
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)  # atomic, so that a kill leaves no half of it
            shutil.rmtree(gone)


def _is_left_over(name: str) -> bool:
    """Return whether a name is the temporary name of one of a run's files or folders."""
    ours = "|".join(map(re.escape, (*_OURS, RUN, CONFIG)))
    return re.fullmatch(rf"\.({ours})(~.+)?\.partial", name) is not None


class MetricsFile:
    """File metrics.jsonl: one JSON object per line.

    Args:
        size: bytes to keep; later bytes belong to steps that will be repeated.
    """

    def __init__(self, run: Path, size: int):
        self._path = run / METRICS
        self._path.touch()
        found = self._path.stat().st_size
        if found < size:
            warn(
                f"{self._path} has {found} bytes, expected {size} or more: figures of earlier steps are gone"
            )
        os.truncate(self._path, min(size, found))

    def append(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Flush the file to disk. Return its size in bytes."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
