"""The plan and the index of a cache whose prompts have all been answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capture.data.conversations import TokenizedSample
from capture.one_pass.engine import OnePassEngine
from capture.one_pass.journal import Journal, answers_file
from capture.one_pass.turns import Conversation
from capture.prepare import PreparedCapture
from pipeline.cache import CacheWriter, Identity, SampleFacts, build_index, read_manifest
from pipeline.cache.index import count_candidates, open_index
from pipeline.cache.manifest import INDEX, ShardPlan, shard_file
from pipeline.cache.rows import last_hidden_rows
from pipeline.errors import CacheError
from pipeline.files import plain_size


def one_pass_engine(engine: Any, prepared: PreparedCapture) -> OnePassEngine | None:
    """Return the engine that answers; None for a capture of samples as they are."""
    if not prepared.answers_first:
        return None
    options = prepared.options
    return OnePassEngine(engine, options.answers, options.data.max_length, options.cache)


def shard_plan(batches: Sequence[Sequence[TokenizedSample]]) -> ShardPlan:
    """Return what a shard of these batches holds."""
    samples = [sample for batch in batches for sample in batch]
    return ShardPlan(
        samples=len(samples),
        tokens=sum(len(sample.input_ids) for sample in samples),
        last_rows=sum(len(last_hidden_rows(sample.loss_mask)) for sample in samples),
    )


def answered_writer(prepared: PreparedCapture, identity: Identity) -> CacheWriter:
    """Return the writer of a cache whose prompts have all been answered, to check it and write what it lacks.

    Raises:
        CacheError: a shard or the index is damaged. Its answers are lost, because nothing else has them.
    """
    cache, manifest = prepared.options.cache, read_manifest(prepared.options.cache)
    try:
        index = open_index(cache / INDEX, manifest.plan)
    except CacheError:
        raise _lost(cache, INDEX) from None
    for shard, size in enumerate(manifest.shards.bytes):
        if plain_size(cache / shard_file(shard)) != size:
            raise _lost(cache, shard_file(shard))
    writer = CacheWriter(cache, identity, manifest.plan, index, dict(prepared.data.rows))
    for shard in writer.pending():
        raise _lost(cache, shard_file(shard))
    return writer


def _lost(cache: Path, name: str) -> CacheError:
    return CacheError(
        f"{cache / name} is missing or damaged, and with it answers that were sampled while the cache was "
        f"captured: remove {cache}, and run the same command again, which samples all of them anew"
    )


def settle(writer: CacheWriter, prepared: PreparedCapture) -> list[int]:
    """Give a writer whose shards are all written the plan of the answered samples.

    Returns:
        Shards that do not hold the journal's answers, because two processes wrote them; nothing is settled
        then.
    """
    ids, columns, wrong = [], [], []
    for shard in range(len(prepared.batching.shards)):  # one at a time: all tokens may not fit the memory
        samples = answered_samples(prepared, shard)
        if not writer.holds(shard, _tokens(samples)):
            wrong.append(shard)
        ids += [sample.sample_id for sample in samples]
        columns += [
            (len(s.input_ids), len(last_hidden_rows(s.loss_mask)), count_candidates(s.loss_mask))
            for s in samples
        ]
    if wrong:  # or the journals are gone, because another process completed the cache
        return [] if writer.completed_by_another() else wrong
    planned = prepared.data.facts.take(prepared.batching.order)
    lengths, last_rows, candidates = np.array(columns).T
    facts = SampleFacts(
        sample_ids=np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16),
        sources=planned.sources,
        source_rows=planned.source_rows,
        lengths=lengths,
        last_rows=last_rows,
        candidates=candidates,
    )
    index, plan = build_index(facts, prepared.batching.shards)
    writer.settle(facts.content_hash(), plan, index)
    return []


def _tokens(samples: Sequence[TokenizedSample]) -> np.ndarray:
    return np.concatenate([sample.input_ids for sample in samples])


def answered_samples(prepared: PreparedCapture, shard: int) -> list[TokenizedSample]:
    """Return a shard's samples with their answers, from the journal."""
    order, options = prepared.batching.order, prepared.options
    conversations = [
        Conversation(prepared.data[int(order[i])], options.data.max_length, options.answers.max_new_tokens)
        for i in prepared.batching.shards[shard]
    ]
    Journal(answers_file(options.cache, shard)).read(conversations)
    return [conversation.answered()[0] for conversation in conversations]
