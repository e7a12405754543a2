"""Sources of rows: local files, folders saved by `datasets`, and Hub datasets.

To add a file type, write a function from a path to its rows and put it in `READERS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import files
from pipeline.chat.rows import detect_form
from pipeline.errors import DataError, UsageError
from pipeline.text import one_line

# A row as read: an unparsed line (so that workers share the parsing), or a dict.
RawRow = bytes | dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file or dataset with rows."""

    name: str
    """Name in the manifest: a file name without its directory, or a Hub id."""
    place: str
    """Name in messages: the path or id as given."""
    fingerprint: str
    """Hash of the content."""
    rows: Callable[[], Iterator[tuple[int, RawRow]]]
    """Yields row numbers from 0 and rows. Numbers in a line file count empty lines, which are not yielded."""
    counts_lines: bool = False
    """Row numbers are line numbers."""
    unchanged: Callable[[], bool] = lambda: True
    """Returns False if the content may differ from the fingerprint's."""

    def at(self, number: int) -> str:
        """Return a row's place for people: `file:line`, or `place row N`, counted from 1."""
        return f"{self.place}:{number + 1}" if self.counts_lines else f"{self.place} row {number + 1}"


def open_sources(
    specs: list[str] | tuple[str, ...], *, split: str | None = None, subset: str | None = None
) -> list[Source]:
    """Find and fingerprint every source, in the order given.

    Args:
        specs: data files, folders of data files, folders saved by `datasets`, or Hub ids.
        split: of a Hub dataset or a saved DatasetDict.
        subset: of a Hub dataset.

    Raises:
        DataError: no such file, dataset or split, or a file of an unknown type.
        UsageError: a split or subset, but no dataset.
    """
    sources: list[Source] = []
    datasets_seen = False
    for spec in specs:
        if not spec.strip():
            raise UsageError("--data is empty: name a file, a folder or a dataset")
        path = Path(spec)
        if path.is_file():
            sources.append(_file_source(path))
        elif path.is_dir() and not _is_saved_dataset(path):
            sources += _folder_sources(path)
        else:
            sources.append(_dataset_source(spec, split, subset))
            datasets_seen = True
    if (split or subset) and not datasets_seen:
        raise UsageError("--split and --subset need a dataset, but --data names only files: drop them")
    return sources


def _file_source(path: Path) -> Source:
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise DataError(f"{path}: unknown type of data file; expected one of {', '.join(READERS)}")

    def state() -> tuple[int, int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino

    before = state()
    return Source(
        name=path.name,
        place=str(path),
        fingerprint=f"{suffix}:{files.sha256_file(path)}",
        rows=lambda: reader(path),
        counts_lines=reader is read_lines,
        unchanged=lambda: state() == before,
    )


def _folder_sources(path: Path) -> list[Source]:
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and p.is_file())
    if not found:
        raise DataError(
            f"no data file in the folder {path}: expected {', '.join(READERS)} files, or a saved dataset"
        )
    return [_file_source(p) for p in found]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the non-empty lines of a JSONL file, unparsed."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                yield number, line


def read_json(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Yield the rows of a JSON file: a list of rows, an object with one such list, or JSONL."""
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        lines = list(read_lines(path))
        if len(lines) > 1 and _is_object(lines[0][1]):
            yield from lines
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
        yield number, row if isinstance(row, dict) else json.dumps(row).encode()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_parquet(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Yield the rows of a Parquet file, with one batch in memory at a time."""
    try:
        batches = pq.ParquetFile(path).iter_batches(batch_size=256)
        yield from _rows_of(batches)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({one_line(error)})") from None


def read_arrow(path: Path) -> Iterator[tuple[int, RawRow]]:
    """Yield the rows of an Arrow IPC file or stream, through the memory map."""
    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = iter(pa.ipc.open_stream(mapped))
            yield from _rows_of(batches)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Arrow ({one_line(error)})") from None


def _rows_of(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, RawRow]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield number, without_nulls(row)
            number += 1


def without_nulls(value: Any) -> Any:
    """Return a columnar row without null values.

    Columnar files give every row every key: a message without tool calls has `tool_calls: None`, which some
    chat templates render as tool calls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[int, RawRow]]]] = {
    ".jsonl": read_lines,
    ".ndjson": read_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _dataset_source(spec: str, split: str | None, subset: str | None) -> Source:
    """Open a folder saved by `datasets`, or a Hub dataset."""
    path = Path(spec)
    if not path.is_dir() and (path.suffix.lower() in READERS or spec.count("/") > 1 or spec[:1] in "/.~"):
        raise DataError(
            f"no data file at {spec}: expected {', '.join(READERS)}, a folder of them, a folder saved by "
            "datasets, or a Hub dataset id"
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            found = datasets.load_from_disk(spec)
            if isinstance(found, datasets.DatasetDict):
                found = found[_choose_split(spec, split, list(found))]
        else:
            found = datasets.load_dataset(spec, subset, split=split or "train")
    except DataError:
        raise
    except Exception as error:  # offline, gated, no such split, ...: the libraries raise many types
        raise DataError(f"no such data: {spec} is neither a file nor a dataset ({one_line(error)})") from None
    content = f"{found._fingerprint}:{len(found)}"
    return Source(
        name=path.name if path.is_dir() else "/".join(filter(None, (spec, subset, split))),
        place=spec,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        rows=lambda: ((number, without_nulls(row)) for number, row in enumerate(found)),
    )


def _choose_split(spec: str, split: str | None, splits: list[str]) -> str:
    chosen = split or (splits[0] if len(splits) == 1 else "train")
    if chosen not in splits:
        raise DataError(f"{spec} has the splits {', '.join(splits)}, not {chosen}: choose one with --split")
    return chosen
