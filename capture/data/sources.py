"""Sources of rows: local files, folders, standard input, folders saved by `datasets`, and Hub datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from capture.console import note
from capture.data.folders import find_data, is_saved_dataset
from capture.data.readers import (
    LINE_SUFFIXES,
    RawRow,
    accepted_types,
    plain_suffix,
    read_file,
    suffix_of,
)
from capture.data.stdin import STDIN, spool_stdin
from pipeline import files
from pipeline.chat.messages import without_nulls
from pipeline.chat.rows import BadRowError, detect_form, parse_line
from pipeline.errors import DataError, UsageError
from pipeline.text import one_line, reason

# Skipped files of a folder that are named.
_NAMED = 8


@dataclass(frozen=True)
class Source:
    """A file or dataset with rows."""

    name: str
    """Name in the manifest: a file's name without its directory or below the folder given, or a Hub id."""
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
    is_file: bool = True
    """False for a dataset, which has splits."""

    def at(self, number: int) -> str:
        """Return a row's place for people: `file:line`, or `place row N`, counted from 1."""
        return f"{self.place}:{number + 1}" if self.counts_lines else f"{self.place} row {number + 1}"


def form_of(source: Source) -> str | None:
    """Return the form of the first row that has a known one; rows of another form will be bad rows.

    None if no row has a known one: every row will be a bad row that names the known forms.
    """
    for _, row in source.rows():
        with suppress(BadRowError):
            form = detect_form(parse_line(row) if isinstance(row, bytes) else row)
            if form:
                return form
    return None


def open_sources(
    specs: list[str] | tuple[str, ...], *, split: str | None = None, subset: str | None = None
) -> list[Source]:
    """Find and fingerprint every source, in the order given.

    Args:
        specs: data files, folders of data files, folders saved by `datasets`, Hub ids, or `-`.
        split: of a Hub dataset or a saved DatasetDict.
        subset: of a Hub dataset.

    Raises:
        DataError: no such file, dataset or split, or a file of an unknown type.
        UsageError: a split or subset, but no dataset; or standard input that can't be read.
    """
    sources: list[Source] = []
    datasets_seen = False
    if specs.count(STDIN) > 1:
        raise UsageError(f"--data {STDIN} is given {specs.count(STDIN)} times, but can be read only once")
    for spec in specs:
        if not spec.strip():
            raise UsageError("--data is empty: name a file, a folder or a dataset")
        path = Path(spec)
        if spec == STDIN:
            sources.append(_stdin_source())
        elif path.is_file():
            sources.append(_file_source(path, path.name))
        elif path.is_dir() and not is_saved_dataset(path):
            found = _folder_sources(path, split, subset)
            datasets_seen |= any(not source.is_file for source in found)
            sources += found
        else:
            sources.append(_dataset_source(spec, split, subset))
            datasets_seen = True
    if (split or subset) and not datasets_seen:
        raise UsageError("--split and --subset need a dataset, but --data names only files: drop them")
    return sources


def _stdin_source() -> Source:
    path = spool_stdin()
    source = _file_source(path, "stdin")

    def rows() -> Iterator[tuple[int, RawRow]]:
        try:
            yield from source.rows()
        except DataError as error:  # the temporary file's name says nothing to anybody
            why = str(error).replace(str(path), "stdin")
            raise DataError(f"{why}; only plain JSONL or JSON is read from standard input") from None

    return replace(source, place="stdin", rows=rows)


def _file_source(path: Path, name: str) -> Source:
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path}: unknown type of data file; expected one of {accepted_types()}")

    def state() -> tuple[int, int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino

    try:
        before = state()
        digest = files.sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} can't be read ({reason(error)})") from None
    return Source(
        name=label(name),
        place=str(path),
        fingerprint=f"{suffix}:{digest}",
        rows=lambda: read_file(path, suffix),
        counts_lines=plain_suffix(suffix) in LINE_SUFFIXES,
        unchanged=lambda: state() == before,
    )


def label(name: str) -> str:
    """Return a source's name for the manifest, which refuses what looks like an absolute path."""
    name = os.fsencode(name).decode("utf-8", "replace")
    return f"./{name}" if name.startswith(("/", "\\", "~")) or name[1:2] == ":" else name


def _folder_sources(folder: Path, split: str | None, subset: str | None) -> list[Source]:
    """Open every data file in a folder and below it, and every dataset saved below it, in sorted order."""
    found, skipped = find_data(folder)
    names = ", ".join(skipped[:_NAMED]) + (", ..." if len(skipped) > _NAMED else "")
    if not found:
        raise DataError(
            f"no data file in the folder {folder} or below it: expected {accepted_types()}, or a saved "
            f"dataset; found {names or 'nothing'}"
        )
    if skipped:
        note(f"data {folder}: skipped {len(skipped):,} that are no data: {names}")
    sources = []
    for path in found:
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            sources.append(replace(_dataset_source(str(path), split, subset), name=label(name)))
        else:
            sources.append(_file_source(path, name))
    return sources


def _dataset_source(spec: str, split: str | None, subset: str | None) -> Source:
    """Open a folder saved by `datasets`, or a Hub dataset."""
    path = Path(spec)
    if not path.is_dir() and (suffix_of(path) or spec.count("/") > 1 or spec[:1] in "/.~"):
        raise DataError(
            f"no data file at {spec}: expected {accepted_types()}, a folder of them, a folder saved by "
            "datasets, a Hub dataset id, or - for standard input"
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
        is_file=False,
    )


def _choose_split(spec: str, split: str | None, splits: list[str]) -> str:
    chosen = split or (splits[0] if len(splits) == 1 else "train")
    if chosen not in splits:
        raise DataError(f"{spec} has the splits {', '.join(splits)}, not {chosen}: choose one with --split")
    return chosen
