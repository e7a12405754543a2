"""From options to tokenised data: what capture, preview and plan do before they part ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from capture.data.conversations import RowTokenizer
from capture.data.sources import Source, open_sources
from capture.data.tokens import MAX_PROBLEMS, Selection, TokenizedData, load_data
from capture.options import DataOptions
from pipeline.chat.template import ChatTemplate
from pipeline.errors import UsageError


def open_data(options: DataOptions) -> list[Source]:
    """The sources that the options name; the example's conversations where they name none."""
    from capture.example import EXAMPLE_DATA

    return open_sources(options.data or (str(EXAMPLE_DATA),), split=options.split, subset=options.subset)


def chat_template(options: DataOptions, tokenizer: Any, today: str | None = None) -> ChatTemplate:
    """The tokenizer's chat template, or the one from the file that the options name.

    Args:
        today: the date that templates print, as 2026-01-31; None is today's.
    """
    template = None
    if options.chat_template:
        try:
            template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--chat-template {options.chat_template}: expected a Jinja file that can be read ({error})"
            ) from None
    date = {"today": today} if today else {}
    return ChatTemplate(tokenizer, template, options.template_arguments(), **date)


def row_tokenizer(
    options: DataOptions, tokenizer: Any, vocab_size: int, today: str | None = None
) -> RowTokenizer:
    """How the options turn a row into tokens; `today` as in `chat_template`."""
    return RowTokenizer(
        template=chat_template(options, tokenizer, today),
        vocab_size=vocab_size,
        supervise=options.supervise,
        mask_reasoning=options.mask_reasoning,
        max_length=options.max_length,
        too_long=options.too_long,
    )


def prepare_data(
    options: DataOptions, tokenize: RowTokenizer, tokenizer_sha256: str, sources: list[Source]
) -> TokenizedData:
    """Tokenise what the options name, and say on stderr what it was and which rows were left out.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    selection = Selection(
        min_supervised=options.min_supervised,
        num_samples=options.num_samples,
        shuffle=options.shuffle,
        seed=options.seed,
        form=None if options.format == "auto" else options.format,
        bad_rows=options.bad_rows,
    )
    data = load_data(sources, tokenize, tokenizer_sha256, selection, workers=options.tokenize_workers)
    for source, form in zip(sources, data.forms, strict=True):
        click.echo(f"data {source.place}: rows of {form}", err=True)
    for problem in data.problems:
        click.echo(f"skipped {problem}", err=True)
    bad = sum(count for reason, count in data.rows.items() if reason.startswith("dropped: bad row"))
    if bad > MAX_PROBLEMS:
        click.echo(f"skipped {bad - MAX_PROBLEMS:,} more bad rows", err=True)
    return data
