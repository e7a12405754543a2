"""Look at the data as the target will see it, before anything is captured."""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np

from capture.data.conversations import TokenizedSample
from capture.data.summary import accounts, data_lines
from capture.example import with_example
from capture.options import DataOptions
from capture.prepare import open_data, prepare_data, row_tokenizer
from pipeline.errors import UsageError
from pipeline.target_model.identity import tokenizer_identity
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from pipeline.text import marked_text


def preview(target: TargetOptions, options: DataOptions, *, row: int | None, count: int) -> Iterator[str]:
    """Lines for the terminal: some samples, then the length histogram and where every row went.

    Args:
        row: show the sample of that row of the first source, counted from 1, instead of the first ones.
        count: how many samples to show.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    found = open_target(with_example(target))
    tokenizer = found.tokenizer()
    sources = open_data(options)
    tokenize = row_tokenizer(options, tokenizer, found.shell.get_input_embeddings().weight.shape[0])
    data = prepare_data(options, tokenize, tokenizer_identity(tokenizer).sha256, sources)
    chosen = range(min(count, len(data)))
    if row is not None:
        chosen = np.flatnonzero((data.facts.sources == 0) & (data.facts.source_rows == row - 1)).tolist()
        if not chosen:
            raise UsageError(
                f"{sources[0].at(row - 1)} gave no sample: it is no row, an empty line, or was left out "
                f"({accounts(data.rows)})"
            )
    for i in chosen:
        place = sources[data.facts.sources[i]].at(int(data.facts.source_rows[i]))
        yield from _sample(place, data[i], tokenizer)
    yield from data_lines(data)


def _sample(place: str, sample: TokenizedSample, tokenizer) -> Iterator[str]:
    supervised = int(sample.loss_mask.sum())
    share = supervised / len(sample.input_ids)
    yield click.style(
        f"== {place}: {len(sample.input_ids):,} tokens, {supervised:,} supervised ({share:.0%})", bold=True
    )
    yield marked_text(
        sample.input_ids, sample.loss_mask, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    )
    yield ""
