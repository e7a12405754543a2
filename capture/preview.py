"""Look at the data as the target will see it, before anything is captured."""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np

from capture.conversations import TokenizedSample
from capture.load import open_target, tokenizer_identity
from capture.options import DataOptions, TargetOptions
from capture.preparation import open_data, prepare_data, row_tokenizer
from capture.tokens import TokenizedData
from pipeline.errors import UsageError

BAR_WIDTH = 40


def preview(target: TargetOptions, options: DataOptions, *, row: int | None, count: int) -> Iterator[str]:
    """Lines for the terminal: some samples, then the length histogram and where every row went.

    Args:
        row: show the sample of that row of the first source, counted from 1, instead of the first ones.
        count: how many samples to show.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    found = open_target(target)
    tokenizer = found.tokenizer()
    sources = open_data(options)
    tokenize = row_tokenizer(options, tokenizer, found.shell.get_input_embeddings().weight.shape[0])
    data = prepare_data(options, tokenize, tokenizer_identity(tokenizer).sha256, sources)
    chosen = range(min(count, len(data)))
    if row is not None:
        chosen = [i for i, f in enumerate(data.facts) if (f.source, f.source_row) == (0, row - 1)]
        if not chosen:
            raise UsageError(
                f"{sources[0].at(row - 1)} gave no sample: it is no row, an empty line, or was left out "
                f"({_accounts(data)})"
            )
    for i in chosen:
        place = sources[data.facts[i].source].at(data.facts[i].source_row)
        yield from _sample(place, data[i], tokenizer)
    yield from _summary(data)


def _sample(place: str, sample: TokenizedSample, tokenizer) -> Iterator[str]:
    supervised = int(sample.loss_mask.sum())
    share = supervised / len(sample.input_ids)
    yield click.style(
        f"== {place}: {len(sample.input_ids):,} tokens, {supervised:,} supervised ({share:.0%})", bold=True
    )
    # Runs of one kind are decoded together: a character may be several tokens.
    edges = np.flatnonzero(np.diff(sample.loss_mask)) + 1
    pieces = []
    for run in np.split(np.arange(len(sample.input_ids)), edges):
        text = tokenizer.decode(sample.input_ids[run].tolist(), skip_special_tokens=False)
        if sample.loss_mask[run[0]]:
            pieces.append(click.style(text, fg="green"))
        else:
            pieces.append(text)
    yield "".join(pieces)
    yield ""


def _accounts(data: TokenizedData) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(data.rows.items()))


def _summary(data: TokenizedData) -> Iterator[str]:
    lengths = np.array([fact.length for fact in data.facts])
    labels = sum(fact.last_rows for fact in data.facts)
    yield click.style(
        f"== {len(data):,} samples, {lengths.sum():,} tokens, "
        f"{labels:,} labels ({labels / lengths.sum():.0%})",
        bold=True,
    )
    middle, late = np.percentile(lengths, [50, 95])
    yield (
        f"length: shortest {lengths.min():,}, median {middle:,.0f}, mean {lengths.mean():,.0f}, "
        f"95th percentile {late:,.0f}, longest {lengths.max():,}"
    )
    yield from histogram(lengths)
    yield f"rows: {_accounts(data)}"


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Lengths in bins that double, a line a bin."""
    low = 2 ** int(np.log2(lengths.min()))
    while low <= lengths.max():
        inside = int(((lengths >= low) & (lengths < 2 * low)).sum())
        bar = "#" * round(BAR_WIDTH * inside / len(lengths))
        yield f"{low:>7,} to {2 * low - 1:>7,}  {inside:>9,}  {bar}"
        low *= 2
