"""Summary of tokenised data, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from capture.console import bold
from capture.data.tokens import TokenizedData

BAR_WIDTH = 40


def data_lines(data: TokenizedData) -> Iterator[str]:
    """Yield samples, tokens, labels, lengths with a histogram, and the counts of rows."""
    lengths = data.facts.lengths
    tokens, labels = int(lengths.sum(dtype=np.int64)), int(data.facts.last_rows.sum(dtype=np.int64))
    yield bold(
        f"{len(data):,} samples, {tokens:,} tokens, {labels:,} of them supervised ({labels / tokens:.0%})"
    )
    middle, late = np.percentile(lengths, [50, 95])
    yield (
        f"length: shortest {lengths.min():,}, median {middle:,.0f}, mean {lengths.mean():,.0f}, "
        f"95th percentile {late:,.0f}, longest {lengths.max():,}"
    )
    yield from histogram(lengths)
    yield f"rows: {accounts(data.rows)}"


def accounts(rows: Mapping[str, int]) -> str:
    """Return the counts of rows read, captured and dropped, in one line."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(rows.items()))


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield one line per bin of lengths; each bin is twice as wide as the one before."""
    low = 2 ** int(np.log2(lengths.min()))
    while low <= lengths.max():
        inside = int(((lengths >= low) & (lengths < 2 * low)).sum())
        bar = "#" * round(BAR_WIDTH * inside / len(lengths))
        yield f"{low:>7,} to {2 * low - 1:>7,}  {inside:>9,}  {bar}"
        low *= 2
