"""The data of a page about runs: the files that training and measuring left, read once.

Figures that nobody made are None from here on, and so are those that do not fit their field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline import files
from pipeline.errors import RunError
from train.draft import TABLES
from train.experiments.compare import compare, named_runs
from train.runs.changes import flat_settings
from train.runs.checkpoint import checkpoints
from train.runs.directory import load_run_cache, load_run_config, read_progress
from train.runs.figures import (
    Bin,
    Calibration,
    Evaluation,
    Reliability,
    Speculation,
    SpeculationRun,
    ThresholdRow,
)
from train.runs.find import NamedRun
from train.runs.names import METRICS, RUN, TRAINING
from train.runs.open import find_checkpoint
from train.runs.page import read_training
from train.runs.results import LARGEST, read_calibration, read_evaluation, read_speculation
from train.runtime.console import warn

_METRICS_LIMIT = 2**30
_Figures = TypeVar("_Figures", Evaluation, Calibration, Speculation)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything known about a run."""

    index: int
    """Place among the page's runs; decides its colour."""
    path: Path
    row: dict[str, Any]
    """Row of `compare`: name, settings that differ, how far the newest checkpoint is."""
    settings: dict[str, Any]
    """Settings by dotted name."""
    identity: dict[str, Any]
    """Identity of the cache it was trained on; empty where the run does not say."""
    training: dict[str, Any]
    """training.json of the best checkpoint; empty without any."""
    progress: dict[str, Any]
    """Progress of the newest checkpoint: what training took so far."""
    written: str | None
    """Day of the best checkpoint, in UTC."""
    log: list[dict[str, Any]]
    """Lines of metrics.jsonl about optimiser steps."""
    held_out: list[dict[str, Any]]
    """Lines of metrics.jsonl about evaluations during training, with the tokens and seconds until then."""
    evaluation: Evaluation | None
    """Of the best checkpoint, as the two after it; None where nobody measured it."""
    calibration: Calibration | None
    """Of the best checkpoint."""
    speculation: Speculation | None
    """Of the best checkpoint."""

    @property
    def name(self) -> str:
        """End of its path, as long as it takes to tell it from the others."""
        return self.row["run"]

    @property
    def kind(self) -> str:
        """Title of its kind of draft."""
        return TABLES[self.settings["draft.kind"]].title

    @property
    def slots(self) -> int | None:
        """K, the tokens drafted in a round; None where no evaluation tells it."""
        return len(by_position(self, "accept_by_position")) or self.row["slots"]

    @property
    def measured_step(self) -> int | None:
        """Optimiser step of the measured checkpoint: the best, which may not be the newest."""
        return dig(self.training, "progress", "step")

    @property
    def imported(self) -> bool:
        """True if it was trained elsewhere, on unknown data."""
        return dig(self.training, "imported") is not None

    @property
    def has_confidence(self) -> bool:
        """True if the draft has a confidence head."""
        return bool(self.settings.get("draft.confidence_head"))

    @property
    def live(self) -> tuple[SpeculationRun, ...]:
        """Live decoding, a row per temperature."""
        return self.speculation.runs if self.speculation else ()

    @property
    def last_live(self) -> SpeculationRun | None:
        """Row that is closest to how held-out figures are taken: sampling, where it was tried."""
        return max(self.live, key=lambda row: row.temperature, default=None)


def by_position(run: RunData, key: str) -> tuple[float | None, ...]:
    """Return a figure of the evaluation by position in the block; empty where nobody measured it."""
    return (getattr(run.evaluation, key) if run.evaluation else None) or ()


def temperatures_of(runs: Sequence[RunData]) -> list[float]:
    """Collect the temperatures of live decoding, from low to high."""
    return sorted({row.temperature for run in runs for row in run.live})


def dig(values: Any, *keys: str) -> Any:
    """Look up nested keys of training.json or an identity; None where one is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def number(value: Any) -> float | None:
    """Return a value of a log or of training.json if it is a number that can be drawn, or else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def gather(runs: Sequence[Path]) -> list[RunData]:
    """Read runs, in the order given.

    Args:
        runs: directories of runs, paths of their checkpoints, or folders of runs, which stand for these
            sorted by name.

    Raises:
        RunError: a directory that is neither, or a file of one that is damaged.
    """
    found = named_runs(runs)
    try:
        rows = compare(runs)
        return [_run(index, *pair) for index, pair in enumerate(zip(found, rows, strict=True))]
    except RecursionError:
        names = ", ".join(str(run.path) for run in found)
        raise RunError(f"a JSON file in {names} can't be read: it is nested too deeply") from None


def _run(index: int, run: NamedRun, row: dict[str, Any]) -> RunData:
    path = run.path
    folder = find_checkpoint(path, run.checkpoint_or(None)) if checkpoints(path) else None
    lines = list(_lines(path / METRICS))
    progress = {} if folder is None else dataclasses.asdict(read_progress(path))
    return RunData(
        index=index,
        path=path,
        row=row,
        settings=flat_settings(load_run_config(path)),
        identity=dataclasses.asdict(load_run_cache(path)) if (path / RUN).exists() else {},
        training={} if folder is None else read_training(folder).values(),
        progress=progress,
        written=None if folder is None else _day(folder / TRAINING),
        log=[line for line in lines if "held_out" not in line],
        held_out=[
            {**_cost(line, progress), **line["held_out"]}
            for line in lines
            if isinstance(line.get("held_out"), dict)
        ],
        evaluation=None if folder is None else _fitting(read_evaluation, folder),
        calibration=None if folder is None else _fitting(read_calibration, folder),
        speculation=None if folder is None else _fitting(read_speculation, folder),
    )


def _cost(line: dict[str, Any], progress: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens and seconds trained until an evaluation, of an older log those of the newest one."""
    last = {} if line["step"] != progress.get("step") else progress
    return {name: line.get(name, last.get(name)) for name in ("tokens", "seconds")}


def _fitting(read: Callable[..., _Figures | None], folder: Path) -> _Figures | None:
    """Read figures without what does not fit, and warn of that."""
    try:
        return read(folder)
    except RunError as error:
        found = read(folder, skip_misfits=True)  # raises it again where nothing can be read
        warn(str(error))
        return found


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of metrics.jsonl, without one at the end that is still being written."""
    if not path.is_file():
        return
    try:
        text = files.read_small(path, _METRICS_LIMIT).decode()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}): fix that, or remove it") from None
    for count, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or number(values.get("step")) is None:
                raise ValueError("no object with a step")
        except (ValueError, RecursionError) as error:
            raise RunError(f"line {count} of {path} is damaged ({error}): remove that line") from None
        yield values


def curve(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and a figure at each, NaN where a line has none; both empty if no line has one."""
    points = [
        (line["step"], number(line.get(name))) for line in lines if number(line.get("step")) is not None
    ]
    if all(value is None for _, value in points):
        return [], []
    steps, values = zip(*points, strict=True)
    return list(steps), [math.nan if value is None else value for value in values]


def gaps(values: Sequence[float | None]) -> list[float]:
    """Return figures for a drawing, NaN where there is none."""
    return [math.nan if value is None else value for value in values]


def reliability(run: RunData, kind: str) -> dict[str, Reliability]:
    """Return the reliability of confidences, "slot", or of their products, "prefix", by state of the head.

    States are "as trained", or "before" and "after" calibration.
    """
    if run.calibration is not None:
        report = run.calibration.report
        states = {"before": report.before, "after": report.after} if report else {}
    else:
        states = {"as trained": run.evaluation.confidence if run.evaluation else None}
    return {when: getattr(told, kind) for when, told in states.items() if told is not None}


def filled(told: Reliability) -> list[Bin]:
    """Return the bins that hold slots."""
    return [row for row in told.bins if row.count > 0 and None not in (row.predicted, row.actual)]


def thresholds(run: RunData) -> dict[str, list[ThresholdRow]]:
    """Return threshold sweeps by state of the confidence head, without rows in which nothing was verified."""
    if run.calibration is not None:
        sweeps = run.calibration.thresholds
        states = {"before": sweeps.before, "after": sweeps.after} if sweeps else {}
    else:
        states = {"as trained": run.evaluation.thresholds if run.evaluation else None}
    found = {when: [row for row in rows or () if row.acceptance is not None] for when, rows in states.items()}
    return {when: rows for when, rows in found.items() if rows}


_CACHE_KEYS = [
    "target",
    "sources",
    "layer_ids",
    "context_codec",
    "last_codec",
    "data_sha256",
    "target_weights",
    "samples",
    "bytes",
]
"""Facts that tell a cache from others; files that are older, or were made by training, lack some."""


def _measured_cache(run: RunData) -> dict[str, Any]:
    """Return the facts of the cache that the run was evaluated on; empty if it was not."""
    return vars(run.evaluation.cache) if run.evaluation and run.evaluation.cache else {}


def _trained_cache(run: RunData) -> dict[str, Any]:
    """Return what a run knows of the cache that it was trained on, under the names of `CacheFacts`."""
    features, data = dig(run.identity, "features") or {}, dig(run.identity, "data") or {}
    if not features:
        return {}
    target = dig(run.identity, "target") or {}
    facts = {"target": target.get("name"), "target_weights": target.get("weights"), **features}
    return {**facts, "sources": data.get("sources"), "data_sha256": data.get("sha256")}


def _known(facts: dict[str, Any]) -> dict[str, str]:
    """Return what tells a cache from others, as texts: a tuple in one place is a list in another."""
    return {key: json.dumps(facts[key]) for key in _CACHE_KEYS if facts.get(key) is not None}


def _agree(one: dict[str, str], other: dict[str, str]) -> bool:
    return all(other.get(key, value) == value for key, value in one.items())


def measured_elsewhere(run: RunData) -> bool:
    """Tell whether the run was evaluated on another cache than it was trained on."""
    measured = _known(_measured_cache(run))
    return bool(measured) and (run.imported or not _agree(measured, _known(_trained_cache(run))))


def cache_groups(runs: Sequence[RunData]) -> list[tuple[dict[str, Any], list[RunData]]]:
    """Return each cache once, with its runs: the one that a run was measured on, or else trained on.

    Those with most facts come first, so that caches with fewer are compared with them.
    """
    facts = {run.index: _measured_cache(run) or _trained_cache(run) for run in runs}
    found: list[tuple[dict[str, Any], list[RunData]]] = []
    for run in sorted(runs, key=lambda run: -len(_known(facts[run.index]))):
        own = facts[run.index]
        same = next((users for other, users in found if _agree(_known(own), _known(other))), None)
        if same is not None:
            same.append(run)
        elif _known(own):
            found.append((own, [run]))
    return [(own, sorted(users, key=lambda run: run.index)) for own, users in found]
