"""Check every file of a cache against its manifest, and set those that are damaged aside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from pipeline import files, text
from pipeline.cache.codecs import get_codec
from pipeline.cache.index import count_candidates, open_index, sample_id, sample_ids
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    FROZEN,
    INDEX,
    MANIFEST,
    STATISTICS,
    FileRecord,
    Manifest,
    is_weights,
    read_manifest,
)
from pipeline.cache.shard import MAX_HEADER_BYTES, map_shard
from pipeline.cache.statistics import check_statistics_listed, read_statistics
from pipeline.errors import CacheError

FOLDERS = ("shards", "target")
# Where `set_aside` puts what is damaged; no reader looks there.
DAMAGED = "damaged"
# Hashing one file keeps one core busy, and more readers than these keep no disk busier.
MAX_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be."""

    file: str
    """Its name in the cache."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What checking a cache found."""

    problems: list[Problem]
    complete: bool
    files: int
    """How many were checked, the manifest aside."""
    bytes: int
    """What they hold, by the manifest or their records."""
    shards: int
    """Shards checked."""
    pending: int
    """Shards that are still to be captured."""


def default_threads() -> int:
    """As many as this process has cores, up to `MAX_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, cores)


def verify_cache(
    cache: Path,
    *,
    fast: bool = False,
    threads: int | None = None,
    begin: Callable[[int], object] = lambda total_bytes: None,
    progress: Callable[[int], object] = lambda done_bytes: None,
) -> Verified:
    """Check every file that is finished: size, hash and structure, and the samples' tokens against their ids.

    Args:
        fast: sizes, headers and the index only; no tensor is read.
        begin: called once with the bytes that will be checked.
        progress: called with the bytes checked since the last call, by one thread at a time.

    Raises:
        CacheError: the manifest itself is missing, damaged or of another version.
    """
    manifest = read_manifest(cache)
    for codec in (manifest.identity.features.context_codec, manifest.identity.features.last_codec):
        get_codec(codec)
    check_statistics_listed(cache, manifest)
    if manifest.status == "complete":
        records, shards = list(manifest.all_files()), len(manifest.plan)
    else:
        from pipeline.cache.progress.finished import finished_files  # which needs the writer, which few need

        finished = finished_files(cache, manifest)
        again = read_manifest(cache)
        if again.status == "complete":  # this very moment
            return verify_cache(cache, fast=fast, threads=threads, begin=begin, progress=progress)
        records, shards = finished.files(), len(finished.shards)
    begin(sum(record.bytes for record in records))
    problems, whole = _strangers(cache), _folder_problems(cache)
    with FileChecks(cache, manifest, fast=fast, threads=threads, progress=progress) as checks:
        index_problem, table = checks.index([r for r in records if r.file == INDEX])
        rest = [r for r in records if r.file != INDEX and r.file.partition("/")[0] not in whole]
        problems += checks.problems(rest, table)
    problems += [Problem(folder, reason) for folder, reason in whole.items()]
    if index_problem:
        problems.insert(0, index_problem)
    return Verified(
        problems=problems,
        complete=manifest.status == "complete",
        files=len(records),
        bytes=sum(record.bytes for record in records),
        shards=shards,
        pending=len(manifest.plan) - shards,
    )


class FileChecks:
    """Checks files of one cache by several threads. Use as a context manager.

    Args:
        threads: None is as many as there are cores, up to `MAX_THREADS`.
        progress: as for `verify_cache`.
    """

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        *,
        fast: bool = False,
        threads: int | None = None,
        progress: Callable[[int], object] = lambda done_bytes: None,
    ):
        self.cache, self.manifest, self.fast = cache, manifest, fast
        self._progress, self._lock, self._stop = progress, threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="verify")

    def __enter__(self) -> FileChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()  # where an error ends this, no thread hashes on
        self._pool.shutdown(cancel_futures=True)

    def problems(self, records: Iterable[FileRecord], table: pa.Table | None = None) -> list[Problem]:
        """What is wrong, a problem a file, in the order of `records`.

        Args:
            table: the index, to compare the tokens of its samples with their ids as well.
        """
        contents = None if table is None or self.fast else SampleChecks(self.manifest, table)
        found = self._pool.map(lambda record: self._problem(record, contents), records)
        return [problem for problem in found if problem]

    def index(self, records: list[FileRecord]) -> tuple[Problem | None, pa.Table | None]:
        """Check the index, by its record where there is one: what is wrong, or else the index itself."""
        path = self.cache / INDEX
        if not records and not os.path.lexists(path):
            return None, None  # an incomplete cache, whose capture will write it
        for record in records:
            if problem := self._problem(record, None):
                return problem, None
        if files.plain_size(path) < 0:
            return Problem(INDEX, _what_is_there(path)), None
        try:
            table = open_index(path, self.manifest.plan)
        except CacheError as error:
            return Problem(INDEX, _reason(error)), None
        if hashlib.sha256(sample_ids(table)).hexdigest() == self.manifest.identity.data.sha256:
            return None, table
        if records and not self.fast:  # the index is the one that the manifest lists
            return Problem(MANIFEST, f"identity.data.sha256 is not that of the sample ids in {INDEX}"), None
        return Problem(INDEX, "its sample ids are not those of the manifest's identity.data.sha256"), None

    def _problem(self, record: FileRecord, contents: SampleChecks | None) -> Problem | None:
        """Check one file. Everything that can be wrong with it is an answer, never an exception."""
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            counted += size
            with self._lock:
                self._progress(size)

        try:
            reason = self._check(record, contents, count)
        except CacheError as error:
            reason = _reason(error)
        except OSError as error:
            reason = f"it can't be read ({text.reason(error)})"
        if counted < record.bytes:
            count(record.bytes - counted)
        return Problem(record.file, reason) if reason else None

    def _check(
        self, record: FileRecord, contents: SampleChecks | None, count: Callable[[int], None]
    ) -> str | None:
        path = self.cache / record.file
        size = files.plain_size(path)
        if size < 0:
            return _what_is_there(path)
        if size != record.bytes:
            return f"size {size:,}, expected {record.bytes:,}"
        if not self.fast and self._hash(path, count) != record.sha256:
            return "its hash differs"
        if record.file == FROZEN:
            return self._frozen(path)
        if record.file == STATISTICS:
            read_statistics(self.cache, self.manifest.identity)
        if not record.file.startswith("shards/"):
            return None
        shard = int(Path(record.file).stem)
        _read_start(path)
        tensors = map_shard(path, shard_specs(self.manifest.identity, self.manifest.plan[shard])).tensors
        if contents is None:
            return None
        return contents.problem(shard, tensors["input_ids"].numpy(), tensors["loss_mask"].numpy())

    def _hash(self, path: Path, count: Callable[[int], None]) -> str:
        """The SHA-256 of a plain file; a link or a pipe is not opened."""
        digest, block = hashlib.sha256(), bytearray(files.BLOCK_BYTES)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while (got := file.readinto(block)) and not self._stop.is_set():
                digest.update(memoryview(block)[:got])
                count(got)
        return digest.hexdigest()

    def _frozen(self, path: Path) -> str | None:
        """What is wrong with the header of the frozen weights."""
        from safetensors import safe_open

        target = self.manifest.identity.target
        names = {"embed_tokens.weight"} | (set() if target.tied_embeddings else {"lm_head.weight"})
        shape = [target.vocab_size, target.hidden_size]
        _read_start(path)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                good = found.keys() == names and all(
                    piece.get_shape() == shape and piece.get_dtype().startswith(("F", "BF"))
                    for piece in found.values()
                )
        except Exception as error:  # the library's error type is not public
            return f"its header is damaged ({error})"
        return None if good else f"expected {sorted(names)} of shape {shape}"


class SampleChecks:
    """Compares the tokens in shards with the sample ids and counts of the index."""

    def __init__(self, manifest: Manifest, table: pa.Table):
        samples = np.array(manifest.plan.samples, dtype=np.int64)
        self._ends = np.cumsum(samples)
        self._first = self._ends - samples
        self._ids = sample_ids(table)
        self._start, self._length, self._labels, self._candidates = (
            table[name].to_numpy() for name in ("token_start", "length", "last_rows", "candidates")
        )

    def problem(self, shard: int, input_ids: np.ndarray, loss_mask: np.ndarray) -> str | None:
        """What is wrong with a shard's tokens `[T]` and mask `[T]`, if anything."""
        for i in range(int(self._first[shard]), int(self._ends[shard])):
            rows = slice(int(self._start[i]), int(self._start[i]) + int(self._length[i]))
            ids, mask = input_ids[rows], loss_mask[rows]
            if sample_id(ids, mask) != self._ids[i].tobytes():
                return f"the tokens of sample {i} are not those of its id"
            if (int(mask[1:].sum()), count_candidates(mask)) != (self._labels[i], self._candidates[i]):
                return f"the loss mask of sample {i} contradicts the index"
        return None


def _read_start(path: Path) -> None:
    """Read the header by a call that can fail: touching it through a map would end the process instead."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        file.read(min(length, MAX_HEADER_BYTES))


def _reason(error: CacheError) -> str:
    """What an error of the reader says is wrong, without the file's name and without advice."""
    found = re.search(r"is damaged \((.*)\)", str(error))
    return found[1] if found else str(error)


def _what_is_there(path: Path) -> str:
    """Words for what lies where a plain file should."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "missing"
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    kind = next((name for test, name in kinds if test(mode)), "something else")
    return f"{kind}, expected a plain file"


def _folder_problems(cache: Path) -> dict[str, str]:
    """Folders that are something else, with the reason; one that is missing is not among them."""
    found = {}
    for folder in FOLDERS:
        path = cache / folder
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            found[folder] = "a link, expected a folder" if path.is_symlink() else "expected a folder"
    return found


def _strangers(cache: Path) -> list[Problem]:
    """Weights in `target/` that a cache must not hold (rule 13), for which a reader refuses it."""
    folder = cache / "target"
    if folder.is_symlink() or not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    paths = [folder / name for name in names if f"target/{name}" != FROZEN]
    return [
        Problem(f"target/{path.name}", "it does not belong there, a cache holds no target")
        for path in paths
        if files.plain_size(path) >= 0
    ]


def set_aside(cache: Path, problems: Iterable[Problem]) -> list[str]:
    """Move damaged files to `cache/damaged/`, where nothing is ever overwritten; return the names moved.

    Links are moved themselves, never followed. The manifest stays: without it there is no cache.

    Raises:
        CacheError: `damaged` is no folder.
        OSError: a file can't be moved.
    """
    aside = cache / DAMAGED
    if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
        raise CacheError(f"{aside} is not a directory: remove it, damaged files are set aside there")
    moved = []
    for problem in problems:
        path = cache / problem.file
        if problem.file == MANIFEST or not os.path.lexists(path):
            continue
        folder = aside
        aside.mkdir(exist_ok=True)
        if "/" in problem.file:
            folder = _free(aside / path.parent.name, lambda p: p.is_dir() and not p.is_symlink())
            folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody else moved it this moment
            path.rename(_free(folder / path.name))
            moved.append(problem.file)
    return moved


def _free(path: Path, good: Callable[[Path], bool] = lambda path: False) -> Path:
    """`path`, or else `path.1`, `path.2` and so on: the first with nothing there, or something `good`."""
    number, candidate = 0, path
    while os.path.lexists(candidate) and not good(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
