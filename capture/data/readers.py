"""Readers of data files, by suffix: JSON lines, JSON, CSV, TSV, Parquet and Arrow.

To add a file type, write a function from a path to its rows and put it in `READERS`.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.chat.messages import without_nulls
from pipeline.chat.rows import FORMS, detect_form, distinct, has_form, needed_keys
from pipeline.errors import DataError
from pipeline.text import one_line

# A row as read: an unparsed line (so that workers share the parsing), or a dict.
RawRow = bytes | dict[str, Any]
Rows = Iterator[tuple[int, RawRow]]

# Suffixes of compressed text, and pyarrow's names of the codecs.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
# Characters of a CSV field. The csv module's own limit is 131,072, less than a long conversation.
_MAX_FIELD = 2**31 - 1


def suffix_of(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, such as `.jsonl` or `.jsonl.gz`; None if unknown."""
    name = path.name.lower()
    return next((suffix for suffix in accepted_suffixes() if name.endswith(suffix)), None)


def accepted_suffixes() -> list[str]:
    """Return every suffix that can be read, compressed ones last."""
    return [*READERS, *(suffix + ending for suffix in _TEXT for ending in COMPRESSIONS)]


def accepted_types() -> str:
    """Return the accepted suffixes in words."""
    return f"{', '.join(READERS)}; {', '.join(_TEXT)} also with {', '.join(COMPRESSIONS)}"


def read_file(path: Path, suffix: str) -> Rows:
    """Yield row numbers from 0 and the rows of a file.

    Raises:
        DataError: the file is not what its suffix says.
    """
    return READERS[plain_suffix(suffix)](path)


def plain_suffix(suffix: str) -> str:
    """Return a suffix without that of the compression."""
    return "." + suffix.split(".")[1]


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, decompressed by its suffix. Raises DataError if it is damaged or cut short."""
    codec = COMPRESSIONS.get(path.suffix.lower())
    try:
        if codec and not path.stat().st_size:
            raise OSError("it is empty")
        source = pa.input_stream(str(path), compression=codec) if codec else path.open("rb", buffering=0)
        with io.BufferedReader(source, 2**18) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        kind = f" as {codec}" if codec else ""
        raise DataError(f"{path}: not readable{kind} ({one_line(error)})") from None


def _skip_mark(file: io.BufferedReader, path: Path) -> None:
    """Read past UTF-8's byte order mark. Raises DataError if the text is UTF-16 or UTF-32."""
    start = file.peek(4)[:4]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise DataError(f"{path}: expected UTF-8, got UTF-16, UTF-32 or no text: convert it first")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def read_lines(path: Path) -> Rows:
    """Yield the non-empty lines of a JSONL file, unparsed."""
    with _opened(path) as file:
        _skip_mark(file, path)
        for number, line in enumerate(file):
            if line.strip():
                yield number, line


def read_json(path: Path) -> Rows:
    """Yield the rows of a JSON file: a list of rows, an object with one such list, or JSONL."""
    try:
        with _opened(path) as file:
            whole = json.loads(file.read(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        lines = list(itertools.islice(read_lines(path), 2))
        if len(lines) > 1 and _is_object(lines[0][1]):
            yield from read_lines(path)
            return
        raise DataError(
            f"{path}: not JSON ({error}); expected a list of rows, or one JSON object per line"
        ) from None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 and detect_form(whole) is None else [whole]
    if not isinstance(whole, list):
        raise DataError(f"{path}: expected a list of rows, got {type(whole).__name__}")
    for number, row in enumerate(whole):
        yield number, row if isinstance(row, dict) else _no_row(row)


def _no_row(value: Any) -> bytes:
    """Return a line that is refused as what the value is; a list's own items don't matter."""
    return json.dumps([] if isinstance(value, list) else value).encode()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# Columns whose cells hold JSON text: lists of messages, of tools, of token ids.
_JSON_COLUMNS = {"messages", "conversations", "conversation", "tools", "chosen", "rejected", "history"}
_JSON_COLUMNS |= {"input_ids", "loss_mask", "labels", "attention_mask", "position_ids"}


def read_csv(path: Path) -> Rows:
    """Yield the rows of a CSV file (or TSV, by the suffix) with a header. Empty cells count as absent.

    Row numbers count the records after the header, which may span lines. A record with another number of
    cells than the header has no column of a known form, so it is a bad row.
    """
    delimiter = "\t" if plain_suffix(suffix_of(path) or "") == ".tsv" else ","
    csv.field_size_limit(_MAX_FIELD)
    with _opened(path) as file:
        _skip_mark(file, path)
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        records = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = _header([name.strip() for name in next(records, [])], path)
            for number, cells in enumerate(record for record in records if record):
                yield number, _record(header, cells)
        except (csv.Error, UnicodeDecodeError) as error:
            line = records.line_num
            raise DataError(
                f"{path}: not readable as {delimiter!r}-separated text near line {line} ({error})"
            ) from None


def _header(names: list[str], path: Path) -> list[str]:
    """Return a header. Raises DataError if its columns are no known form's, or two have one name."""
    columns = dict.fromkeys(names, "")
    if len(columns) == len(names) and any(has_form(columns, form) for form in FORMS):
        return names
    raise DataError(
        f"{path}: expected a first line that names the columns of a known form "
        f"({'; '.join(map(needed_keys, FORMS))}), each once; got: {', '.join(names)[:200] or 'none'}"
    )


def _record(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        return {f"none ({len(cells)} cells under a header of {len(header)})": True}  # for the message
    return {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell}


def _cell(name: str, cell: str) -> Any:
    if name in _JSON_COLUMNS:
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def read_parquet(path: Path) -> Rows:
    """Yield the rows of a Parquet file, with one batch in memory at a time."""
    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        yield from _rows_of(batches, path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({one_line(error)})") from None


def read_arrow(path: Path) -> Rows:
    """Yield the rows of an Arrow IPC file or stream, through the memory map."""
    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = iter(pa.ipc.open_stream(mapped))
            yield from _rows_of(batches, path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Arrow ({one_line(error)})") from None


def _rows_of(batches: Iterator[pa.RecordBatch], path: Path) -> Rows:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise DataError(f"{path}: expected each column once, got: {', '.join(names)[:200]}")
        for row in batch.to_pylist():
            yield number, without_nulls(row)
            number += 1


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
# Those whose row numbers are line numbers.
LINE_SUFFIXES = (".jsonl", ".ndjson")
# Those whose files may be compressed as a whole; Parquet and Arrow compress their columns themselves.
_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
