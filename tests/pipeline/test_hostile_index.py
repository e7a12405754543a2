"""Rules 10 and 11: indexes that lie."""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import CacheError
from tests.pipeline.handmade import SCHEMA, HandCache, arrow_file
from tests.pipeline.hostile import Bend, assert_refuses
from tests.pipeline.written import read_all

pytestmark = pytest.mark.usefixtures("bounded_memory")


def column(name: str, values: list) -> Bend:
    return lambda cache: cache.columns.__setitem__(name, values)


def columns(**values: list) -> Bend:
    return lambda cache: cache.columns.update(values)


def index(edit: Callable[[pa.Table], bytes]) -> Bend:
    return lambda cache: setattr(cache, "edit_index", edit)


def retyped(name: str, kind: pa.DataType) -> Bend:
    def edit(table: pa.Table) -> bytes:
        at = table.schema.get_field_index(name)
        return arrow_file(table.set_column(at, pa.field(name, kind, nullable=False), table[name].cast(kind)))

    return index(edit)


def with_nulls(name: str) -> Bend:
    """The schema promises no nulls, the data has one all the same."""

    def edit(table: pa.Table) -> bytes:
        arrays = {key: table[key].combine_chunks() for key in table.schema.names}
        arrays[name] = pa.array([None, *table[name].to_pylist()[1:]], type=SCHEMA.field(name).type)
        return arrow_file(pa.Table.from_arrays(list(arrays.values()), schema=SCHEMA))

    return index(edit)


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def cut(share: float) -> Bend:
    def edit(table: pa.Table) -> bytes:
        data = arrow_file(table)
        return data[: int(len(data) * share)]

    return index(edit)


def lying_compressed(table: pa.Table) -> bytes:
    """A zstd buffer that claims to unpack to 2^60 bytes."""
    data = arrow_file(table, "zstd")
    start = data.index(struct.pack("<q", 48))  # the unpacked length before the buffer of three 16-byte ids
    return data[:start] + struct.pack("<q", 2**60) + data[start + 8 :]


def zeros(rows: int) -> pa.Table:
    """A table of nothing, which packs into next to nothing."""
    arrays = []
    for field in SCHEMA:
        data = pa.py_buffer(bytes(field.type.bit_width // 8 * rows))
        arrays.append(pa.Array.from_buffers(field.type, rows, [None, data]))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def bomb(rows: int, compression: str | None, before: bool = False) -> Bend:
    """Many more rows than the plan has, beside the right ones or without them."""

    def edit(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.ipc.new_file(sink, SCHEMA, options=options) as writer:
            for each in (table, zeros(rows)) if before else (zeros(rows),):
                writer.write_table(each)
        return sink.getvalue().to_pybytes()

    return index(edit)


def posing_bomb(table: pa.Table) -> bytes:
    """A compressed bomb whose metadata claims as many rows as the plan has."""
    cache, rows = HandCache(), 1_234_567
    bomb(rows, "zstd")(cache)
    data = cache.edit_index(table)
    claims = struct.pack("<q", rows)
    assert data.count(claims) == 1 + len(SCHEMA)  # the batch's and each column's
    return data.replace(claims, struct.pack("<q", len(table)))


def old_compression(table: pa.Table) -> bytes:
    """As Arrow 0.17 said that a batch is compressed: in the batch's own metadata."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        (batch,) = table.to_batches()
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    return sink.getvalue().to_pybytes()


def with_dictionary(table: pa.Table) -> bytes:
    """One column's values lie elsewhere in the file."""
    ids = pa.array([b"0" * 16] * 3, type=pa.binary(16)).dictionary_encode()
    return arrow_file(table.set_column(0, pa.field("sample_id", ids.type, nullable=False), ids))


INDEX_BENDS: dict[str, Bend] = {
    "overlapping token ranges": column("token_start", [0, 4, 0]),
    "a gap between token ranges": column("token_start", [0, 6, 0]),
    "a first sample that does not start at 0": column("token_start", [1, 6, 0]),
    "token range before the shard": column("token_start", [-5, 0, 0]),
    "token range beyond the shard": column("token_start", [0, 5, 2**40]),
    "two samples on one range": column("token_start", [0, 0, 0]),
    "length beyond the shard": column("length", [5, 5, 2]),
    "length negative": column("length", [-5, 14, 2]),
    "length huge": column("length", [5, 2**31 - 1, 2]),
    "length one": columns(length=[8, 1, 2], token_start=[0, 8, 0], last_rows=[4, 1, 1], last_start=[0, 4, 0]),
    "length zero": columns(length=[9, 0, 2], token_start=[0, 9, 0]),
    "lengths swapped": column("length", [4, 5, 2]),
    "overlapping label rows": column("last_start", [0, 2, 0]),
    "a gap between label rows": column("last_start", [0, 4, 0]),
    "label rows negative": column("last_rows", [-3, 8, 1]),
    "no label rows": columns(last_rows=[5, 0, 1], last_start=[0, 5, 0]),
    "as many label rows as tokens": columns(last_rows=[1, 4, 1], last_start=[0, 1, 0], candidates=[1, 1, 1]),
    "no candidates": column("candidates", [0, 1, 1]),
    "candidates negative": column("candidates", [2, -1, 1]),
    "more candidates than labels": column("candidates", [4, 1, 1]),
    "candidates that the mask contradicts": column("candidates", [3, 1, 1]),
    "a shard that is not there": column("shard", [0, 0, 2]),
    "a shard below zero": column("shard", [-1, 0, 1]),
    "shards decreasing": column("shard", [1, 0, 0]),
    "shards not as planned": column("shard", [0, 1, 1]),
    "source negative": column("source", [0, 0, -1]),
    "source row negative": column("source_row", [-1, 2, 3]),
    "an id that the sample's content does not have": column("sample_id", [bytes(16)] * 3),
    "a row too few": lambda c: [values.pop() for values in c.columns.values()] and None,
    "a row too many": lambda c: [values.append(values[-1]) for values in c.columns.values()] and None,
    "no rows": lambda c: [values.clear() for values in c.columns.values()] and None,
    "int64 for shard": retyped("shard", pa.int64()),
    "int32 for source_row": retyped("source_row", pa.int32()),
    "uint32 for length": retyped("length", pa.uint32()),
    "float64 for length": retyped("length", pa.float64()),
    "variable width ids": retyped("sample_id", pa.binary()),
    "nullable column": index(
        lambda t: arrow_file(t.cast(pa.schema([pa.field(f.name, f.type) for f in SCHEMA])))
    ),
    "null in a number": with_nulls("length"),
    "null in an id": with_nulls("sample_id"),
    "null where nothing else is looked at": with_nulls("source_row"),
    "column missing": index(lambda t: arrow_file(t.drop_columns(["source_row"]))),
    "column too many": index(lambda t: arrow_file(t.append_column("more", pa.array([1, 2, 3])))),
    "columns in another order": index(lambda t: arrow_file(t.select([*SCHEMA.names[1:], "sample_id"]))),
    "column renamed": index(lambda t: arrow_file(t.rename_columns(["id", *SCHEMA.names[1:]]))),
    "column twice": index(lambda t: arrow_file(t.append_column(SCHEMA.field("length"), t["length"]))),
    "Arrow's stream format": index(stream),
    "compressed with zstd": index(lambda t: arrow_file(t, "zstd")),
    "compressed with lz4": index(lambda t: arrow_file(t, "lz4")),
    "compressed, lying about its size": index(lying_compressed),
    "a compressed bomb": bomb(2**20, "zstd"),
    "a compressed bomb in lz4": bomb(2**20, "lz4"),
    "a compressed bomb after the right rows": bomb(2**20, "zstd", before=True),
    "a compressed bomb that claims the right rows": index(posing_bomb),
    "more rows after the right ones": bomb(3, None, before=True),
    "one compressed batch after the right rows": bomb(0, "zstd", before=True),
    "compressed in the way of old": index(old_compression),
    "a column by dictionary": index(with_dictionary),
    "cut in half": cut(0.5),
    "cut at the start": cut(0.05),
    "cut by a few bytes": cut(0.99),
    "empty": index(lambda t: b""),
    "not Arrow": index(lambda t: b"not an index at all" * 50),
    "zeros": index(lambda t: bytes(2000)),
    "a footer length that lies": index(
        lambda t: arrow_file(t)[:-10] + struct.pack("<i", 2**31 - 1) + b"ARROW1"
    ),
}


@pytest.mark.parametrize("name", INDEX_BENDS)
def test_a_bent_index_is_refused(tmp_path, name):
    cache = HandCache()
    INDEX_BENDS[name](cache)
    assert_refuses(cache.save(tmp_path))


PEAK = """
import sys
from pathlib import Path
import pyarrow as pa
from pipeline.cache import CacheReader
from pipeline.errors import CacheError
for path in sys.argv[1:]:
    try:
        CacheReader(Path(path))
    except CacheError:
        print("refused")
print(pa.default_memory_pool().max_memory())
"""


def test_a_zip_bomb_of_an_index_is_not_unpacked(tmp_path):
    """54 MB of rows in a few kilobytes. Arrow counts what it allocates: next to nothing."""
    paths = []
    bends = (bomb(2**20, "zstd"), bomb(2**20, "zstd", before=True), index(posing_bomb))
    for number, bend in enumerate(bends):
        cache = HandCache()
        bend(cache)
        paths.append(cache.save(tmp_path / str(number)))
        assert (paths[-1] / "samples.arrow").stat().st_size < 20_000
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    *refused, peak = result.stdout.split()
    assert refused == ["refused"] * 3
    assert int(peak) < 100_000


def test_nothing_in_an_index_is_unpickled(tmp_path):
    """Arrow's extension types of Python were once pickles in a field's metadata, run when read."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    def edit(table: pa.Table) -> bytes:
        metadata = {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Payload()),
        }
        for name in ("length", "sample_id"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.field(at).with_metadata(metadata), table[name])
        return arrow_file(table.replace_schema_metadata({"pandas": "!!python/object"}))

    path = HandCache(edit_index=edit).save(tmp_path / "cache")
    with contextlib.suppress(CacheError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_all(path)
    assert not (tmp_path / "executed").exists()


OVERFLOW = """
import sys
from pathlib import Path
from pipeline.cache.index import open_index
from pipeline.cache.manifest import Plan
from pipeline.errors import CacheError
good = Plan(samples=(2, 1), tokens=(9, 2), last_rows=(5, 1))
assert len(open_index(Path(sys.argv[1]), good)) == 3
huge = (2**48,) * 2**16
bad = Plan(samples=good.samples + huge, tokens=good.tokens + huge, last_rows=good.last_rows + huge)
try:
    open_index(Path(sys.argv[1]), bad)
except CacheError as error:
    print("refused:", error)
"""


def test_plan_counts_that_overflow_64_bits_together_are_refused(tmp_path):
    """2^16 shards of 2^48 samples are 2^64, which is 0 in 64 bits: the index seems to have as many rows.

    In a process of its own: whoever repeats a row 2^48 times writes beyond the array and may not survive.
    """
    path = HandCache().save(tmp_path) / "samples.arrow"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", OVERFLOW, str(path)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-300:]
    assert result.stdout.startswith("refused:")
