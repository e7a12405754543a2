"""Tokenise every row of the data once, in parallel, and keep the result on disk.

The result is an Arrow file named by a hash of everything that decides it (the data's content, tokenizer,
template, options), so that planning, previewing and capturing the same data tokenise it once. Every row is
counted as captured or dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from capture.data import conversations, readers, sources, turns
from capture.data.conversations import DroppedRowError, RowTokenizer, TokenizedSample
from capture.data.sources import RawRow, Source, form_of
from capture.data.token_cache import make_writable, token_cache
from pipeline import files
from pipeline.cache.index import SampleFacts, count_candidates, sample_id
from pipeline.cache.rows import last_hidden_rows
from pipeline.chat import messages, rows, template
from pipeline.chat.rows import BadRowError, Conversation
from pipeline.errors import DataError
from pipeline.text import one_line

# Modules that decide tokens and masks; a change to one of them invalidates kept tokens.
_CODE = (conversations, messages, readers, rows, sources, template, turns)
DUPLICATE = "a duplicate"
BEYOND = "beyond --num-samples"
# Rows per task of a worker.
CHUNK_ROWS = 64
# Rows that are tokenised in this process before workers are started.
FEW_ROWS = 2048
MAX_PROBLEMS = 5

_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int32()),
        pa.field("source_row", pa.int64()),
        pa.field("dropped", pa.string()),  # the reason, or "" for a sample
        pa.field("problem", pa.string()),  # the full message of a bad row, or ""
        pa.field("sample_id", pa.binary(16)),
        pa.field("last_rows", pa.int32()),
        pa.field("candidates", pa.int32()),
        pa.field("masked", pa.int32()),  # answers that the row itself leaves out of the loss
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.uint8())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selection of samples among the valid rows."""

    min_supervised: int = 0
    """Minimum supervised tokens per sample."""
    num_samples: int | None = None
    """Maximum number of samples: the first ones, or the first ones after shuffling."""
    shuffle: bool = False
    seed: int = 0
    form: str | None = None
    """Form of every source's rows, a name in `pipeline.chat.rows.FORMS`; None: its first row's."""
    bad_rows: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class TokenizedData:
    """Samples, memory-mapped, and the counts of rows. `data[i]` is sample i."""

    facts: SampleFacts
    """Of the samples, in the order of the data, or shuffled."""
    rows: Counter[str] = field(default_factory=Counter)
    """Rows read, captured, and dropped by reason: read = captured + all dropped."""
    forms: list[str | None] = field(default_factory=list)
    """Form of each source's rows, names in `pipeline.chat.rows.FORMS`; None if no row has a known one."""
    problems: list[str] = field(default_factory=list)
    """Messages of the first bad rows, each with its place."""
    masked: int = 0
    """Answers of the samples that the data's own keys leave out of the loss."""
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    _table: Any = field(default=None, repr=False)
    _path: Path = field(default=Path(), repr=False)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, i: int) -> TokenizedSample:
        row = int(self._order[i])
        # Copies: torch tensors must be writable, and the memory map is not.
        ids, mask = (self._table[name][row].values.to_numpy().copy() for name in ("input_ids", "loss_mask"))
        sample = TokenizedSample(int(self.facts.source_rows[i]), ids, mask)
        if sample.sample_id != self.facts.sample_ids[i].tobytes():
            self._path.unlink(missing_ok=True)
            raise DataError(
                f"{self._path} was damaged and is removed: run this again to tokenise the data again"
            )
        return sample


def load_data(
    sources: Sequence[Source],
    tokenize: RowTokenizer,
    tokenizer_sha256: str,
    selection: Selection | None = None,
    *,
    workers: int | None = None,
) -> TokenizedData:
    """Tokenise all rows of all sources, or reuse the result of an earlier call.

    Args:
        tokenizer_sha256: hash of the tokenizer that `tokenize` holds.
        selection: samples to select, and whether a bad row is an error.
        workers: processes. None: one per core, 16 at most. They are started only after `FEW_ROWS` rows.

    Raises:
        DataError: a bad row (unless they are skipped), or no usable row at all.
    """
    selection = selection or Selection()
    path = token_cache() / f"{_key(sources, tokenize, tokenizer_sha256, selection)}.arrow"
    forms = [selection.form or form_of(source) for source in sources]
    files.remove_partials(path.parent)  # those of killed processes can be large
    table = _open(path)
    if table is None:
        make_writable(path.parent)
        with _only_one(path.with_suffix(".lock")):
            table = _open(path)  # another process may have written it during the wait
            if table is None:
                records = _select(_records(sources, forms, tokenize, selection, workers), selection)
                files.publish(path, lambda partial: _write(partial, records, sources))
                table = _open(path)
    assert table is not None
    data = _arrange(table, path, selection, sources, forms)
    if not len(data):
        places = ", ".join(source.place for source in sources)
        why = "".join(f"; {n:,} {reason}" for reason, n in sorted(data.rows.items()) if reason[:4] == "drop")
        raise DataError(
            f"{places}: no row has an assistant turn to train on ({data.rows['read']:,} rows read{why})"
        )
    return data


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Let one process in at a time: the processes of a capture need the same tokens at the same moment.

    The kernel releases the lock when its owner dies. On a file system without locks, all processes go in and
    each does the same work.
    """
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path) -> TextIO:
    """Return the lock file, locked. Its last owner removed its own, which another may have waited for."""
    while True:
        file = path.open("w")
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _key(
    sources: Sequence[Source], tokenize: RowTokenizer, tokenizer_sha256: str, selection: Selection
) -> str:
    """Return the hash of everything that decides the file's content."""
    chat = tokenize.template
    settings = {name: value for name, value in vars(tokenize).items() if name != "template"}
    # A shuffled selection is made from all rows, after they are tokenised.
    limit = None if selection.shuffle else selection.num_samples
    what = [
        [files.sha256_file(Path(module.__file__)) for module in _CODE],
        version("transformers"),
        version("tokenizers"),
        [source.fingerprint for source in sources],
        tokenizer_sha256,
        [str(chat.own), chat.arguments, chat.today if chat.prints_the_date else None],
        {name: str(token) for name, token in chat.tokenizer.special_tokens_map.items()},
        settings,
        [selection.min_supervised, limit, selection.form, selection.bad_rows],
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _open(path: Path) -> pa.Table | None:
    """Return the table kept at `path`, memory-mapped; None if there is none, or it is damaged."""
    try:
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if table.schema.equals(_SCHEMA) else None


def _write(path: Path, records: Iterator[dict[str, Any]], sources: Sequence[Source]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while batch := list(itertools.islice(records, 1024)):
            columns = [pa.array([record[f.name] for record in batch], type=f.type) for f in _SCHEMA]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    for source in sources:  # the file's name holds the hash of the content that was read
        if not source.unchanged():
            raise DataError(f"{source.place} changed while it was read: run this again")


def _arrange(
    table: pa.Table, path: Path, selection: Selection, sources: Sequence[Source], forms: list[str | None]
) -> TokenizedData:
    reasons = pc.value_counts(table["dropped"]).to_pylist()
    counts = Counter({f"dropped: {r['values']}": r["counts"] for r in reasons if r["values"]})
    counts["read"] = len(table)
    order = np.flatnonzero(pc.equal(table["dropped"], "").to_numpy())
    if selection.shuffle:
        order = np.random.default_rng(selection.seed).permutation(order)
        beyond = len(order[selection.num_samples :]) if selection.num_samples else 0
        if beyond:
            order = order[: selection.num_samples]
            counts[f"dropped: {BEYOND}"] += beyond
    counts["captured"] = len(order)
    names = pc.fill_null(table["sample_id"], bytes(16)).combine_chunks()
    facts = SampleFacts(
        sample_ids=np.frombuffer(names.buffers()[1] or b"", dtype=np.uint8).reshape(-1, 16),
        lengths=pc.list_value_length(table["input_ids"]).fill_null(0).to_numpy(),
        sources=table["source"].to_numpy(),
        source_rows=table["source_row"].to_numpy(),
        last_rows=table["last_rows"].fill_null(0).to_numpy(),
        candidates=table["candidates"].fill_null(0).to_numpy(),
    ).take(order)
    bad = table.filter(pc.not_equal(table["problem"], "")).slice(0, MAX_PROBLEMS).to_pylist()
    problems = [f"{sources[row['source']].at(row['source_row'])}: {row['problem']}" for row in bad]
    masked = int(pc.sum(table["masked"].take(pa.array(order))).as_py() or 0)
    return TokenizedData(facts, counts, forms, problems, masked, order, table, path)


def _select(records: Iterator[dict[str, Any]], selection: Selection) -> Iterator[dict[str, Any]]:
    """Mark the samples that the selection drops, and stop when there are enough."""
    seen: set[bytes] = set()
    kept = 0
    for record in records:
        if not record["dropped"]:
            supervised = sum(record["loss_mask"].tolist())
            if record["sample_id"] in seen:
                record["dropped"] = DUPLICATE
            elif supervised < selection.min_supervised:
                record["dropped"] = f"fewer than {selection.min_supervised} supervised tokens"
            seen.add(record["sample_id"])
        kept += not record["dropped"]
        if record["dropped"]:
            record |= {"input_ids": None, "loss_mask": None}
        yield record
        if kept == selection.num_samples and not selection.shuffle:
            return  # later rows are not read


def _records(
    sources: Sequence[Source],
    forms: Sequence[str | None],
    tokenize: RowTokenizer,
    selection: Selection,
    workers: int | None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per row, in order."""
    every = ((i, forms[i], number, row) for i, source in enumerate(sources) for number, row in source.rows())
    bar = tqdm(unit="row", desc="tokenise", mininterval=1.0)
    with bar:
        for chunk in _map(tokenize, _chunks(every), workers or min(_num_cores(), 16)):
            for record in chunk:
                if record["problem"] and selection.bad_rows == "fail":
                    place = sources[record["source"]].at(record["source_row"])
                    raise DataError(f"{place}: {record['problem']}")
                yield record
            bar.update(len(chunk))


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Row = tuple[int, str | None, int, RawRow]  # source, form, row number, row


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def _map(
    tokenize: RowTokenizer, chunks: Iterator[list[_Row]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Tokenise chunks in order: the first few in this process, the rest by workers with a bounded queue."""
    for chunk in itertools.islice(chunks, FEW_ROWS // CHUNK_ROWS):
        yield _tokenize_chunk(tokenize, chunk)
    first = next(chunks, None)
    if first is None:
        return
    chunks = itertools.chain([first], chunks)
    if workers == 1:
        for chunk in chunks:
            yield _tokenize_chunk(tokenize, chunk)
        return
    # Spawned processes: a fork would copy the tokenizer's threads in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenize,))
    try:
        ahead = deque(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 4 * workers))
        while ahead:
            yield ahead.popleft().result()
            for chunk in itertools.islice(chunks, 1):
                ahead.append(pool.submit(_work, chunk))
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died, perhaps out of memory: use fewer with --tokenize-workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenize: RowTokenizer | None = None


def _start_worker(tokenize: RowTokenizer) -> None:
    global _worker_tokenize
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenize = tokenize


def _end_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: list[_Row]) -> list[dict[str, Any]]:
    assert _worker_tokenize is not None
    return _tokenize_chunk(_worker_tokenize, chunk)


def _tokenize_chunk(tokenize: RowTokenizer, chunk: list[_Row]) -> list[dict[str, Any]]:
    records = []
    for source, form, number, row in chunk:
        record: dict[str, Any] = dict.fromkeys(_SCHEMA.names)
        record |= {"source": source, "source_row": number, "dropped": "", "problem": ""}
        try:
            content = tokenize.read(row, form)
            ids, mask = tokenize.sample(content)
            record["masked"] = len(content.masked) if isinstance(content, Conversation) else 0
            record |= {"input_ids": ids, "loss_mask": mask, "sample_id": sample_id(ids, mask)}
            record |= {"last_rows": len(last_hidden_rows(mask)), "candidates": count_candidates(mask)}
        except DroppedRowError as reason:
            record["dropped"] = str(reason)
        except BadRowError as problem:
            record |= {"dropped": f"bad row, {problem.kind}", "problem": str(problem)}
        except MemoryError:
            raise
        except Exception as error:  # whatever one row does, the others go on; the place names it
            why = f"this row can't be read ({type(error).__name__}: {one_line(error)})"
            record |= {"dropped": "bad row, not readable", "problem": why}
        records.append(record)
    return records
