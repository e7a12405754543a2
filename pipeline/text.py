"""Text for people: sizes, spans of time, tables, samples with what the loss covers marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import numpy as np


def size(count: float) -> str:
    """Bytes for people, in decimal units as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("B", "kB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def duration(seconds: float) -> str:
    """A span of time for people."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(minutes)} min {int(seconds) % 60:02d} s" if minutes >= 1 else f"{seconds:.0f} s"


def table(rows: Sequence[tuple[str, Sequence[Any]]], digits: int = 3) -> Iterator[str]:
    """Lay out rows of titles and figures in columns, a line per row; None is a dash."""

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


def marked_text(input_ids: np.ndarray, loss_mask: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """Text of `input_ids` `[S]`, supervised tokens (`loss_mask` `[S]`) in green.

    Runs of one kind are decoded together: a character may be several tokens.
    """
    pieces = []
    for run in np.split(np.arange(len(input_ids)), np.flatnonzero(np.diff(loss_mask)) + 1):
        text = decode(input_ids[run].tolist())
        pieces.append(click.style(text, fg="green") if loss_mask[run[0]] else text)
    return "".join(pieces)
