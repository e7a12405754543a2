"""Answers first, then states, for an engine that can't do both in one pass."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path

from capture.console import note
from capture.example import EXAMPLE_DATA
from capture.options import CaptureOptions, DataOptions, ReadingOptions
from capture.regenerate.dialogue import rows_hash
from capture.regenerate.huggingface import load_engine
from capture.regenerate.progress import progress_path
from capture.regenerate.reading import read_dialogues
from capture.regenerate.run import regenerate_file
from pipeline.cache.remote.local import staging_folder
from pipeline.errors import DataError, UsageError
from pipeline.files import publish_bytes
from pipeline.process import WorkerPlace
from pipeline.remote.address import Address, Place
from pipeline.remote.objects import MissingObjectError, Objects

_BATCH_SIZE = 64


def answers_path(cache: Place) -> Path:
    """Return the file of the answers: beside the cache, because the cache does not exist yet.

    That of a cache in an object store is kept there too, and worked on here.
    """
    near = staging_folder(cache) if isinstance(cache, Address) else cache
    return near.with_name(f"{near.name}.answers.jsonl")


def answer_first(options: CaptureOptions, place: WorkerPlace) -> CaptureOptions:
    """Let the target answer the data into a file, and return the options of a capture of that file.

    A finished file is used as it is; an interrupted one is continued.

    Raises:
        UsageError: several processes, which would answer the same rows; or a file of another target's, of
            other data's, or of otherwise sampled answers.
        DataError: rows that can't be answered.
    """
    if options.data.shuffle and options.data.num_samples is not None:
        raise UsageError(
            "--regenerate with --engine huggingface answers the first --num-samples rows, and --shuffle asks "
            "for others: drop one of them, or run `dspark regenerate` first and capture its file"
        )
    out, cache = answers_path(options.cache), options.cache
    if isinstance(cache, Address):
        _fetch(cache, out)
    _check_origin(options, out)
    if not out.exists() or progress_path(out).exists():
        if place.world > 1:
            raise UsageError(
                "--regenerate with --engine huggingface answers in one process: run `dspark regenerate` "
                "first, and capture its file with all of them"
            )
        note(f"--engine huggingface answers first, into {out}, and captures that file afterwards")
        _answer(options, out)
    if isinstance(cache, Address):
        _keep(cache, out)
    data = dataclasses.replace(options.data, data=(str(out),), split=None, subset=None, format="auto")
    answers = dataclasses.replace(options.answers, regenerate=False)
    return dataclasses.replace(options, data=data, answers=answers)


def _beside(cache: Address) -> tuple[Objects, str]:
    """Return the folder of a cache in an object store, and the cache's name in it. Raises UsageError."""
    folder, _, name = cache.url.rpartition("/")
    if folder.endswith("/"):
        raise UsageError(
            f"--regenerate with --engine huggingface keeps the answers beside the cache: expected a folder "
            f"in a bucket, got the bucket {cache}"
        )
    return Objects(Address(folder)), name


def _fetch(cache: Address, out: Path) -> None:
    """Fetch the finished answers of another machine, and what they are made of, unless they are here."""
    objects, name = _beside(cache)
    if out.exists() and not progress_path(out).exists():
        return
    paths = (out.with_suffix(".json"), out)
    with suppress(MissingObjectError):
        found = [objects.read(f"{name}.answers{path.suffix}") for path in paths]
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, data in zip(paths, found, strict=True):
            publish_bytes(path, data)
        progress_path(out).unlink(missing_ok=True)


def _keep(cache: Address, out: Path) -> None:
    """Keep finished answers beside the cache.

    Raises:
        UsageError: others are there, which another machine has finished first.
    """
    objects, name = _beside(cache)
    origin, kept = f"{name}.answers.json", f"{name}.answers.jsonl"
    same = objects.create(origin, out.with_suffix(".json").read_bytes())
    try:
        same = same and objects.read(kept) == out.read_bytes()
    except MissingObjectError:
        objects.write(kept, out)
    if not same:
        raise UsageError(
            f"{objects.url(kept)} has other answers than {out}, by another machine: remove the latter, and "
            "run the same command again, which takes the former"
        )


def _check_origin(options: CaptureOptions, out: Path) -> None:
    """Record what a file of answers is made of, or refuse one that is made of something else.

    Raises:
        UsageError: naming what differs.
    """
    reading, target = _reading(options.data), options.target
    asked = {
        "target": f"{target.target} {target.revision or ''} {target.adapter or ''}".strip(),
        "answers": options.answers.settings(),
        "data": json.dumps([dataclasses.asdict(reading), reading.template_arguments()], default=str),
    }
    path, cache = out.with_suffix(".json"), options.cache
    far = f", and {cache}.answers.json and {cache}.answers.jsonl" if isinstance(cache, Address) else ""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, json.dumps(asked).encode())
        return
    try:
        found = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        found = {}
    differing = [name for name, value in asked.items() if found.get(name) != value]
    if differing:
        raise UsageError(
            f"{out} has answers that were made otherwise ({', '.join(differing)} differ, see {path}): name "
            f"another --cache, or remove {out} and {path}{far}"
        )


def _answer(options: CaptureOptions, out: Path) -> None:
    reading = _reading(options.data)
    dialogues = read_dialogues(reading)
    sampling = options.answers.sampling
    arguments = reading.template_arguments()
    engine, identity = load_engine(
        options.target,
        sampling,
        batch_size=_BATCH_SIZE,
        template=reading.template_text(),
        template_arguments=arguments,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    run = {**identity, "data": rows_hash(dialogues), "template arguments": arguments}
    failures = regenerate_file(dialogues, engine, out, {**run, **dataclasses.asdict(sampling)})
    if failures:
        first = failures[0]
        raise DataError(
            f"{len(failures):,} of {len(dialogues):,} rows can't be answered, the first at "
            f"{first.dialogue.where}: {first.failure}"
        )


def _reading(options: DataOptions) -> ReadingOptions:
    """Return the part of the options that says what to read; the example's conversations by default."""
    names = [field.name for field in dataclasses.fields(ReadingOptions)]
    reading = ReadingOptions(**{name: getattr(options, name) for name in names})
    return dataclasses.replace(reading, data=reading.data or (str(EXAMPLE_DATA),))
