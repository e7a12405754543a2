"""Tokenise the data that the options name, for capture, plan and preview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capture import example
from capture.console import note
from capture.data.conversations import RowTokenizer
from capture.data.sources import Source, open_sources
from capture.data.tokens import MAX_PROBLEMS, Selection, TokenizedData, load_data
from capture.options import DataOptions
from pipeline.cache import TokenizerIdentity
from pipeline.chat.template import ChatTemplate
from pipeline.target_model.identity import tokenizer_identity
from pipeline.target_model.load import Target


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Tokenised data, with what it was made from."""

    sources: list[Source]
    samples: TokenizedData
    template: ChatTemplate
    tokenizer: TokenizerIdentity


def prepare_data(options: DataOptions, target: Target, today: str | None = None) -> PreparedData:
    """Tokenise the data for a target. Print the form of each source and the skipped rows to stderr.

    The chat template in use is set on the target's tokenizer.

    Args:
        today: date that templates print, as 2026-01-31; None is the current date.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    tokenizer = target.tokenizer()
    template = _chat_template(options, tokenizer, today)
    tokenizer.chat_template = template.own  # so that the identity has its hash
    identity = tokenizer_identity(tokenizer)
    tokenize = RowTokenizer(
        template=template,
        vocab_size=target.shell.get_input_embeddings().weight.shape[0],
        supervise=options.supervise,
        mask_reasoning=options.mask_reasoning,
        max_length=options.max_length,
        too_long=options.too_long,
        stop_ids=stop_ids(target),
    )
    _warn_of_tokens_beyond(identity, tokenize.vocab_size)
    selection = Selection(
        min_supervised=options.min_supervised,
        num_samples=options.num_samples,
        shuffle=options.shuffle,
        seed=options.seed,
        form=None if options.format == "auto" else options.format,
        bad_rows=options.bad_rows,
    )
    data = options.data or (str(example.EXAMPLE_DATA),)
    sources = open_sources(data, split=options.split, subset=options.subset)
    samples = load_data(sources, tokenize, identity.sha256, selection, workers=options.tokenize_workers)
    for source, form in zip(sources, samples.forms, strict=True):
        note(f"data {source.place}: rows of {form}")
    if samples.masked:
        note(
            f"{samples.masked:,} answers are left out of the loss by the data's own keys (weight, train, ...)"
        )
    for problem in samples.problems:
        note(f"skipped {problem}")
    bad = sum(count for reason, count in samples.rows.items() if reason.startswith("dropped: bad row"))
    if bad > MAX_PROBLEMS:
        note(f"skipped {bad - MAX_PROBLEMS:,} more bad rows")
    return PreparedData(sources, samples, template, identity)


def _warn_of_tokens_beyond(tokenizer: TokenizerIdentity, rows: int) -> None:
    if tokenizer.length > rows:
        note(
            f"warning: the tokenizer has {tokenizer.length:,} tokens, the target's embedding {rows:,} rows: "
            f"a row with a token id from {rows} on is a bad row"
        )


def stop_ids(target: Target) -> tuple[int, ...]:
    """Return the tokens at which the target stops, by its generation config, else by its config."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(target.directory, local_files_only=True).eos_token_id
    except (OSError, ValueError):  # none, or not readable
        found = getattr(target.config.get_text_config(), "eos_token_id", None)
    ids = found if isinstance(found, (list, tuple)) else [found]
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def _chat_template(options: DataOptions, tokenizer: Any, today: str | None) -> ChatTemplate:
    """Return the tokenizer's chat template, or the one from the file that the options name."""
    date = {"today": today} if today else {}
    return ChatTemplate(tokenizer, options.template_text(), options.template_arguments(), **date)
