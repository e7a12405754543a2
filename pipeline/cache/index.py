"""The plan and the sample index: the shard and rows of each sample.

Both are pure functions of the samples' lengths and masks, fixed before the first forward. So any number of
workers, now or after a crash, fill the same shards.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.cache.manifest import Plan
from pipeline.cache.prefixes import sample_starts
from pipeline.cache.skipped import Skipped
from pipeline.errors import CacheError
from pipeline.text import one_line

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),  # from SHA-256 of token ids and mask
        pa.field("source", pa.int32(), nullable=False),  # number of one of the manifest's sources
        pa.field("source_row", pa.int64(), nullable=False),  # row number in that source, from 0
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("token_start", pa.int64(), nullable=False),  # first row of the shard's token tensors
        pa.field("length", pa.int32(), nullable=False),  # tokens
        pa.field("last_start", pa.int64(), nullable=False),  # first of the shard's label rows
        pa.field("last_rows", pa.int32(), nullable=False),  # label rows
        pa.field("candidates", pa.int32(), nullable=False),  # positions an anchor can take
    ]
)
# Of a cache whose samples share rows of context: the first rows of each that are those of the one before.
SHARING_SCHEMA = SCHEMA.append(pa.field("shared", pa.int32(), nullable=False))


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleFacts:
    """Facts of n samples that the plan needs, without their tokens, as columns."""

    sample_ids: np.ndarray  # [n, 16] uint8
    sources: np.ndarray  # [n]
    source_rows: np.ndarray  # [n]
    lengths: np.ndarray  # [n], tokens
    last_rows: np.ndarray  # [n], supervised labels
    candidates: np.ndarray  # [n], positions an anchor can take
    shared: np.ndarray | None = None  # [n], first tokens whose context is that of the sample before; None: 0

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, order: np.ndarray) -> SampleFacts:
        """Return the samples of the numbers `order`, in that order."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return SampleFacts(**{name: c if c is None else c[order] for name, c in columns.items()})

    def content_hash(self) -> str:
        """Return the hex SHA-256 over the sample ids in order, and so over all token ids and loss masks."""
        return hashlib.sha256(np.ascontiguousarray(self.sample_ids)).hexdigest()


def sample_id(input_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """Return a sample's id: the first 16 bytes of the SHA-256 over its token ids as int32, then its mask."""
    content = input_ids.astype("<i4").tobytes() + loss_mask.astype("u1").tobytes()
    return hashlib.sha256(content).digest()[:16]


def count_candidates(loss_mask: np.ndarray) -> int:
    """Count the positions that can be an anchor: supervised, with a supervised successor."""
    return int(np.count_nonzero(loss_mask[:-1] & loss_mask[1:]))


def plan_shards(
    lengths: Sequence[int], shard_tokens: int, regained: Sequence[int] | None = None
) -> list[range]:
    """Split samples or batches, in order, into shards of at most `shard_tokens` tokens or one longer item.

    Args:
        regained: tokens that each one has besides where it is a shard's first; None for none.
    """
    shards: list[range] = []
    first = tokens = 0
    for i, length in enumerate(lengths):
        if i > first and tokens + length > shard_tokens:
            shards.append(range(first, i))
            first, tokens = i, 0
        tokens += length + (regained[i] if regained is not None and i == first else 0)
    if lengths:
        shards.append(range(first, len(lengths)))
    return shards


def build_index(facts: SampleFacts, shards: Sequence[range]) -> tuple[pa.Table, Plan]:
    """Return the index table and the manifest's plan of samples that fill `shards` in order."""
    samples = np.array([len(members) for members in shards], dtype=np.int64)
    first = np.cumsum(samples) - samples  # each shard's first sample

    def totals(sizes: np.ndarray) -> tuple[int, ...]:
        return tuple(np.add.reduceat(sizes, first, dtype=np.int64).tolist()) if len(first) else ()

    values = (
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(facts), [None, pa.py_buffer(np.ascontiguousarray(facts.sample_ids))]
        ),
        facts.sources,
        facts.source_rows,
        np.repeat(np.arange(len(shards)), samples),
        sample_starts(facts.lengths, samples),
        facts.lengths,
        sample_starts(facts.last_rows, samples),
        facts.last_rows,
        facts.candidates,
    )
    schema, rows = SCHEMA, ()
    if facts.shared is not None:
        schema, values = SHARING_SCHEMA, (*values, facts.shared)
        rows = totals(facts.lengths - facts.shared)
    columns = [
        pa.array(v, type=f.type) if isinstance(v, np.ndarray) else v
        for v, f in zip(values, schema, strict=True)
    ]
    plan = Plan(
        samples=tuple(samples.tolist()),
        tokens=totals(facts.lengths),
        last_rows=totals(facts.last_rows),
        rows=rows,
    )
    return pa.table(columns, schema=schema), plan


def index_bytes(table: pa.Table) -> bytes:
    """Return the index as an uncompressed Arrow IPC file, which a reader maps without reading it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def open_index(path: Path, plan: Plan) -> pa.Table:
    """Map an index file and check it against the plan.

    Raises:
        CacheError: missing, unreadable, of another schema, or pointing outside the shards.
    """
    num_samples = sum(plan.samples)
    schema = SHARING_SCHEMA if plan.rows else SCHEMA
    try:
        with pa.memory_map(str(path)) as mapped:
            whole = mapped.read_buffer()
            # A compressed index could unpack to any size. A file smaller than its rows is not opened, and one
            # whose columns are not stored as they are is not read.
            row_bytes = sum(column.type.bit_width // 8 for column in schema)
            if whole.size < num_samples * row_bytes:
                raise CacheError(f"{path} is damaged (too short for {num_samples} samples): capture again")
            with pa.ipc.open_file(mapped) as reader:
                if not reader.schema.equals(schema):
                    raise CacheError(
                        f"{path} is damaged (its columns differ from those of FORMAT.md): capture again"
                    )
                if not _is_plain(memoryview(whole).cast("B"), num_samples):
                    raise CacheError(
                        f"{path} is damaged (it is compressed, or has other rows): capture again"
                    )
                table = reader.read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: capture again") from None
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise CacheError(f"{path} is damaged ({one_line(error)}): capture again") from None
    if not all(_lies_in(whole, column) for column in table.columns):
        raise CacheError(f"{path} is damaged (it is compressed): capture again")
    if any(column.null_count for column in table.columns):
        raise CacheError(f"{path} is damaged (it has nulls): capture again")
    if not _matches(table, plan):
        raise CacheError(f"{path} is damaged (its rows do not tile the shards of the plan): capture again")
    return table


def check_skipped(table: pa.Table, path: Path, skipped: Skipped) -> None:
    """Check that skipped samples are those of the index.

    Args:
        path: the manifest that lists them.

    Raises:
        CacheError: a source, row or length of theirs is another one.
    """
    if skipped.differs_from(table):
        raise CacheError(
            f"{path} is damaged (its skipped samples differ from those of the index): restore it, or remove "
            "the cache and capture again"
        )


def sample_ids(table: pa.Table) -> np.ndarray:
    """Return the index's sample ids as `[n, 16]` uint8, a view."""
    column = table["sample_id"].combine_chunks()
    return np.frombuffer(column.buffers()[1], dtype=np.uint8).reshape(-1, 16)[: len(column)]


def _is_plain(data: memoryview, num_samples: int) -> bool:
    """Return whether an Arrow file's record batches have `num_samples` rows and none is compressed.

    This reads the flatbuffers of the metadata, because pyarrow tells of compression only by unpacking. Its
    own `count_rows` (pyarrow 26) is not enough: metadata may claim the right rows over a buffer that unpacks
    to gigabytes. Fields are numbered as in Arrow's File.fbs and Message.fbs.
    """
    (size,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = data[len(data) - 10 - size : len(data) - 10]
    root = _follow(footer, 0)
    dictionaries, blocks = _field(footer, root, 2), _field(footer, root, 3)
    if dictionaries and struct.unpack_from("<I", footer, _follow(footer, dictionaries))[0]:
        return False
    rows, start = 0, _follow(footer, blocks) if blocks else 0
    for i in range(struct.unpack_from("<I", footer, start)[0] if blocks else 0):
        offset, size = struct.unpack_from("<qi", footer, start + 4 + 24 * i)
        prefix = 8 if data[offset : offset + 4] == b"\xff\xff\xff\xff" else 4  # 4 before Arrow 0.15
        message = data[offset + prefix : offset + size]
        root = _follow(message, 0)
        header, custom = _field(message, root, 2), _field(message, root, 4)
        batch = _follow(message, header)
        length, compression = _field(message, batch, 0), _field(message, batch, 3)
        if custom or compression:  # before Arrow 1.0, custom metadata marked compression
            return False
        rows += struct.unpack_from("<q", message, length)[0] if length else 0
    return rows == num_samples


def _follow(data: memoryview, position: int) -> int:
    """Return the position that a flatbuffer's reference points to."""
    return position + struct.unpack_from("<I", data, position)[0]


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the position of a field of a flatbuffer's table; 0 if it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", data, vtable + entry) if entry < size else (0,)
    return table + offset if offset else 0


def _lies_in(whole: pa.Buffer, column: pa.ChunkedArray) -> bool:
    """Return whether a column's buffers lie inside the mapped file."""
    buffers = [buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None]
    end = whole.address + whole.size
    return all(whole.address <= b.address and b.address + b.size <= end for b in buffers if b.size)


def _matches(table: pa.Table, plan: Plan) -> bool:
    """Return whether the samples tile every shard of the plan: in order, without gap or overlap."""
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
        sums = np.add.reduceat(sizes, first) if len(first) else np.zeros(0, dtype=np.int64)
        return np.array_equal(starts, sample_starts(sizes, samples)) and np.array_equal(sums, totals)

    if not len(plan):
        return True
    if plan.rows:
        shared = table["shared"].to_numpy().astype(np.int64)
        before = np.concatenate([[0], length[:-1]])  # a sample has no more of the one before than it has
        before[first] = 0
        if (shared < 0).any() or (shared >= length).any() or (shared > before).any():
            return False
        if not np.array_equal(np.add.reduceat(length - shared, first), plan.rows):
            return False
    return tiles(start, length, plan.tokens) and tiles(last_start, last_rows, plan.last_rows)
