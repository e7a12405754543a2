"""The plan and the sample index: which sample fills which rows of which shard.

Both are pure functions of the samples' lengths and masks, fixed before the first forward, so that
any number of workers, now or after a crash, fill the same shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.manifest import Plan
from pipeline.errors import CacheError

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),  # from SHA-256 of token ids and mask
        pa.field("source", pa.int32(), nullable=False),  # which of the manifest's sources
        pa.field("source_row", pa.int64(), nullable=False),  # row number in that source, from 0
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("token_start", pa.int64(), nullable=False),  # first row of the shard's token tensors
        pa.field("length", pa.int32(), nullable=False),  # tokens
        pa.field("last_start", pa.int64(), nullable=False),  # first row of the shard's last_hidden
        pa.field("last_rows", pa.int32(), nullable=False),  # rows of last_hidden
        pa.field("candidates", pa.int32(), nullable=False),  # positions an anchor can take
    ]
)


@dataclass(frozen=True)
class SampleFacts:
    """What the plan needs to know of a sample, without its tokens."""

    sample_id: bytes
    source: int
    source_row: int
    length: int
    last_rows: int
    candidates: int


def sample_id(input_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """Name a sample by its content: the first 16 bytes of a SHA-256 over int32 ids, then uint8 mask."""
    content = input_ids.astype("<i4").tobytes() + loss_mask.astype("u1").tobytes()
    return hashlib.sha256(content).digest()[:16]


def last_hidden_rows(loss_mask: np.ndarray) -> np.ndarray:
    """Positions whose last hidden state a loss can use: t-1 for every supervised label t >= 1."""
    return np.flatnonzero(loss_mask[1:])


def count_candidates(loss_mask: np.ndarray) -> int:
    """How many positions can be an anchor: supervised, with a supervised successor."""
    return int(np.count_nonzero(loss_mask[:-1] & loss_mask[1:]))


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[range]:
    """Split samples, in order, into shards of at most `shard_tokens` tokens (one sample at least)."""
    shards: list[range] = []
    first = tokens = 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > shard_tokens:
            shards.append(range(first, i))
            first, tokens = i, 0
        tokens += length
    if lengths:
        shards.append(range(first, len(lengths)))
    return shards


def build_index(facts: Sequence[SampleFacts], shards: Sequence[range]) -> tuple[pa.Table, Plan]:
    """The index table and the manifest's plan for samples laid out in `shards`."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    plan: dict[str, list[int]] = {"samples": [], "tokens": [], "last_rows": []}
    for shard, members in enumerate(shards):
        tokens = last_rows = 0
        for i in members:
            fact = facts[i]
            where = (fact.sample_id, fact.source, fact.source_row, shard, tokens)
            values = (*where, fact.length, last_rows, fact.last_rows, fact.candidates)
            for name, value in zip(SCHEMA.names, values, strict=True):
                columns[name].append(value)
            tokens += fact.length
            last_rows += fact.last_rows
        for name, total in zip(plan, (len(members), tokens, last_rows), strict=True):
            plan[name].append(total)
    return pa.table(columns, schema=SCHEMA), Plan(**{name: tuple(totals) for name, totals in plan.items()})


def index_bytes(table: pa.Table) -> bytes:
    """The index as an uncompressed Arrow IPC file, which a reader maps without reading it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def open_index(path: Path, plan: Plan) -> pa.Table:
    """Map an index file and check it against the plan.

    Raises:
        CacheError: missing, unreadable, of another schema, or pointing outside the shards.
    """
    num_samples = sum(plan.samples)
    try:
        with pa.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer()
            # A compressed index could unpack to anything: one smaller than its rows is not even opened,
            # and one whose columns do not lie in the file itself is refused.
            row_bytes = sum(column.type.bit_width // 8 for column in SCHEMA)
            if whole.size < num_samples * row_bytes:
                raise CacheError(f"{path} is damaged (too short for {num_samples} samples): capture again")
            table = pa.ipc.open_file(mapped).read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: the cache is damaged, capture again") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CacheError(f"{path} is damaged ({reason}): capture again") from None
    if not table.schema.equals(SCHEMA):
        raise CacheError(f"{path} is damaged (its columns are not those of FORMAT.md): capture again")
    if not all(_lies_in(whole, column) for column in table.columns):
        raise CacheError(f"{path} is damaged (it is compressed): capture again")
    if any(column.null_count for column in table.columns):
        raise CacheError(f"{path} is damaged (it has nulls): capture again")
    if not _matches(table, plan):
        raise CacheError(f"{path} is damaged (its rows do not tile the shards of the plan): capture again")
    return table


def _lies_in(whole: pa.Buffer, column: pa.ChunkedArray) -> bool:
    buffers = [buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None]
    end = whole.address + whole.size
    return all(whole.address <= b.address and b.address + b.size <= end for b in buffers if b.size)


def _matches(table: pa.Table, plan: Plan) -> bool:
    """Whether samples tile every shard exactly: in order, without gap or overlap."""
    shard, start, length, last_start, last_rows, candidates = (
        table[name].to_numpy().astype(np.int64) for name in SCHEMA.names[3:]
    )
    if len(shard) != sum(plan.samples):
        return False
    samples = np.array(plan.samples, dtype=np.int64)
    if any((table[name].to_numpy() < 0).any() for name in ("source", "source_row")) or not np.array_equal(
        shard, np.repeat(np.arange(len(plan)), samples)
    ):
        return False
    if (length < 2).any() or (last_rows < 1).any() or (last_rows >= length).any():
        return False
    if (candidates < 1).any() or (candidates > last_rows).any():
        return False
    first = np.cumsum(samples) - samples  # each shard's first sample

    def tiles(starts: np.ndarray, sizes: np.ndarray, totals: Sequence[int]) -> bool:
        ends = np.cumsum(sizes)
        base = np.repeat((ends - sizes)[first], samples)
        sums = np.add.reduceat(sizes, first) if len(first) else np.zeros(0, dtype=np.int64)
        return np.array_equal(starts, ends - sizes - base) and np.array_equal(sums, totals)

    if not len(plan):
        return True
    return tiles(start, length, plan.tokens) and tiles(last_start, last_rows, plan.last_rows)
