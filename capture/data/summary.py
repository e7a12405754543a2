"""Summary of tokenised data, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from capture.console import bold
from capture.data.tokens import TokenizedData
from pipeline.rope import trained_positions

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


def position_lines(config: Any, lengths: np.ndarray) -> Iterator[str]:
    """Yield a warning if samples are longer than the positions that the target was made for."""
    limit = trained_positions(config)
    if limit and lengths.max() > limit:
        yield (
            f"warning: {int((lengths > limit).sum()):,} of {len(lengths):,} samples are longer than the "
            f"target's {limit:,} positions (the longest has {lengths.max():,} tokens), and its states beyond "
            f"may be of no use: give --max-length {limit}, or extend the target's RoPE in its config"
        )


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
