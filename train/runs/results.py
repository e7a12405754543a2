"""Figures that lie beside a draft, in its checkpoint's folder, as JSON: they go when it goes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import RunError
from train.runs.names import CALIBRATION

_LIMIT = 16 * 2**20


def save_figures(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Put figures beside the draft that they are of. Raises WriteError where that can't be written."""
    files.publish_bytes(folder / name, (json.dumps(result, indent=1) + "\n").encode())


def read_figures(folder: Path, name: str) -> dict[str, Any] | None:
    """What `save_figures` wrote, or None where nothing was. Raises RunError when it can't be read."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        result = json.loads(files.read_small(path, _LIMIT))
        if not isinstance(result, dict):
            raise ValueError("no object")
        return result
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} can't be read ({error}): remove it, and measure again") from None


def read_temperatures(folder: Path, slots: int) -> list[float] | None:
    """The confidence head's temperatures beside a draft, or None where none were fitted.

    Args:
        folder: of its checkpoint.
        slots: K, one temperature each.

    Raises:
        RunError: what is there is not K positive numbers.
    """
    found = read_figures(folder, CALIBRATION)
    if found is None:
        return None
    temperatures = found.get("temperatures")
    if not (all_numbers(temperatures) and len(temperatures) == slots and min(temperatures) > 1e-6):
        raise RunError(
            f"{folder / CALIBRATION} has not {slots} positive temperatures: run `dspark calibrate` again"
        )
    return temperatures


def all_numbers(values: object) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def table(rows: list[tuple[str, list[Any]]], digits: int = 3) -> Iterator[str]:
    """Rows of figures in columns; None is a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"

    cells = [(title, [v if isinstance(v, str) else cell(v) for v in values]) for title, values in rows]
    first = max(len(title) for title, _ in cells)
    widths = [max(map(len, column)) for column in zip(*(values for _, values in cells), strict=True)]
    for title, values in cells:
        columns = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        yield f"  {title:<{first}}  " + "  ".join(columns)
