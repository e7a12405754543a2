"""Measure opening a cache as large as the paper's: the time until the first sample can be read.

    python benchmarks/opening.py

The manifest, the index and the file table are real. The shards are sparse files, because opening does not
read them. Resident memory is the growth of the process by opening.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from pipeline.cache import (
    CacheReader,
    DataIdentity,
    FeatureIdentity,
    Identity,
    Manifest,
    SampleFacts,
    TargetIdentity,
    TokenizerIdentity,
    build_index,
    plan_shards,
)
from pipeline.cache.index import index_bytes
from pipeline.cache.manifest import FROZEN, INDEX, FileRecord, ShardFiles, shard_file, write_manifest

# Samples and shard_tokens: the example's size; the paper's data (1.3M conversations) with the default shards,
# and with about 100,000 small shards.
CASES = {"900 samples": (900, 32768), "1.3M samples": (1_300_000, 32768), "small shards": (1_300_000, 12288)}
HASH = hashlib.sha256(b"").hexdigest()
ROUNDS = 5


def make(cache: Path, samples: int, shard_tokens: int) -> int:
    """Write a cache of sparse shards. Return the number of shards."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.55, 0.8, samples), 16, 4096).astype(int)  # mean about 950
    facts = SampleFacts(
        sample_ids=np.frombuffer(rng.bytes(16 * samples), dtype=np.uint8).reshape(-1, 16),
        sources=np.zeros(samples, dtype=np.int32),
        source_rows=np.arange(samples),
        lengths=lengths,
        last_rows=lengths // 2,
        candidates=lengths // 2 - 1,
    )
    index, plan = build_index(facts, plan_shards(lengths.tolist(), shard_tokens))
    for folder in ("shards", "target"):
        (cache / folder).mkdir(parents=True)
    (cache / INDEX).write_bytes(index_bytes(index))
    for name in (FROZEN, *(shard_file(shard) for shard in range(len(plan)))):
        (cache / name).touch()
        os.truncate(cache / name, 4096)
    sizes = {INDEX: (cache / INDEX).stat().st_size, FROZEN: 4096}
    manifest = Manifest(
        status="complete",
        created_by="benchmarks/opening.py",
        identity=identity(shard_tokens),
        rows={"read": samples, "captured": samples},
        plan=plan,
        fidelity={},
        shards=ShardFiles(bytes=(4096,) * len(plan), sha256=(HASH,) * len(plan)),
        files=tuple(FileRecord(file=name, bytes=size, sha256=HASH) for name, size in sizes.items()),
    )
    write_manifest(cache, manifest)
    return len(plan)


def identity(shard_tokens: int) -> Identity:
    return Identity(
        target=TargetIdentity(
            name="qwen3-4b",
            weights=HASH,
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            hidden_size=2560,
            num_layers=36,
            vocab_size=151936,
            dtype="bfloat16",
            tied_embeddings=True,
            embedding_scale=1.0,
            logit_scale=1.0,
            final_logit_softcapping=None,
        ),
        tokenizer=TokenizerIdentity(
            sha256=HASH,
            chat_template_sha256=HASH,
            length=151669,
            mask_token_id=None,
            unk_token_id=None,
            pad_token_id=151643,
        ),
        data=DataIdentity(sources=("data.jsonl",), sha256=HASH, settings={}),
        features=FeatureIdentity(layer_ids=(1, 9, 17, 25, 33), context_codec="bf16", last_codec="bf16"),
        shard_tokens=shard_tokens,
        batch_tokens=16384,
    )


def resident() -> int:
    """Return the anonymous resident bytes of this process, without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _open(cache: Path, queue: multiprocessing.Queue) -> None:
    CacheReader(cache)  # warm-up: imports and page cache
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        CacheReader(cache)
        times.append(time.perf_counter() - start)
    before = resident()
    reader = CacheReader(cache)
    queue.put((min(times), resident() - before, len(reader)))


def main() -> None:
    rows = []
    for case, (samples, shard_tokens) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            label = f"{case}, {make(cache, samples, shard_tokens):,} shards"
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=_open, args=(cache, queue))
            process.start()
            seconds, growth, _ = queue.get()
            process.join()
            rows += [(label, "open", seconds * 1e3, "ms"), (label, "resident", growth / 2**20, "MiB")]
    record("opening", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
