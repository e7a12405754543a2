"""Text for people: sizes, durations, errors in one line, tables, samples with marked supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def size(count: float) -> str:
    """Format a number of bytes, in decimal units as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("B", "kB") else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def duration(seconds: float) -> str:
    """Format a duration."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(minutes)} min {int(seconds) % 60:02d} s" if minutes >= 1 else f"{seconds:.0f} s"


def one_line(error: Any, limit: int | None = 200) -> str:
    """Return an exception's text (or any other value's) in one line; without text, its type's name.

    Args:
        limit: the most characters; None for all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def reason(error: BaseException) -> str:
    """Return why something failed: the system's own words for an OSError, else the error in one line."""
    return getattr(error, "strerror", None) or one_line(error)


def table(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> Iterator[str]:
    """Yield rows of equal length as lines with aligned columns, two spaces apart.

    Args:
        left: numbers of the columns that are aligned to the left; the others are to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def figure_table(rows: Sequence[tuple[str, Sequence[Any]]], digits: int = 3) -> Iterator[str]:
    """Yield rows of a title and figures as indented lines; None is a dash.

    Args:
        digits: after the point of a float.
    """

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}"

    for line in table([[title, *map(cell, values)] for title, values in rows]):
        yield f"  {line}"


def marked_text(input_ids: np.ndarray, loss_mask: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """Return the text of `input_ids` `[S]` with supervised tokens (`loss_mask` `[S]` is 1) in green.

    Neighbours of one kind are decoded together, because a character may take several tokens.
    """
    import click
    import numpy as np

    pieces = []
    for run in np.split(np.arange(len(input_ids)), np.flatnonzero(np.diff(loss_mask)) + 1):
        text = decode(input_ids[run].tolist())
        pieces.append(click.style(text, fg="green") if loss_mask[run[0]] else text)
    return "".join(pieces)
