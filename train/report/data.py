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
from train.checkpoint import checkpoints, find_checkpoint
from train.compare import compare, run_folders
from train.progress import TRAINING, read_training
from train.results import CALIBRATION, EVALUATION, SPECULATION, read_figures
from train.run import METRICS, RUN, flat_settings, load_run_cache, load_run_config

_METRICS_LIMIT = 2**30


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything that is known of a run."""

    index: int
    """Which of the page's runs: decides its colour."""
    path: Path
    row: dict[str, Any]
    """Of `train.compare.compare`: name, settings that differ, how far the newest checkpoint is."""
    settings: dict[str, Any]
    """By dotted name."""
    identity: dict[str, Any]
    """Of the cache it was trained on; empty where the run does not say."""
    training: dict[str, Any]
    """training.json of the best checkpoint; empty without any."""
    written: str | None
    """The day of that checkpoint, in UTC."""
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
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


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
    rows = compare(folders)
    return [_run(index, *pair) for index, pair in enumerate(zip(folders, rows, strict=True))]


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
        training={} if folder is None else read_training(folder)[1],
        written=None if folder is None else _day(folder / TRAINING),
        log=[line for line in lines if "held_out" not in line],
        held_out=[line["held_out"] for line in lines if isinstance(line.get("held_out"), dict)],
        **{key: None if folder is None else read_figures(folder, name) for key, name in names.items()},
    )


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
        except ValueError as error:
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
            "bins": _whole_rows(value.get("bins"), keys),
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


def cache_key(run: RunData) -> tuple[str, ...] | None:
    """What tells a run's cache from others: of the one it was measured on, or else trained on."""
    facts = dig(run.evaluation, "cache")
    if not isinstance(facts, dict):
        features, data = dig(run.identity, "features") or {}, dig(run.identity, "data") or {}
        if not features:
            return None
        facts = {"target": dig(run.identity, "target", "name"), "sources": data.get("sources"), **features}
    keys = ("target", "sources", "layer_ids", "context_codec", "last_codec")
    return tuple(json.dumps(facts.get(key)) for key in keys)
