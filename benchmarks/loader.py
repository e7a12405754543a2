"""Measure reading a cache for training: speed, bytes read and memory, compared with NVIDIA's reader.

    python benchmarks/loader.py               # makes a cache of more than 2 GB in a temporary directory
    python benchmarks/loader.py --keep DIR    # keeps the cache in DIR, and reuses it in later runs
    pip install --no-deps nemo-automodel==0.7.0                   # first, for the part about NVIDIA's reader

The features are noise, because speed does not depend on their values. GB/s count the states' bytes as bf16,
however they are stored. A plain copy copies the same number of bytes from memory to memory of a batch's size.
It runs in turn with the passes over the cache, so that noise of the machine affects both equally.

Cold means that no page of the shards is in the page cache, which mincore confirms before each such pass. The
pages in it after the pass are those that were read. The memory of a pass is the rise of the process's peak
resident bytes, including mapped pages, above those before the first batch. The consumer waits after each
batch until the batches ahead are ready, when most of them are in memory.

NVIDIA's reader runs in a separate process, without the memory settings of training here. The better of its
two batch sizes is compared. It reads in that process, its default: with two workers it took twice as long.
Tokens are those of the samples, without padding.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import nvidia_reader
from benchmarks.opening import identity
from benchmarks.page_cache import cached_bytes, drop_cached, warm
from benchmarks.record import record
from pipeline.cache import (
    CacheReader,
    CacheWriter,
    Identity,
    SampleFacts,
    build_index,
    count_candidates,
    last_hidden_rows,
    plan_shards,
    sample_id,
)
from pipeline.cache.direct import READ_BYTES, THREADS
from pipeline.cache.tools.convert import convert
from pipeline.device import reuse_freed_memory
from pipeline.options import DEFAULT_CONTEXT_CODEC, DEFAULT_LAST_CODEC
from train.data.loader import loaded
from train.data.packing import epoch_packs
from train.data.reads import DIRECT, MMAP, Reads, used_bytes
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors

HIDDEN, VOCAB, SHARD_TOKENS, CACHE_BYTES = 1024, 4096, 32768, 22 * 10**8
BATCH_TOKENS, ANCHORS, MAX_LENGTH = 4096, 512, 4096
SUBSET = (9, 25)  # two of the five layers
ROUNDS, COLD_ROUNDS = 7, 3
CPU = torch.device("cpu")


def make_identity(content: str) -> Identity:
    """Return the identity of a bf16 cache: H=1024, five captured layers. `content` is the data's hash."""
    large = identity(SHARD_TOKENS)
    target = replace(large.target, name="noise", hidden_size=HIDDEN, num_layers=36, vocab_size=VOCAB)
    return replace(large, target=target, data=replace(large.data, sha256=content))


def make_tokens(total: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make token ids and loss masks of log-normal lengths, 60% supervised, every other with two turns.

    Args:
        total: bytes of their states.
    """
    rng, samples, size = np.random.default_rng(0), [], 0
    while size < total:
        length = int(np.clip(rng.lognormal(6.5, 0.8), 16, MAX_LENGTH))
        share = np.arange(length) / length
        turns = share >= 0.4 if len(samples) % 2 else (share >= 0.7) | ((share >= 0.2) & (share < 0.5))
        samples.append((rng.integers(VOCAB, size=length, dtype=np.int32), turns.astype(np.uint8)))
        size += 2 * HIDDEN * (5 * length + int(turns[1:].sum()))
    return samples


def make(path: Path, total: int = CACHE_BYTES) -> Path:
    """Write the cache, or what is missing of it. Return its path.

    Args:
        total: bytes of its states.
    """
    samples = make_tokens(total)
    facts = SampleFacts(
        sample_ids=np.frombuffer(b"".join(sample_id(*s) for s in samples), dtype=np.uint8).reshape(-1, 16),
        sources=np.zeros(len(samples), dtype=np.int32),
        source_rows=np.arange(len(samples)),
        lengths=np.array([len(ids) for ids, _ in samples]),
        last_rows=np.array([len(last_hidden_rows(mask)) for _, mask in samples]),
        candidates=np.array([count_candidates(mask) for _, mask in samples]),
    )
    shards = plan_shards(facts.lengths.tolist(), SHARD_TOKENS)
    index, plan = build_index(facts, shards)
    who = make_identity(facts.content_hash())
    writer = CacheWriter(path, who, plan, index, {"read": len(samples), "captured": len(samples)})
    noise = torch.randn(SHARD_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    for shard in writer.pending():
        buffer = writer.new_shard(shard)
        for column, name in enumerate(("input_ids", "loss_mask")):
            parts = [samples[i][column] for i in shards[shard]]
            buffer.tensors.pop(name).copy_(torch.from_numpy(np.concatenate(parts)))
        for states in buffer.tensors.values():
            states.copy_(noise[: len(states)])
        writer.write_shard(shard, buffer)
    if not writer.complete:
        writer.write_target({"config.json": b"{}"}, {"embed_tokens.weight": noise[:VOCAB]})
        writer.finalise()
    return path


def one_pass(
    reader: CacheReader,
    layers: Sequence[int],
    samples: int | None = None,
    wait: float = 0,
    epochs: int = 1,
    device: torch.device = CPU,
    batch_tokens: int = BATCH_TOKENS,
    how: str = MMAP,
) -> float:
    """Return the seconds per epoch of reading the first samples (None: all) to a device, batch by batch.

    Args:
        how: as `train.reader`.
    """
    order = [
        pack for e in range(epochs) for pack in epoch_packs(reader.lengths[:samples], batch_tokens, 0, e)
    ]
    collate = collate_anchors(random_anchors(ANCHORS, 0, 0))
    reads = Reads(reader, how, layers, sys.maxsize, 0)
    start = time.perf_counter()
    for _batch in loaded(
        reader, ((pack, collate) for pack in order), layers, batch_tokens, device, reads=reads
    ):
        time.sleep(wait)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / epochs


def state_bytes(reader: CacheReader, layers: Sequence[int]) -> int:
    """Return the bytes of a cache's states as bf16."""
    rows = len(layers) * int(reader.lengths.sum()) + sum(map(reader.num_last_rows, range(len(reader))))
    return 2 * HIDDEN * rows


def batch_bytes(layers: Sequence[int]) -> int:
    return 2 * HIDDEN * BATCH_TOKENS * (len(layers) + 1)


def copier(layers: Sequence[int], total: int) -> Callable[[], float]:
    """Return a function that times copying `total` bytes to memory of a batch's size."""
    source = torch.ones(total // 2, dtype=torch.bfloat16)
    out = torch.zeros(batch_bytes(layers) // 2, dtype=torch.bfloat16)

    def copy() -> float:
        start = time.perf_counter()
        for part in source.split(len(out)):
            out[: len(part)].copy_(part)
        return time.perf_counter() - start

    return copy


def medians(rounds: int, *ways: Callable[[], float]) -> list[float]:
    """Return the median seconds of each function, run in turn after a warm-up round."""
    times = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


Row = tuple[str, str, float, str]


def warm_rows(case: str, path: Path, bar: str = "") -> list[Row]:
    """Measure the speed from the page cache, compared with a plain copy."""
    warm(path)
    reader = CacheReader(path)
    layers, tokens = reader.layer_ids, int(reader.lengths.sum())
    size = state_bytes(reader, layers)
    ours, copied = medians(ROUNDS, lambda: one_pass(reader, layers, epochs=2), copier(layers, size))
    return [
        (f"{case}, warm", "read", size / ours / 1e9, "GB/s of bf16"),
        (f"{case}, warm", "read", tokens / ours, "tokens/s"),
        (f"{case}, warm", "plain copy", size / copied / 1e9, "GB/s"),
        (f"{case}, warm", "read / plain copy", copied / ours, f"times{bar}"),
    ]


def cold_rows(case: str, path: Path) -> list[Row]:
    """Measure the speed from storage, and the MB read into the page cache, for all and for two layers."""
    rows = []
    every = CacheReader(path).layer_ids
    for name, layers in ((f"{case}, cold", every), (f"{case}, cold, two layers", SUBSET)):
        times = []
        for _ in range(COLD_ROUNDS):
            drop_cached(path)
            reader = CacheReader(path)
            times.append(one_pass(reader, layers))
            size, tokens = state_bytes(reader, layers), int(reader.lengths.sum())
            del reader
            read = cached_bytes(path)
        seconds, needed = statistics.median(times), size + 5 * tokens  # ids: 4 bytes per token, mask: 1
        rows += [
            (name, "read", size / seconds / 1e9, "GB/s of bf16"),
            (name, "read", tokens / seconds, "tokens/s"),
            (name, "read from storage", read / 1e6, "MB"),
            (name, "read / needed", read / needed, "times"),
        ]
    return rows


def raw_pass(path: Path) -> float:
    """Return the GB/s of plain reads of all shards past the page cache, `THREADS` at once."""
    files = sorted((path / "shards").iterdir())
    parts = [(file, at) for file in files for at in range(0, file.stat().st_size, READ_BYTES)]
    opened = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
    own = threading.local()

    def read(part: tuple[Path, int]) -> int:
        if not hasattr(own, "memory"):
            own.memory = mmap.mmap(-1, READ_BYTES)
        return os.preadv(opened[part[0]], [own.memory], part[1])

    with ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        total = sum(pool.map(read, parts))
        seconds = time.perf_counter() - start
    for descriptor in opened.values():
        os.close(descriptor)
    return total / seconds / 1e9


def direct_rows(case: str, path: Path) -> list[Row]:
    """Measure cold passes through the page cache and past it, in turn with plain reads of the same disk."""
    ways: dict[str, list[float]] = {MMAP: [], DIRECT: [], "raw": []}
    for _ in range(COLD_ROUNDS):
        for how, found in ways.items():
            drop_cached(path)
            if how == "raw":
                found.append(raw_pass(path))
                continue
            reader = CacheReader(path)
            used = used_bytes(reader, range(len(reader)), reader.layer_ids)
            found.append(used / one_pass(reader, reader.layer_ids, how=how) / 1e9)
            del reader
    through, past, raw = (statistics.median(found) for found in ways.values())
    return [
        (f"{case}, cold, through the page cache", "read", through, "GB/s as stored"),
        (f"{case}, cold, past the page cache", "read", past, "GB/s as stored"),
        (f"{case}, cold, plain reads past it", "read", raw, "GB/s"),
        (f"{case}, cold", "past it / plain reads", past / raw, "times (bar: at least 0.9)"),
        (f"{case}, cold", "through it / plain reads", through / raw, "times"),
    ]


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _memory(path: Path, queue: multiprocessing.Queue) -> None:
    reuse_freed_memory()
    reader = CacheReader(path)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    one_pass(reader, reader.layer_ids, wait=0.1)
    queue.put(_status("VmHWM") - before)


def memory_rows(case: str, path: Path) -> list[Row]:
    """Measure the memory of a warm pass, in a separate process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_memory, args=(path, queue))
    process.start()
    peak = queue.get(timeout=600)  # a timeout means that the process died
    process.join()
    bar = 2 * batch_bytes(CacheReader(path).layer_ids) + 200 * 10**6
    return [(f"{case}, warm", "memory", peak / 1e6, f"MB (bar: below {bar / 1e6:.0f})")]


def nvidia_rows(case: str, path: Path, theirs_at: Path) -> list[Row]:
    """Measure our reader and NVIDIA's on the same samples, warm, in turn."""
    reader = CacheReader(path)
    nvidia_reader.make_theirs(nvidia_reader.nvidia_module(), theirs_at, reader, MAX_LENGTH)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=nvidia_reader.serve, args=(theirs_at, there))
    process.start()
    there.close()  # so that the end of the process closes the pipe

    def their_pass(size: int) -> float:
        here.send(size)
        return here.recv()

    passes = [partial(their_pass, size) for size in nvidia_reader.BATCHES]
    ours, *each = medians(
        ROUNDS, lambda: one_pass(reader, reader.layer_ids, nvidia_reader.SAMPLES, epochs=8), *passes
    )
    here.send(None)
    process.join()
    tokens = int(reader.lengths[: nvidia_reader.SAMPLES].sum())
    rows = [(f"{case}, {nvidia_reader.SAMPLES} samples, warm", "read", tokens / ours, "tokens/s")]
    for size, seconds in zip(nvidia_reader.BATCHES, each, strict=True):
        rows.append((f"NVIDIA, batches of {size}, warm", "read", tokens / seconds, "tokens/s"))
    return [*rows, (f"{case} / NVIDIA", "read", min(each) / ours, "times (bar: at least 8)")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="directory for the caches; a temporary one by default")
    keep = parser.parse_args().keep
    reuse_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        path = make(folder / "bf16")
        rows = warm_rows("bf16", path, " (bar: at least 0.4)")
        rows += cold_rows("bf16", path)
        rows += direct_rows("bf16", path)
        rows += memory_rows("bf16", path)
        if importlib.util.find_spec(nvidia_reader.PACKAGE):
            rows += nvidia_rows("bf16", path, folder / "nvidia")
        else:
            print("NVIDIA's reader is left out: pip install --no-deps nemo-automodel==0.7.0")
        codecs = {"context_codec": DEFAULT_CONTEXT_CODEC, "last_codec": DEFAULT_LAST_CODEC}
        convert(path, folder / "default", **codecs)
        name = f"{DEFAULT_CONTEXT_CODEC}+{DEFAULT_LAST_CODEC}"
        rows += warm_rows(name, folder / "default")
        rows += direct_rows(name, folder / "default")
        record("loader", CPU, rows)


if __name__ == "__main__":
    main()
