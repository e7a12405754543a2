"""The plan of a capture and its price, known before any weights are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from capture.data.summary import data_lines
from capture.engines.group import Group
from capture.engines.open import open_engine
from capture.prepare import PreparedCapture
from pipeline.cache.codecs import CODECS
from pipeline.cache.engine import engine_words
from pipeline.cache.features import LABELS, NO_LAST_HIDDEN, FeatureIdentity
from pipeline.cache.price import Price, cache_price, check_disk, free_bytes, written_bytes
from pipeline.cache.remote.local import staging_folder
from pipeline.cache.split import training_lines
from pipeline.options import DEFAULT_LAST_CODEC
from pipeline.remote.address import Address
from pipeline.target_model.load import Target
from pipeline.text import duration, size

PROBE_BATCHES = 6
# Codecs for context and last hidden that the plan prices.
PRICED = [(name, name if codec.for_last else DEFAULT_LAST_CODEC) for name, codec in CODECS.items()]


def price(prepared: PreparedCapture, context_codec: str, last_codec: str) -> Price:
    """Return the size of the cache with these codecs; `last_codec` "none" stores no last hidden states."""
    return _price(prepared, prepared.identity.features.stored_as(context_codec, last_codec))


def _price(prepared: PreparedCapture, features: FeatureIdentity) -> Price:
    return cache_price(
        replace(prepared.identity, features=features),
        prepared.plan,
        dict(prepared.data.rows),
        prepared.index,
        _target_bytes(prepared.target),
    )


def _target_bytes(target: Target) -> int:
    """Return the size of `target/`: config, tokenizer, embedding and head, in bf16 if that is lossless."""
    shell = target.shell
    embedding, head = shell.get_input_embeddings().weight, shell.get_output_embeddings().weight
    stored = target.checkpoint_dtype if target.checkpoint_dtype == torch.bfloat16 else target.dtype
    values = embedding.numel() + (0 if head is embedding else head.numel())
    return values * stored.itemsize + sum(map(len, target.files().values()))


def check_room(prepared: PreparedCapture) -> None:
    """Refuse a cache that the disk can't hold, unless the options force it.

    Raises:
        CacheError: with the bytes needed and the bytes free.
    """
    options, features = prepared.options, prepared.identity.features
    if not options.force and not isinstance(options.cache, Address):
        cost = price(prepared, features.context_codec, features.last_codec)
        check_disk(options.cache, cost, "capture fewer layers (--layers) or samples (--num-samples)")


def plan_lines(prepared: PreparedCapture) -> Iterator[str]:
    """Yield the plan in lines for the terminal."""
    target, batching, options = prepared.identity.target, prepared.batching, prepared.options
    yield (
        f"{target.name} ({target.architecture}, {target.dtype}), layers {list(prepared.layer_ids)}, "
        f"width {target.hidden_size:,}"
    )
    if prepared.identity.engine is not None:
        yield f"run by {engine_words(prepared.identity.engine)}"
    if prepared.answers_first:
        yield f"answers of its own ({prepared.options.answers.settings()}): sizes are upper bounds"
    yield from data_lines(prepared.data)
    batches = f"{len(batching.batches):,} batches of at most {options.batch_tokens:,} tokens"
    if prepared.plan.rows:
        stored, tokens = sum(prepared.plan.rows), sum(prepared.plan.tokens)
        yield f"{batches}, {batching.padded_tokens:,} computed if the target carries on from its cache"
        yield f"context of {stored:,} tokens stored, {1 - stored / tokens:.1%} less than of all {tokens:,}"
    else:
        yield f"{batches}, {batching.padding:.1%} padding"
    unit = "rows of a state" if prepared.plan.rows else "tokens"
    yield f"{len(prepared.plan):,} shards of at most {options.shard_tokens:,} {unit}"
    yield from training_lines(prepared.data.facts.sample_ids, prepared.data.facts.lengths)
    yield f"{'codec':<12}{'bytes per token':>16}{'cache':>12}"
    features = prepared.identity.features
    chosen = (features.context_codec, features.last_codec)
    pairs = PRICED if features.has_last_hidden else [(name, NO_LAST_HIDDEN) for name, _ in PRICED]
    for pair in dict.fromkeys([chosen, *pairs]):
        cost = price(prepared, *pair)
        name = pair[0] if pair[0] == pair[1] else "+".join(pair)
        mark = "  (this capture's)" if pair == chosen else ""
        yield f"{name:<12}{cost.per_token:>16,.0f}{size(cost.total):>12}{mark}"
    if features.hidden != LABELS:
        labels = replace(features, hidden=LABELS)
        yield (
            f"last hidden states of all {sum(prepared.plan.tokens):,} tokens; --hidden labels stores the "
            f"{sum(prepared.plan.last_rows):,} that training needs: "
            f"{_price(prepared, labels).per_token:,.0f} bytes per token"
        )
    if isinstance(options.cache, Address):
        yield f"written to {options.cache}, shard by shard through {staging_folder(options.cache)}"
        return
    written = written_bytes(options.cache) if options.cache.is_dir() else 0
    there = f", {size(written)} of the cache already written" if written else ""
    yield f"disk: {size(free_bytes(options.cache))} free at {options.cache}{there}"


@torch.no_grad()
def probe(prepared: PreparedCapture, group: Group | None = None) -> str:
    """Load the target and time a few batches. Return a line with the time that one process will need.

    Args:
        group: the processes over which transformers splits the target, if it does.
    """
    batching, data = prepared.batching, prepared.data
    chosen = np.linspace(0, len(batching.batches) - 1, PROBE_BATCHES).astype(int)
    tokens, seconds = 0, 0.0
    with closing(open_engine(prepared, group)) as engine:
        device = engine.device
        for n, batch in enumerate([chosen[0], *dict.fromkeys(chosen.tolist())]):
            samples = [data[int(i)] for i in batching.order[list(batching.batches[batch])]]
            began = time.perf_counter()
            states = engine.states(samples)
            float(states.take(prepared.layer_ids[0]).view(-1)[0])  # waits for the device
            if n:  # the first one warms up
                seconds += time.perf_counter() - began
                tokens += sum(len(sample.input_ids) for sample in samples)
    rate = tokens / seconds
    more = ", and the time in which it answers" if prepared.answers_first else ""
    return (
        f"probe: {rate:,.0f} tokens/s on {device}, so {duration(batching.tokens / rate)} for all "
        f"{batching.tokens:,} tokens by one process{more}"
    )
