"""Compare runs: the settings that differ, and the figures of each run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.text import duration, table
from train.runs.changes import flat_settings
from train.runs.checkpoint import checkpoints
from train.runs.directory import load_run_cache, load_run_config, read_progress
from train.runs.find import NamedRun, find_run
from train.runs.names import CONFIG, RUN
from train.runs.open import find_checkpoint
from train.runs.page import read_training
from train.runs.state import Progress

_LOSSES = ("ce_loss", "l1_loss", "confidence_loss")
"""Loss terms that every row has; those of other kinds of draft follow where a run has them."""
_NONE = "-"
"""Stands for a setting or a loss term that a run's kind of draft lacks."""


def compare(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one row per run, in the order given, all with the same keys and raw numbers.

    After `run` come the settings that differ between runs, as in config.toml, and the fields of the cache's
    identity that differ, such as `cache.features.context_codec`. A setting that a run's kind of draft lacks
    is None, and so is a figure that a run does not have yet, or whose kind has none. `slots` is K, the tokens
    drafted in a round. `best_tau` and `best_step` are None if the best evaluation is the last one.

    Args:
        runs: directories of runs, paths of their checkpoints, or folders of runs, which stand for their
            runs sorted by name.

    Raises:
        RunError: a directory is neither, or a run can't be read.
    """
    found = named_runs(runs)
    facts = [{**_settings(run.path), **_cache(run.path)} for run in found]
    keys = [key for key in dict.fromkeys(key for row in facts for key in row) if _differs(key, facts)]
    progress = [_progress(run) for run in found]
    losses = dict.fromkeys(_LOSSES) | {
        key: None for own in progress for key in _evaluation(own) if _is_term(key)
    }
    return [
        {"run": name, **{key: row.get(key) for key in keys}, **_figures(own, list(losses))}
        for name, row, own in zip(_names(found), facts, progress, strict=True)
    ]


def named_runs(runs: Sequence[Path]) -> list[NamedRun]:
    """List the runs that paths name, each once; a folder of runs stands for all of them."""
    found: dict[tuple[Path, str | None], NamedRun] = {}
    for path in runs:
        inside = [find_run(path)]
        if not (inside[0].path / CONFIG).is_file():
            inside = [NamedRun(config.parent) for config in sorted(path.glob(f"*/{CONFIG}"))]
        if not inside:
            raise RunError(
                f"no run at {path} or in its folders: expected {path / CONFIG}; "
                f"run `dspark train --run {path}` first"
            )
        for run in inside:
            found.setdefault((run.path.resolve(), run.checkpoint), run)
    return list(found.values())


def _names(runs: Sequence[NamedRun]) -> list[str]:
    """Return the end of each run's path, as long as it takes to tell it from the others."""

    def parts_of(run: NamedRun) -> tuple[str, ...]:
        path = run.path.absolute() if run.path.name != ".." else run.path.resolve()
        return (path / run.checkpoint if run.checkpoint else path).parts

    every = [parts_of(run) for run in runs]

    def shortest(own: tuple[str, ...], least: int) -> str:
        for length in range(least, len(own)):
            if sum(other[-length:] == own[-length:] for other in every) == 1:
                return "/".join(own[-length:])
        return str(Path(*own))

    return [shortest(own, 2 if run.checkpoint else 1) for own, run in zip(every, runs, strict=True)]


def _settings(run: Path) -> dict[str, Any]:
    """Return every setting by its dotted name, as a config has it: "none" where it is not set."""
    settings = flat_settings(load_run_config(run)).items()
    return {key: "none" if value is None else _listed(value) for key, value in settings}


def _cache(run: Path) -> dict[str, Any]:
    """Return every field of the identity of the run's cache; empty where the run does not say."""
    return flat_values("cache", dataclasses.asdict(load_run_cache(run))) if (run / RUN).exists() else {}


def flat_values(name: str, value: Any) -> dict[str, Any]:
    """Flatten tables of any depth into one with dotted names."""
    if not isinstance(value, dict):
        return {name: _listed(value)}
    parts = [flat_values(f"{name}.{key}", value[key]) for key in value]
    return {dotted: item for part in parts for dotted, item in part.items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differs(key: str, facts: Sequence[dict[str, Any]]) -> bool:
    """Tell whether runs disagree about a field; those without its table do not count."""
    table = key.partition(".")[0]
    told = [row for row in facts if any(name.partition(".")[0] == table for name in row)]
    return any(row.get(key) != told[0].get(key) for row in told)


def _progress(run: NamedRun) -> Progress | None:
    """Return a run's progress, as of the checkpoint named if any; None without a checkpoint."""
    if run.checkpoint:
        return read_training(find_checkpoint(run.path, run.checkpoint)).progress
    return read_progress(run.path) if checkpoints(run.path) else None


def _evaluation(progress: Progress | None) -> dict[str, Any]:
    return (progress and progress.evaluation) or {}


def _is_term(key: str) -> bool:
    return key.endswith("_loss")


def _figures(progress: Progress | None, losses: Sequence[str]) -> dict[str, Any]:
    """Return a run's progress and the figures of its last evaluation.

    Args:
        losses: names of the loss terms.
    """
    evaluation = _evaluation(progress)
    accepted = evaluation.get("accept_by_position")
    best = progress and progress.best
    if best and best.step == evaluation.get("step"):
        best = None
    return {
        "step": progress and progress.step,
        "total_steps": progress and progress.total_steps,
        "complete": progress is not None and progress.complete,
        "slots": accepted and len(accepted),
        **{key: evaluation.get(key) for key in ("tau", "accept_by_position", "loss", *losses)},
        "best_tau": best and best.tau,
        "best_step": best and best.step,
        "parameters": progress and progress.parameters,
        "seconds": progress and progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds if progress and progress.seconds else None,
    }


def format_json(rows: Sequence[dict[str, Any]]) -> str:
    """Write a list of objects. A figure that is not finite, as the loss of a run that diverged, is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    clean = [{key: plain(value) for key, value in row.items()} for row in rows]
    return json.dumps(clean, indent=1, ensure_ascii=False) + "\n"


def format_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Write a header and a line per run; `accept_1`, `accept_2`, ... are the acceptance by position."""
    positions = max((len(row["accept_by_position"] or ()) for row in rows), default=0)
    table = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in row.items():
            if key == "accept_by_position":
                rates = [*(value or ()), *[None] * positions][:positions]
                line |= {f"accept_{k + 1}": rate for k, rate in enumerate(rates)}
            else:
                line[key] = json.dumps(value) if isinstance(value, list | bool) else value
        table.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def format_text(rows: Sequence[dict[str, Any]]) -> str:
    """Write aligned columns for people; the best held-out tau of several is marked with a star.

    K is a column where runs differ in it, and a loss term where a run has it.
    """
    settings = [key for key in rows[0] if "." in key]
    losses = [key for key in rows[0] if _is_term(key) and any(row[key] is not None for row in rows)]
    taus = [row["tau"] for row in rows if row["tau"] is not None and math.isfinite(row["tau"])]
    top = max(taus) if len(taus) > 1 else None

    def tau(row: dict[str, Any]) -> str:
        star = "" if top is None else "*" if row["tau"] == top else " "
        return _digits(row["tau"], 3) + star

    def best(row: dict[str, Any]) -> str:
        return "" if row["best_tau"] is None else f"{row['best_tau']:.3f} at {row['best_step']}"

    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("run", lambda row: row["run"]),
        *((key, lambda row, key=key: _setting(row[key])) for key in settings),
        ("K", lambda row: "" if row["slots"] is None else str(row["slots"])),
        ("step", _step),
        ("tau" if top is None else "tau ", tau),
        ("best tau", best),
        ("acceptance by position", lambda row: " ".join(f"{a:.2f}" for a in row["accept_by_position"] or ())),
        ("loss", lambda row: _digits(row["loss"], 4)),
        *((key.removesuffix("_loss"), lambda row, key=key: _term(row, key)) for key in losses),
        ("parameters", lambda row: parameter_count(row["parameters"])),
        ("time", lambda row: "" if row["seconds"] is None else duration(row["seconds"])),
        ("tokens/s", lambda row: "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}"),
    ]
    dropped = {"best tau"} if all(row["best_tau"] is None for row in rows) else set()
    if len({row["slots"] for row in rows} - {None}) < 2:
        dropped.add("K")
    columns = [column for column in columns if column[0] not in dropped]
    left = {"run", "acceptance by position"}  # and settings that are text
    left |= {key for key in settings if any(isinstance(row[key], str | list) for row in rows)}
    texts = [[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in rows)]
    lines = table(texts, left={number for number, (title, _) in enumerate(columns) if title in left})
    return "\n".join(lines) + "\n" + ("* the best held-out tau\n" if top is not None else "")


FORMATS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "text": format_text,
    "csv": format_csv,
    "json": format_json,
}


def _step(row: dict[str, Any]) -> str:
    if row["step"] is None:
        return ""
    return str(row["step"]) if row["complete"] else f"{row['step']}/{row['total_steps']}"


def _setting(value: Any) -> str:
    """Write a setting as in a config, without quotes; of a hash its beginning, of none a dash."""
    if isinstance(value, str):
        return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value
    return _NONE if value is None else json.dumps(value)


def _term(row: dict[str, Any], key: str) -> str:
    """Write a loss term: a dash where the run was evaluated without it."""
    return _NONE if row[key] is None and row["loss"] is not None else _digits(row[key], 4)


def _digits(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def parameter_count(count: int | None) -> str:
    """Write a number of parameters for people."""
    if count is None:
        return ""
    for unit, one in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * one:  # rounds to 1 with three digits
            return f"{count / one:.3g}{unit}"
    return str(count)
