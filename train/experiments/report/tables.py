"""The tables of the page: texts in rows, without columns that no run has figures for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.text import duration, size
from train.experiments.compare import parameter_count
from train.experiments.report.data import (
    RunData,
    cache_groups,
    dig,
    measured_elsewhere,
    number,
    reliability,
    temperatures_of,
)
from train.experiments.report.kinds import several_kinds
from train.experiments.report.plots import digits, listed
from train.runs.figures import Group, SpeculationRun

NONE = "\N{EN DASH}"
Column = tuple[str, Callable[[RunData], str]]


@dataclass(frozen=True)
class Table:
    """Columns of texts under a header."""

    title: str
    columns: list[str]
    """Their titles; the first is that of the rows' headers."""
    rows: list[tuple[str | RunData, list[str]]]
    """Each row's header, or the run that is its header, and its cells."""
    words: bool = False
    """Cells are words. Figures are aligned on the right."""
    heads: tuple[RunData, ...] = ()
    """Runs as titles of the last columns."""
    note: str = ""


def summary(runs: Sequence[RunData]) -> Table:
    """Make the table of main figures: how good each run is and what it took."""
    temperatures = temperatures_of(runs)
    temperatures = list(dict.fromkeys([*temperatures[:1], *temperatures[-1:]]))  # all have a table below
    kinds = several_kinds(runs)
    columns: list[Column] = [
        ("kind", lambda run: run.kind),
        ("K", lambda run: NONE if run.slots is None else str(run.slots)),
        ("step", _step),
        ("tau", lambda run: _tau(run)[0]),
        ("greedy tau", lambda run: digits(run.evaluation and run.evaluation.greedy_tau)),
        ("untrained tau", lambda run: digits(untrained_tau(run))),
        *(_decoding(kind) for kind in ("sampling", "greedy")),
        *(
            _live(key, title, t)
            for t in temperatures
            for key, title in (("tokens_per_round", "live tokens"), ("speedup", "speed-up"))
        ),
        ("parameters", lambda run: parameter_count(run.row["parameters"]) or NONE),
        ("tokens", lambda run: _digits(run.progress.get("tokens"), 0)),
        ("time", lambda run: _seconds(run.row["seconds"])),
        ("tokens/s", lambda run: _digits(run.row["tokens_per_s"], 0)),
    ]
    dropped = {"untrained tau", "tokens/s"} if kinds else {"kind", "tokens"}  # what is elsewhere on the page
    if not kinds and len({run.slots for run in runs}) == 1:
        dropped.add("K")
    columns = [column for column in columns if column[0] not in dropped]
    notes = []
    if any(_tau(run)[1] for run in runs):
        notes.append("* From training's own evaluation, which draws fewer anchors than dspark evaluate.")
    if any(decoded(run, kind) is not None for run in runs for kind in ("sampling", "greedy")):
        notes.append(
            "Decoding: tokens per round that decoding the held-out texts should yield. A round begins where "
            "the last one ended, so they are a bit fewer than tau, for which every position begins one."
        )
    return _by_run("Main figures", columns, runs, note=" ".join(notes))


def untrained_tau(run: RunData) -> float | None:
    """Return the tau of the same draft with random weights."""
    return run.evaluation.untrained.tau if run.evaluation and run.evaluation.untrained else None


def decoded(run: RunData, kind: Literal["sampling", "greedy"]) -> float | None:
    """Return the tokens per round that decoding the held-out texts is expected to yield."""
    decoding = run.evaluation.decoding if run.evaluation else None
    return None if decoding is None else getattr(decoding, kind).tokens_per_round


def _decoding(kind: Literal["sampling", "greedy"]) -> Column:
    return f"decoding, {kind}", lambda run: digits(decoded(run, kind))


def _tau(run: RunData) -> tuple[str, bool]:
    """Return held-out tau, and whether only training's own evaluation tells it."""
    if run.evaluation is not None:
        return digits(run.evaluation.tau), False
    during = number(run.row["best_tau"]) or number(run.row["tau"])
    return (NONE, False) if during is None else (f"{digits(during)}*", True)


def _live(key: str, title: str, temperature: float) -> Column:
    """Make a column of a live figure at one temperature."""

    def cell(run: RunData) -> str:
        return next((digits(getattr(row, key)) for row in run.live if row.temperature == temperature), NONE)

    kind = "greedy" if temperature == 0 else f"T = {temperature:g}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{title}, {kind}", cell


def live_rounds(runs: Sequence[RunData]) -> Table | None:
    """Make the table of live decoding: a row per run and temperature."""
    columns: list[tuple[str, Callable[[SpeculationRun], str]]] = [
        ("temperature", lambda row: f"{row.temperature:g}"),
        ("tokens per round", lambda row: digits(row.tokens_per_round)),
        ("held out", lambda row: digits(row.offline and row.offline.tokens_per_round)),
        ("verified per round", lambda row: digits(row.verified_per_round, 2)),
        ("ms per round, draft", lambda row: digits(row.draft_ms, 1)),
        ("verify", lambda row: digits(row.verify_ms, 1)),
        ("ms per token, plain", lambda row: digits(row.plain_ms, 1)),
        ("speculative", lambda row: digits(row.speculative_ms, 1)),
        ("speed-up", lambda row: digits(row.speedup, 2)),
        ("identical", lambda row: digits(row.identical, 0)),
    ]
    rows = [(run, [cell(row) for _, cell in columns]) for run in runs for row in run.live]
    if not rows:
        return None
    facts: dict[str, list[str]] = {}
    for run in runs:
        if run.live:
            told = run.speculation
            where = " ".join(filter(None, (told.target, told.device, told.dtype)))
            much = f"{told.prompts} prompts, at most {told.max_new_tokens} tokens each"
            facts.setdefault(f"{where}, {much}, threshold {told.threshold}", []).append(run.name)
    note = "".join(f"{', '.join(names)}: {fact}. " for fact, names in facts.items())
    note += "Identical: prompts whose greedy answer is the target's own, token by token."
    return Table("Live decoding", ["run", *(title for title, _ in columns)], rows, note=note)


def groups(
    runs: Sequence[RunData], key: Literal["by_source", "by_length", "by_context"], title: str
) -> Table | None:
    """Make the table of tau by what held-out samples have in common; of a run alone also their number."""
    found: dict[int, dict[str, Group]] = {
        run.index: (getattr(run.evaluation, key) if run.evaluation else None) or {} for run in runs
    }
    names = list(dict.fromkeys(name for run in runs for name in found[run.index]))
    if key != "by_source":
        names.sort(key=lambda name: int(name.partition("-")[0]) if name.partition("-")[0].isdecimal() else 0)
    if not names:
        return None
    heading = f"Held-out tau by {title}"
    if len(runs) > 1:
        told = tuple(run for run in runs if found[run.index])
        taus = {run.index: {name: row.tau for name, row in found[run.index].items()} for run in told}
        rows = [(name, [digits(taus[run.index].get(name)) for run in told]) for name in names]
        return Table(heading, [title], rows, heads=told)
    columns = [("samples", 0), ("blocks", 0), ("accept_rate", 3), ("tau", 3), ("greedy_tau", 3)]
    own = found[runs[0].index]
    rows = [(name, [digits(getattr(own[name], key), places) for key, places in columns]) for name in names]
    return Table(heading, [title, "samples", "blocks", "accepted", "tau", "greedy tau"], rows)


def confidence(runs: Sequence[RunData]) -> Table | None:
    """Make the table of how well each draft knows what will be accepted, before and after calibration."""
    rows: list[tuple[str | RunData, list[str]]] = []
    for run in runs:
        both = {kind: reliability(run, kind) for kind in ("prefix", "slot")}
        for when in both["prefix"] or both["slot"]:
            cells = [when]
            for kind in both:
                told = both[kind].get(when)
                cells += [digits(told and told.ece, 4), digits(told and told.auc)]
            fitted = run.calibration.temperatures if when == "after" else []
            rows.append((run, [*cells, listed(fitted, 2) or NONE]))
    if not rows:
        return None
    note = "Error: expected calibration error. AUC: how often an accepted token has the higher confidence."
    if any(cells[0] in ("before", "after") for _, cells in rows):
        note += " Before, after: of the half of the held-out samples that calibration was not fitted on."
    columns = ["run", "state", "error of products", "their AUC", "error of each", "its AUC", "temperatures"]
    if not any(cells[-1] != NONE for _, cells in rows):
        columns, rows = columns[:-1], [(run, cells[:-1]) for run, cells in rows]
    return Table("Confidence", columns, rows, note=note)


def costs(runs: Sequence[RunData]) -> Table:
    """Make the table of what training took, and on what."""
    columns: list[Column] = [
        ("time", lambda run: _seconds(run.row["seconds"])),
        ("tokens", lambda run: _digits(run.progress.get("tokens"), 0)),
        ("tokens/s", lambda run: _digits(run.row["tokens_per_s"], 0)),
        ("peak memory", lambda run: _size(max(_logged(run, "peak_memory_bytes"), default=None))),
        ("waited for data", lambda run: _mean_percent(_logged(run, "data_wait_percent"))),
        ("skipped steps", lambda run: _digits(run.progress.get("skipped_steps"), 0)),
        ("parameters", lambda run: _digits(run.row["parameters"], 0)),
        ("device", lambda run: _device(run)),
        ("precision", lambda run: str(dig(run.training, "machine", "precision") or NONE)),
    ]
    return _by_run("Time and memory", columns, runs)


def provenance(runs: Sequence[RunData]) -> Table:
    """Make the table of the files, code and machine that the figures are from."""
    columns: list[Column] = [
        ("checkpoint", lambda run: _whole(dig(run.training, "progress", "step"), "step {:,}")),
        ("written (UTC)", lambda run: run.written or NONE),
        ("dspark-pipeline", lambda run: str(dig(run.training, "version", "dspark-pipeline") or NONE)),
        ("commit", lambda run: str(dig(run.training, "version", "commit") or NONE)),
        ("torch", lambda run: str(dig(run.training, "version", "torch") or NONE)),
        ("target weights", lambda run: str(dig(run.identity, "target", "weights") or NONE)[:12]),
        ("data", lambda run: str(dig(run.identity, "data", "sha256") or NONE)[:12]),
    ]
    return _by_run("Provenance", columns, runs, words=True)


def differing(runs: Sequence[RunData]) -> Table | None:
    """Make the table of settings and facts of the cache that are not the same everywhere."""
    keys = [key for key in runs[0].row if "." in key]
    rows = [(key, [setting(run.row[key]) for run in runs]) for key in keys]
    return Table("Settings that differ", ["setting"], rows, words=True, heads=tuple(runs)) if rows else None


def settings(runs: Sequence[RunData]) -> list[Table]:
    """Make a table of settings for each table of the config; a dash where a kind of draft lacks one."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    names = dict.fromkeys(key.partition(".")[0] for key in keys)
    return [
        Table(
            name,
            ["setting"],
            [
                (key, [setting(run.settings[key], "none") if key in run.settings else NONE for run in runs])
                for key in keys
                if key.startswith(f"{name}.")
            ],
            words=True,
            heads=tuple(runs),
        )
        for name in names
    ]


def setting(value: Any, missing: str = NONE) -> str:
    """Write a setting as in a config; of a hash its beginning."""
    if isinstance(value, str):
        return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value
    return missing if value is None else json.dumps(value, ensure_ascii=False)


def caches(runs: Sequence[RunData]) -> list[list[Table]]:
    """Make the tables of each cache: what it holds and takes on disk, and how true it is."""
    tables = []
    found = cache_groups(runs)
    for facts, users in found:
        context, last = (facts.get(f"{part}_codec") or NONE for part in ("context", "last"))
        rows: list[tuple[str | RunData, list[str]]] = [
            ("target", [str(facts.get("target") or NONE)]),
            ("sources", [", ".join(facts.get("sources") or ()) or NONE]),
            ("layers", [", ".join(map(str, facts.get("layer_ids") or ())) or NONE]),
            (
                "codecs",
                [f"{context} context features, {'no' if last == 'none' else last} last hidden states"],
            ),
            ("data", [str(facts.get("data_sha256") or NONE)[:12]]),
            ("samples", [digits(facts.get("samples"), 0)]),
            ("tokens", [digits(facts.get("tokens"), 0)]),
            ("on disk", [_size(facts.get("bytes"))]),
            ("bytes per token", [digits(facts.get("bytes_per_token"), 0)]),
        ]
        rows = [(header, cells) for header, cells in rows if cells != [NONE]]
        title = _cache_title(users, alone=len(found) == 1)
        fidelity = _fidelity(facts.get("fidelity") or {})
        tables.append([Table(title, ["", ""], rows, words=True), *filter(None, [fidelity])])
    return tables


def _cache_title(users: Sequence[RunData], *, alone: bool) -> str:
    """Say whose cache it is, and whether they were only measured on it."""
    names = ", ".join(run.name for run in users)
    elsewhere = [run.name for run in users if measured_elsewhere(run)]
    if len(elsewhere) == len(users):
        return f"Cache that {names} {'were' if len(users) > 1 else 'was'} measured on"
    title = "Cache" if alone else f"Cache of {names}"
    return f"{title} (only measured on: {', '.join(elsewhere)})" if elsewhere else title


def _fidelity(values: dict[str, float]) -> Table | None:
    """Make the table of how far decoded features are from the target's own."""
    found: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        match = re.fullmatch(r"(.+)_(mean|p99|max|rows)", key)
        name, column = (match[1], match[2]) if match else (key, "max")
        text = f"{value:,.0f}" if column == "rows" else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"
        found.setdefault(name, {})[column] = text
    columns = {"mean": "mean", "p99": "99th percentile", "max": "largest", "rows": "rows"}
    columns = {key: title for key, title in columns.items() if any(key in row for row in found.values())}
    ordered = sorted(
        found, key=lambda name: [int(p) if p.isdecimal() else 0 for p in re.split(r"(\d+)", name)]
    )
    ordered.sort(key=lambda name: (name.startswith("proof"), not name.startswith("relative_error.context")))
    rows = [(_fidelity_name(name), [found[name].get(key, NONE) for key in columns]) for name in ordered]
    note = "Relative errors of decoded features; total variation of the teacher's next-token distribution."
    return (
        Table("What encoding cost in fidelity", ["of", *columns.values()], rows, note=note) if rows else None
    )


def _fidelity_name(name: str) -> str:
    words = re.sub(r"^relative_error\.context\.", "relative error, layer ", name)
    words = words.replace("relative_error.", "relative error, ").replace("proof.", "proof at capture: ")
    return words.replace("teacher_tv", "teacher's total variation").replace("_", " ")


def _by_run(title: str, columns: Sequence[Column], runs: Sequence[RunData], **more: Any) -> Table:
    """Make a table of a row per run, without columns that say nothing of any."""
    cells = [(title, [cell(run) for run in runs]) for title, cell in columns]
    cells = [(title, column) for title, column in cells if any(text != NONE for text in column)]
    rows: list[tuple[str | RunData, list[str]]] = [
        (run, [column[i] for _, column in cells]) for i, run in enumerate(runs)
    ]
    return Table(title, ["run", *(title for title, _ in cells)], rows, **more)


def _logged(run: RunData, name: str) -> list[float]:
    return [value for line in run.log if (value := number(line.get(name))) is not None]


def _step(run: RunData) -> str:
    step, best = run.row["step"], run.measured_step
    if step is None:
        return "not begun" if not run.log else "no checkpoint"
    far = f"{step:,}" if run.row["complete"] else f"{step:,} of {run.row['total_steps']:,}"
    if best is None or best == step:
        return far
    return f"best at {best:,} of {far}" if run.row["complete"] else f"best at {best:,}, now {far}"


def _digits(value: Any, places: int = 3) -> str:
    return digits(number(value), places)


def _whole(value: Any, form: str) -> str:
    return NONE if number(value) is None else form.format(value)


def _seconds(value: Any) -> str:
    return NONE if number(value) is None else duration(value)


def _size(value: Any) -> str:
    return NONE if number(value) is None else size(value)


def _mean_percent(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}%" if values else NONE


def _device(run: RunData) -> str:
    machine = dig(run.training, "machine") or {}
    ranks = machine.get("ranks") or 1
    return f"{ranks} x {machine.get('device')}" if ranks != 1 else str(machine.get("device") or NONE)
