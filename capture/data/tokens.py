"""Every row of the data, tokenised once: in parallel, kept on disk, each accounted for.

The result is an Arrow file named after everything that decides it (the data's content, tokenizer,
template, options), so that planning, previewing and capturing the same data tokenise it once.
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
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from capture.data import conversations, sources, turns
from capture.data.conversations import DroppedRowError, RowTokenizer, TokenizedSample
from capture.data.sources import RawRow, Source
from pipeline import files
from pipeline.cache.index import SampleFacts, count_candidates, last_hidden_rows, sample_id
from pipeline.chat import rows, template
from pipeline.chat.rows import FORMS, BadRowError, detect_form, parse_line
from pipeline.errors import DataError

# What decides tokens and masks; a change in it makes what was kept worthless.
_CODE = (conversations, rows, sources, template, turns)
DUPLICATE = "a duplicate"
BEYOND = "beyond --num-samples"
# Rows a worker takes at a time; and how many of the first rows it is not worth starting workers for.
CHUNK_ROWS, FEW_ROWS = 64, 2048
MAX_PROBLEMS = 5

_SCHEMA = pa.schema(
    [
        pa.field("source", pa.int32()),
        pa.field("source_row", pa.int64()),
        pa.field("dropped", pa.string()),  # why, or "" for a sample
        pa.field("problem", pa.string()),  # the whole story of a bad row, or ""
        pa.field("sample_id", pa.binary(16)),
        pa.field("last_rows", pa.int32()),
        pa.field("candidates", pa.int32()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.uint8())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which of the good rows are wanted."""

    min_supervised: int = 0
    """Supervised tokens a sample must have."""
    num_samples: int | None = None
    """How many samples at most; the first ones, or after shuffling."""
    shuffle: bool = False
    seed: int = 0
    form: str | None = None
    """What every source's rows hold, a name in `pipeline.chat.rows.FORMS`; None: what its first row holds."""
    bad_rows: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class TokenizedData:
    """Every usable sample, memory-mapped, and where every row went. `data[i]` is sample i."""

    facts: SampleFacts
    """In the order of the data, or shuffled."""
    rows: Counter[str] = field(default_factory=Counter)
    """Rows read, captured, and dropped by reason: read = captured + everything dropped."""
    forms: list[str] = field(default_factory=list)
    """What each source's rows hold, names in `pipeline.chat.rows.FORMS`."""
    problems: list[str] = field(default_factory=list)
    """The first bad rows, each with its place."""
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    _table: Any = field(default=None, repr=False)
    _path: Path = field(default=Path(), repr=False)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, i: int) -> TokenizedSample:
        row = int(self._order[i])
        # Copies: torch has no tensors that can't be written to, and the map can't.
        ids, mask = (self._table[name][row].values.to_numpy().copy() for name in ("input_ids", "loss_mask"))
        sample = TokenizedSample(int(self.facts.source_rows[i]), ids, mask)
        if sample.sample_id != self.facts.sample_ids[i].tobytes():
            self._path.unlink(missing_ok=True)
            raise DataError(f"{self._path} was damaged and is removed: run this again to tokenise anew")
        return sample


def token_cache() -> Path:
    """Where tokenised data is kept: $DSPARK_TOKENS, or dspark/tokens in the user's cache folder."""
    folder = os.environ.get("DSPARK_TOKENS")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark" / "tokens"


def load_data(
    sources: Sequence[Source],
    tokenize: RowTokenizer,
    tokenizer_sha256: str,
    selection: Selection | None = None,
    *,
    workers: int | None = None,
) -> TokenizedData:
    """Tokenise all rows of all sources, or reuse what an earlier call kept.

    Args:
        tokenizer_sha256: says which tokenizer `tokenize` holds.
        selection: which good rows are wanted, and whether a bad one is an error.
        workers: processes; by default one a core, and none for little data.

    Raises:
        DataError: a bad row (unless they are skipped), or no usable row at all.
    """
    selection = selection or Selection()
    path = token_cache() / f"{_key(sources, tokenize, tokenizer_sha256, selection)}.arrow"
    forms = [selection.form or _form_of(source) for source in sources]
    table = _open(path)
    if table is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_suffix(".lock")):
            table = _open(path)  # what another process did while this one waited
            if table is None:
                files.remove_partials(path.parent)
                records = _select(_records(sources, forms, tokenize, selection, workers), selection)
                files.publish(path, lambda partial: _write(partial, records, sources))
                table = _open(path)
    assert table is not None
    data = _arrange(table, path, selection, sources, forms)
    if not len(data):
        places = ", ".join(source.place for source in sources)
        why = "".join(f"; {n:,} {reason}" for reason, n in sorted(data.rows.items()) if reason[:4] == "drop")
        raise DataError(
            f"{places}: no row has an assistant turn to learn from ({data.rows['read']:,} rows read{why})"
        )
    return data


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Let one process in at a time: the workers of a capture need the same tokens at the same moment.

    The kernel gives the lock back when its owner dies. Where the file system knows no locks, all go in, and
    each does the same work.
    """
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _form_of(source: Source) -> str:
    """What the first row of a known form holds; rows that hold something else are bad ones."""
    for _, row in source.rows():
        with contextlib.suppress(BadRowError):
            form = detect_form(parse_line(row) if isinstance(row, bytes) else row)
            if form:
                return form
    return next(iter(FORMS))  # whatever is expected, every row will say what it is instead


def _key(
    sources: Sequence[Source], tokenize: RowTokenizer, tokenizer_sha256: str, selection: Selection
) -> str:
    """Names everything that decides the file's content."""
    chat = tokenize.template
    settings = {name: value for name, value in vars(tokenize).items() if name != "template"}
    # A shuffled choice is made over all rows, after they were tokenised.
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
    """The table kept at `path`, through the memory map; None when there is none, or none that is whole."""
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
    for source in sources:  # what is kept under the hash of one content must not come from another
        if not source.unchanged():
            raise DataError(f"{source.place} changed while it was read: run this again")


def _arrange(
    table: pa.Table, path: Path, selection: Selection, sources: Sequence[Source], forms: list[str]
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
    return TokenizedData(facts, counts, forms, problems, order, table, path)


def _select(records: Iterator[dict[str, Any]], selection: Selection) -> Iterator[dict[str, Any]]:
    """Mark the samples that are not wanted, and stop when there are enough."""
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
            return  # the rows behind are not even read


def _records(
    sources: Sequence[Source],
    forms: Sequence[str],
    tokenize: RowTokenizer,
    selection: Selection,
    workers: int | None,
) -> Iterator[dict[str, Any]]:
    """A record a row, in order."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Row = tuple[int, str, int, RawRow]  # source, form, row number, row


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


def _map(
    tokenize: RowTokenizer, chunks: Iterator[list[_Row]], workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Tokenise chunks in order: the first few here, the rest by workers a bounded distance ahead."""
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
    # Processes that start from nothing: a fork would copy the tokenizer's threads in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenize,))
    try:
        ahead = deque(pool.submit(_work, chunk) for chunk in itertools.islice(chunks, 4 * workers))
        while ahead:
            yield ahead.popleft().result()
            for chunk in itertools.islice(chunks, 1):
                ahead.append(pool.submit(_work, chunk))
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process died, for want of memory perhaps: try fewer with --tokenize-workers"
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
    """A worker of a killed process would wait for work for ever."""
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
            ids, mask = tokenize(row, form)
            record |= {"input_ids": ids, "loss_mask": mask, "sample_id": sample_id(ids, mask)}
            record |= {"last_rows": len(last_hidden_rows(mask)), "candidates": count_candidates(mask)}
        except DroppedRowError as reason:
            record["dropped"] = str(reason)
        except BadRowError as problem:
            record |= {"dropped": f"bad row, {problem.kind}", "problem": str(problem)}
        records.append(record)
    return records
