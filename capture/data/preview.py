"""Show the data as the target will see it, before anything is captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from capture.console import bold
from capture.data.conversations import TokenizedSample
from capture.data.preparation import prepare_data
from capture.data.summary import accounts, data_lines, position_lines
from capture.example import with_example
from capture.options import DataOptions
from pipeline.errors import UsageError
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from pipeline.text import marked_text


def preview(target: TargetOptions, options: DataOptions, *, row: int | None, count: int) -> Iterator[str]:
    """Yield lines for the terminal: some samples, the histogram of lengths, and the counts of rows.

    Args:
        row: show the sample of this row of the first source, counted from 1, instead of the first samples.
        count: samples to show.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    found = open_target(with_example(target))
    prepared = prepare_data(options, found)
    sources, data = prepared.sources, prepared.samples
    chosen = range(min(count, len(data)))
    if row is not None:
        chosen = np.flatnonzero((data.facts.sources == 0) & (data.facts.source_rows == row - 1)).tolist()
        if not chosen:
            raise UsageError(
                f"{sources[0].at(row - 1)} gave no sample: it is beyond the last row, an empty line, or was "
                f"left out ({accounts(data.rows)})"
            )
    for i in chosen:
        place = sources[data.facts.sources[i]].at(int(data.facts.source_rows[i]))
        yield from _sample(place, data[i], found.tokenizer())
    yield from data_lines(data)
    yield from position_lines(found.config, data.facts.lengths)


def _sample(place: str, sample: TokenizedSample, tokenizer: Any) -> Iterator[str]:
    supervised = int(sample.loss_mask[1:].sum())  # nothing predicts the first token
    share = supervised / len(sample.input_ids)
    yield bold(f"== {place}: {len(sample.input_ids):,} tokens, {supervised:,} supervised ({share:.0%})")
    yield marked_text(
        sample.input_ids, sample.loss_mask, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    )
    yield ""
