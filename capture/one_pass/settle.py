"""The plan and the index of a cache whose prompts have all been answered."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capture.data.conversations import TokenizedSample
from capture.one_pass.engine import OnePassEngine
from capture.one_pass.journal import Journal
from capture.one_pass.turns import Conversation
from capture.prepare import PreparedCapture
from pipeline.cache import CacheWriter, Identity, SampleFacts, build_index, read_manifest
from pipeline.cache.index import count_candidates, open_index
from pipeline.cache.manifest import INDEX, ShardPlan, shard_file
from pipeline.cache.remote.local import staging_folder
from pipeline.cache.rows import last_hidden_rows
from pipeline.errors import CacheError
from pipeline.files import plain_size
from pipeline.remote.address import Address, Place
from pipeline.remote.objects import Objects


def one_pass_engine(engine: Any, prepared: PreparedCapture, folder: Path) -> OnePassEngine | None:
    """Return the engine that answers, and keeps answers in `folder`; None for samples as they are."""
    if not prepared.answers_first:
        return None
    options = prepared.options
    return OnePassEngine(engine, options.answers, options.data.max_length, folder)


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
    cache = prepared.options.cache
    if isinstance(cache, Address):
        return _remote_answered(prepared, identity, cache)
    manifest = read_manifest(cache)
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


def _remote_answered(prepared: PreparedCapture, identity: Identity, cache: Address) -> CacheWriter:
    """Return the writer of such a cache in an object store, whose files it looks for but doesn't read."""
    from pipeline.cache.remote.mirror import read_remote_manifest
    from pipeline.cache.remote.writer import RemoteWriter

    objects, staging = Objects(cache), staging_folder(cache)
    manifest, _ = read_remote_manifest(objects)
    sizes = {entry.name: entry.bytes for entry in objects.list()}
    for record in manifest.all_files():
        answers = record.file == INDEX or record.file.startswith("shards/")
        if answers and sizes.get(record.file) != record.bytes:
            raise _lost(cache, record.file)
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed after the last of its uploads
    return RemoteWriter(objects, staging, identity, manifest.plan, prepared.index, dict(prepared.data.rows))


def _lost(cache: Place, name: str) -> CacheError:
    return CacheError(
        f"{cache}/{name} is missing or damaged, and with it answers that were sampled while the cache was "
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
        samples = answered_samples(prepared, shard, writer.answers(shard))
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


def answered_samples(prepared: PreparedCapture, shard: int, answers: Path) -> list[TokenizedSample]:
    """Return a shard's samples with their answers, which are in the file `answers`."""
    order, options = prepared.batching.order, prepared.options
    conversations = [
        Conversation(prepared.data[int(order[i])], options.data.max_length, options.answers.max_new_tokens)
        for i in prepared.batching.shards[shard]
    ]
    Journal(answers).read(conversations)
    return [conversation.answered()[0] for conversation in conversations]
