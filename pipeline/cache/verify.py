"""Check every file of a cache against its manifest, and set damaged ones aside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from pipeline import files, text
from pipeline.cache.codecs import get_codec
from pipeline.cache.contents import SampleChecks
from pipeline.cache.frozen import frozen_names
from pipeline.cache.index import open_index, sample_ids
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
from pipeline.cache.prompts import held_plan
from pipeline.cache.shard import MAX_HEADER_BYTES, map_shard, tensor_hashes
from pipeline.cache.skipped import ByReason
from pipeline.cache.statistics import check_statistics_listed, read_statistics
from pipeline.errors import CacheError

FOLDERS = ("shards", "target")
# Folder for damaged files, see `set_aside`. No reader opens it.
DAMAGED = "damaged"
# Hashing a file keeps one core busy, and more threads than these read no disk faster.
MAX_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """A damaged or missing file."""

    file: str
    """Name, relative to the cache."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of checking a cache."""

    problems: list[Problem]
    complete: bool
    files: int
    """Number of files checked, without the manifest."""
    bytes: int
    """Their size by the manifest or their records."""
    shards: int
    """Number of shards checked."""
    pending: int
    """Number of shards still to be captured."""
    hidden: str
    """Tokens whose last hidden states the cache holds, as its identity names them."""


def default_threads() -> int:
    """Return the number of this process's cores, at most `MAX_THREADS`."""
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
    """Check every finished file: size, hash and structure, and the samples' tokens against their ids.

    Args:
        fast: check sizes, headers and the index only; read no tensor.
        begin: called once with the number of bytes to check.
        progress: called with the bytes checked since the last call, by one thread at a time.

    Raises:
        CacheError: the manifest itself is missing, damaged or of another version.
    """
    manifest = read_manifest(cache)
    for codec in manifest.identity.features.codecs:
        get_codec(codec)
    check_statistics_listed(cache, manifest)
    skipped = None
    if manifest.status == "complete":
        records, shards = list(manifest.all_files()), len(manifest.plan)
    else:
        from pipeline.cache.progress.finished import finished_files  # of incomplete caches only

        finished = finished_files(cache, manifest)
        again = read_manifest(cache)
        if again.status == "complete":  # another process has just finished it
            return verify_cache(cache, fast=fast, threads=threads, begin=begin, progress=progress)
        records, shards = finished.files(), len(finished.shards)
        skipped = {shard: record.skipped for shard, record in finished.shards.items() if record.skipped}
    begin(sum(record.bytes for record in records))
    problems, whole = _strangers(cache), _folder_problems(cache)
    with FileChecks(
        cache, manifest, fast=fast, threads=threads, progress=progress, skipped=skipped
    ) as checks:
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
        hidden=manifest.identity.features.hidden,
    )


class FileChecks:
    """Checks files of one cache with several threads. Use as a context manager.

    Args:
        threads: None for `default_threads()`.
        fast, progress: as for `verify_cache`.
        skipped: skipped samples of finished shards; None takes those of the manifest.
    """

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        *,
        fast: bool = False,
        threads: int | None = None,
        progress: Callable[[int], object] = lambda done_bytes: None,
        skipped: Mapping[int, ByReason] | None = None,
    ):
        self.cache, self.manifest, self.fast = cache, manifest, fast
        self._skipped = manifest.skipped.by_shard(manifest.plan.samples) if skipped is None else skipped
        self._progress, self._lock, self._stop = progress, threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="verify")

    def __enter__(self) -> FileChecks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()  # after an error, no thread continues to hash
        self._pool.shutdown(cancel_futures=True)

    def problems(self, records: Iterable[FileRecord], table: pa.Table | None = None) -> list[Problem]:
        """Return the problems of these files, at most one per file, in the order of `records`.

        Args:
            table: the index, to compare the samples' tokens with their ids too.
        """
        contents = None if table is None or self.fast else SampleChecks(self.manifest, table, self._skipped)
        found = self._pool.map(lambda record: self._problem(record, contents), records)
        return [problem for problem in found if problem]

    def index(self, records: list[FileRecord]) -> tuple[Problem | None, pa.Table | None]:
        """Check the index, by its record if it has one; return its problem, or the index itself."""
        path = self.cache / INDEX
        if self.manifest.identity.data.of_prompts or not (records or os.path.lexists(path)):
            return None, None  # of an incomplete cache: its capture will write it
        for record in records:
            if problem := self._problem(record, None):
                return problem, None
        if files.plain_size(path) < 0:
            return Problem(INDEX, _found_instead(path)), None
        try:
            table = open_index(path, self.manifest.plan)
        except CacheError as error:
            return Problem(INDEX, _reason(error)), None
        if hashlib.sha256(sample_ids(table)).hexdigest() == self.manifest.identity.data.sha256:
            if self.manifest.skipped.differs_from(table):
                return Problem(MANIFEST, f"its skipped samples differ from those of {INDEX}"), None
            return None, table
        if records and not self.fast:  # the index is the one that the manifest lists
            return Problem(MANIFEST, f"identity.data.sha256 differs from the sample ids in {INDEX}"), None
        return Problem(INDEX, "its sample ids differ from the manifest's identity.data.sha256"), None

    def _problem(self, record: FileRecord, contents: SampleChecks | None) -> Problem | None:
        """Check one file. Every fault of it is returned, none is raised."""
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
            return _found_instead(path)
        if size != record.bytes:
            return f"expected {record.bytes:,} bytes, got {size:,}"
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
        held = held_plan(path, self.manifest.identity, self.manifest.plan[shard])
        tensors = map_shard(path, shard_specs(self.manifest.identity, held)).tensors
        listed = self.manifest.tensors
        if listed and not self.fast and tensor_hashes(tensors) != {n: c[shard] for n, c in listed.items()}:
            return f"the hashes of its tensors in {MANIFEST} are of other bytes"
        if contents is None:
            return None
        problem = contents.problem(shard, tensors["input_ids"].numpy(), tensors["loss_mask"].numpy())
        return problem or contents.not_blank(shard, tensors)

    def _hash(self, path: Path, count: Callable[[int], None]) -> str:
        """Return the SHA-256 of a plain file. Follows no link and waits for no pipe."""
        digest, block = hashlib.sha256(), bytearray(files.BLOCK_BYTES)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while (got := file.readinto(block)) and not self._stop.is_set():
                digest.update(memoryview(block)[:got])
                count(got)
        return digest.hexdigest()

    def _frozen(self, path: Path) -> str | None:
        """Return the problem with the header of the frozen weights, if any."""
        from safetensors import safe_open

        target = self.manifest.identity.target
        names = frozen_names(target)
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
            return f"its header is damaged ({text.one_line(error)})"
        return None if good else f"expected {sorted(names)} of shape {shape}"


def _read_start(path: Path) -> None:
    """Read the header with a call that can fail: a fault in a map would kill the process."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        file.read(min(length, MAX_HEADER_BYTES))


def _reason(error: CacheError) -> str:
    """Return the reason in an error of the reader, without the file's name and the remedy."""
    found = re.search(r"is damaged \((.*)\)", str(error))
    return found[1] if found else str(error)


def _found_instead(path: Path) -> str:
    """Return what is at `path` instead of a plain file."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "missing"
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    kind = next((name for test, name in kinds if test(mode)), "something else")
    return f"expected a plain file, got {kind}"


def _folder_problems(cache: Path) -> dict[str, str]:
    """Return folders that are something else, with the reason. A missing one is no problem by itself."""
    found = {}
    for folder in FOLDERS:
        path = cache / folder
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            found[folder] = f"expected a folder, got {'a link' if path.is_symlink() else 'something else'}"
    return found


def _strangers(cache: Path) -> list[Problem]:
    """Return weights in `target/`, which a cache must not hold (rule 13) and a reader refuses."""
    folder = cache / "target"
    if folder.is_symlink() or not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
    paths = [folder / name for name in names if f"target/{name}" != FROZEN]
    return [
        Problem(f"target/{path.name}", "it looks like weights of the target, which a cache must not hold")
        for path in paths
        if files.plain_size(path) >= 0
    ]


def set_aside(cache: Path, problems: Iterable[Problem]) -> list[str]:
    """Move damaged files to `cache/damaged/`, where nothing is overwritten, and return their names.

    A link is moved itself and never followed. The manifest stays, because without it there is no cache.

    Raises:
        CacheError: `damaged` is not a folder.
        OSError: a file can't be moved.
    """
    aside = cache / DAMAGED
    if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
        raise CacheError(f"{aside} is not a directory but a link or a file: remove it, then repair again")
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
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it
            path.rename(_free(folder / path.name))
            moved.append(problem.file)
    return moved


def _free(path: Path, good: Callable[[Path], bool] = lambda path: False) -> Path:
    """Return the first of `path`, `path.1`, `path.2`, ... that does not exist or is `good`."""
    number, candidate = 0, path
    while os.path.lexists(candidate) and not good(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
