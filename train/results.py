"""Figures that lie beside a draft, in its checkpoint's folder, as JSON: they go when it goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import RunError

EVALUATION = "evaluation.json"
SPECULATION = "speculation.json"
CALIBRATION = "calibration.json"
_LIMIT = 16 * 2**20


def save_figures(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Put figures beside the draft that they are of. Raises OSError where that can't be written."""
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
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}): remove it, and measure again") from None


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
