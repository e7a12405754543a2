"""What a page about runs is made from: the files that training and measuring left, read once.

Figures that nobody made, or that are no finite numbers, are None from here on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import RunError
from train.experiments.compare import compare, run_folders
from train.runs.checkpoint import checkpoints
from train.runs.directory import flat_settings, load_run_cache, load_run_config, read_progress
from train.runs.names import CALIBRATION, EVALUATION, METRICS, RUN, SPECULATION, TRAINING
from train.runs.open import find_checkpoint
from train.runs.page import read_training
from train.runs.results import read_figures

_METRICS_LIMIT = 2**30
_LARGEST = 1e100
"""Of figures; what is beyond can't be drawn."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything that is known of a run."""

    index: int
    """Which of the page's runs: decides its colour."""
    path: Path
    row: dict[str, Any]
    """Of `compare`: name, settings that differ, how far the newest checkpoint is."""
    settings: dict[str, Any]
    """By dotted name."""
    identity: dict[str, Any]
    """Of the cache it was trained on; empty where the run does not say."""
    training: dict[str, Any]
    """training.json of the best checkpoint; empty without any."""
    progress: dict[str, Any]
    """Of the newest checkpoint: what training took so far."""
    written: str | None
    """The day of the best checkpoint, in UTC."""
    log: list[dict[str, Any]]
    """Lines of metrics.jsonl about optimiser steps."""
    held_out: list[dict[str, Any]]
    """And about evaluations during training."""
    evaluation: dict[str, Any] | None
    calibration: dict[str, Any] | None
    speculation: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The end of its path, as long as it takes to tell it from the others."""
        return self.row["run"]

    @property
    def measured_step(self) -> int | None:
        """The optimiser step of the checkpoint that was measured: the best, which may not be the newest."""
        return dig(self.training, "progress", "step")

    @property
    def imported(self) -> bool:
        """Whether it was trained elsewhere, nobody knows on what."""
        return dig(self.training, "imported") is not None

    @property
    def has_confidence(self) -> bool:
        """Whether the draft has a confidence head."""
        return bool(self.settings["draft.confidence_head"])

    @property
    def live(self) -> list[dict[str, Any]]:
        """What live decoding gave, a row a temperature."""
        rows = dig(self.speculation, "runs")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def last_live(self) -> dict[str, Any]:
        """The row that is closest to how held-out figures are taken: sampling, where it was tried."""
        return max(self.live, key=lambda row: number(row.get("temperature")) or 0, default={})


def dig(values: Any, *keys: str) -> Any:
    """What lies in nested objects under these keys; None where something is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def number(value: Any) -> float | None:
    """A finite number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_LARGEST < value < _LARGEST else None


def numbers(values: Any) -> list[float | None]:
    """A list of figures; empty for anything else."""
    return [number(value) for value in values] if isinstance(values, list) else []


def gather(runs: Sequence[Path]) -> list[RunData]:
    """Read runs, in the order given.

    Args:
        runs: directories of runs, or folders of such, which stand for these sorted by name.

    Raises:
        RunError: a directory that is neither, or a file of one that is damaged.
    """
    folders = run_folders(runs)
    try:
        rows = compare(folders)
        return [_run(index, *pair) for index, pair in enumerate(zip(folders, rows, strict=True))]
    except RecursionError:
        names = ", ".join(map(str, folders))
        raise RunError(f"a JSON file in {names} can't be read: it is nested too deeply") from None


def _run(index: int, path: Path, row: dict[str, Any]) -> RunData:
    folder = find_checkpoint(path) if checkpoints(path) else None
    lines = list(_lines(path / METRICS))
    names = {"evaluation": EVALUATION, "calibration": CALIBRATION, "speculation": SPECULATION}
    return RunData(
        index=index,
        path=path,
        row=row,
        settings=flat_settings(load_run_config(path)),
        identity=dataclasses.asdict(load_run_cache(path)) if (path / RUN).exists() else {},
        training={} if folder is None else read_training(folder).values(),
        progress={} if folder is None else dataclasses.asdict(read_progress(path)),
        written=None if folder is None else _day(folder / TRAINING),
        log=[line for line in lines if "held_out" not in line],
        held_out=[line["held_out"] for line in lines if isinstance(line.get("held_out"), dict)],
        **{key: None if folder is None else _figures(folder, name) for key, name in names.items()},
    )


def _figures(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        return read_figures(folder, name)
    except RecursionError:
        problem = "can't be read (nested too deeply): remove it, and measure again"
        raise RunError(f"{folder / name} {problem}") from None


def _day(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; one at the end that is still being written does not count."""
    if not path.is_file():
        return
    try:
        text = files.read_small(path, _METRICS_LIMIT).decode()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}): mend that, or remove it") from None
    for count, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or number(values.get("step")) is None:
                raise ValueError("no object with a step")
        except (ValueError, RecursionError) as error:
            raise RunError(f"line {count} of {path} is damaged ({error}): remove that line") from None
        yield values


def curve(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps, and a figure at each; NaN where it is none. Lines that have it nowhere give no curve."""
    points = [
        (line["step"], number(line.get(name))) for line in lines if number(line.get("step")) is not None
    ]
    if all(value is None for _, value in points):
        return [], []
    steps, values = zip(*points, strict=True)
    return list(steps), [math.nan if value is None else value for value in values]


def reliability(run: RunData, kind: str) -> dict[str, dict[str, Any]]:
    """Calibration of confidences, "slot", or of their products, "prefix": as trained, or before and after."""
    if run.calibration is not None:
        states = {when: dig(run.calibration, "report", when, kind) for when in ("before", "after")}
    else:
        states = {"as trained": dig(run.evaluation, "confidence", kind)}
    keys = ("low", "high", "count", "predicted", "actual")
    return {
        when: {
            "ece": number(value.get("ece")),
            "auc": number(value.get("auc")),
            "bins": [row for row in _whole_rows(value.get("bins"), keys) if row["count"] > 0],
        }
        for when, value in states.items()
        if isinstance(value, dict)
    }


def thresholds(run: RunData) -> dict[str, list[dict[str, float]]]:
    """Threshold sweeps by when, the rows in which anything was verified."""
    if run.calibration is not None:
        states = {when: dig(run.calibration, "thresholds", when) for when in ("before", "after")}
    else:
        states = {"as trained": dig(run.evaluation, "thresholds")}
    keys = ("threshold", "verified", "tokens", "acceptance")
    found = {when: _whole_rows(rows, keys) for when, rows in states.items()}
    return {when: rows for when, rows in found.items() if rows}


def _whole_rows(rows: Any, keys: Sequence[str]) -> list[dict[str, float]]:
    """The rows of a table that have every figure: empty bins, say, have no mean."""
    found = [{key: number(dig(row, key)) for key in keys} for row in rows] if isinstance(rows, list) else []
    return [row for row in found if None not in row.values()]


_CACHE_KEYS = (
    *("target", "sources", "layer_ids", "context_codec", "last_codec"),
    *("data_sha256", "target_weights", "samples", "bytes"),
)
"""What tells a cache from others; files that are older, or were made by training, lack some."""


def _measured_cache(run: RunData) -> dict[str, Any]:
    """Facts of the cache that the run was evaluated on."""
    facts = dig(run.evaluation, "cache")
    return facts if isinstance(facts, dict) and _known(facts) else {}


def _trained_cache(run: RunData) -> dict[str, Any]:
    """What a run knows of the cache that it was trained on, under the names of an evaluation."""
    features, data = dig(run.identity, "features") or {}, dig(run.identity, "data") or {}
    if not features:
        return {}
    target = dig(run.identity, "target") or {}
    facts = {"target": target.get("name"), "target_weights": target.get("weights"), **features}
    return {**facts, "sources": data.get("sources"), "data_sha256": data.get("sha256")}


def _known(facts: dict[str, Any]) -> dict[str, str]:
    """What tells a cache from others, as texts: in one place a tuple is a list in another."""
    return {key: json.dumps(facts[key]) for key in _CACHE_KEYS if facts.get(key) is not None}


def _agree(one: dict[str, str], other: dict[str, str]) -> bool:
    return all(other.get(key, value) == value for key, value in one.items())


def measured_elsewhere(run: RunData) -> bool:
    """Whether the cache of the evaluation is another than the one the draft was trained on."""
    measured = _known(_measured_cache(run))
    return bool(measured) and (run.imported or not _agree(measured, _known(_trained_cache(run))))


def cache_groups(runs: Sequence[RunData]) -> list[tuple[dict[str, Any], list[RunData]]]:
    """Each cache once, with its runs: the one that a run was measured on, or else trained on.

    Those that say most come first: with them one compares what others leave open.
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
