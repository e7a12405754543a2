"""How well a cache reproduces its target: what was measured row by row, and the figures in the manifest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# What one shard's check measured: a value a checked row, by what was measured.
Measured = dict[str, tuple[float, ...]]

TEACHER_TV = "teacher_tv"


def relative_error(state: str) -> str:
    """The name of a state's relative error, `|decoded - own| / |own|` of a row."""
    return f"relative_error.{state}"


def summarise(shards: Iterable[Measured]) -> dict[str, float]:
    """The manifest's figures: mean and 99th percentile of everything measured, and the number of rows."""
    values: dict[str, list[float]] = {}
    for measured in shards:
        for name, rows in measured.items():
            values.setdefault(name, []).extend(rows)
    figures = {}
    for name, rows in sorted(values.items()):
        if rows:
            with np.errstate(all="ignore"):  # infinity in, infinity or NaN out
                figures[f"{name}_mean"] = float(np.mean(rows))
                figures[f"{name}_p99"] = float(np.percentile(rows, 99))
    if values.get(TEACHER_TV):
        figures[f"{TEACHER_TV}_rows"] = float(len(values[TEACHER_TV]))
    return figures
