"""`dspark convert`: write a cache from another one, with other codecs or fewer layers, without the target.

It works shard by shard: each source shard is hashed, decoded, encoded again and published as in a capture. So
a stopped conversion continues, and several processes may share one.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cache.codecs import Statistics, get_codec
from pipeline.cache.codecs.base import peaks
from pipeline.cache.features import LABELS, NO_LAST_HIDDEN, FeatureIdentity, codec_words
from pipeline.cache.layout import LAST_HIDDEN, part_name, shard_specs
from pipeline.cache.manifest import (
    FROZEN,
    INDEX,
    FileRecord,
    Identity,
    Manifest,
    shard_file,
)
from pipeline.cache.prefixes import ContextRows
from pipeline.cache.price import Price, cache_price, check_disk, free_bytes
from pipeline.cache.progress.claims import Worker, claim_name, take_shards
from pipeline.cache.reader import MAX_SCALE, CacheReader
from pipeline.cache.rows import last_hidden_columns, stored_rows
from pipeline.cache.shard import map_shard
from pipeline.cache.skipped import SkippedRows, uncounted
from pipeline.cache.statistics import (
    TOKENS,
    StateStatistics,
    chosen_samples,
    read_statistics,
    standardised_states,
    state_codecs,
)
from pipeline.cache.tools.filler import Filler
from pipeline.cache.verify import FileChecks, Problem
from pipeline.cache.writer import CacheWriter
from pipeline.errors import CacheError, UsageError
from pipeline.features import validate_target_layer_ids
from pipeline.options import check_hidden, check_last_codec
from pipeline.signals import StopRequest, stop_on_signals
from pipeline.text import size

# Name of the claim on writing `target/`.
_TARGET = "target"


@dataclass(frozen=True)
class Converted:
    """Result of a conversion."""

    manifest: Manifest
    complete: bool
    """False if other processes still write shards."""
    reused: bool
    """True if the cache was complete before."""
    shards: int
    """Number of shards written by this process."""


def convert(
    source: Path,
    destination: Path,
    *,
    context_codec: str | None = None,
    last_codec: str | None = None,
    last_hidden: str | None = None,
    hidden: str | None = None,
    layer_ids: tuple[int, ...] | None = None,
    force: bool = False,
) -> Converted:
    """Write `destination` from `source`, which is only read, or continue a stopped conversion.

    Args:
        context_codec, last_codec: None keeps the source's.
        last_hidden: `none` leaves last hidden states out; None keeps what the source has.
        hidden: `labels` keeps those of label rows only; None keeps what the source has.
        layer_ids: the source's layers to keep; None keeps all.
        force: start even if the disk can't hold the result.

    Raises:
        UsageError: both are the same directory, or one lies in the other; or a codec for states left out.
        CacheError: the source is incomplete or damaged or lacks a state, the destination holds something
            else, or the disk can't hold the result.
    """
    _check_places(source, destination)
    check_last_codec(last_hidden, last_codec)
    check_hidden(last_hidden, hidden)
    old = Source(source)
    identity = _identity(old, context_codec, last_codec, last_hidden, hidden, layer_ids)
    history = (*old.manifest.history, _step(old.manifest))
    cost = old.price(identity)
    for line in _plan_lines(old, identity, cost, destination):
        click.echo(line)
    if not force:
        check_disk(destination, cost, "keep fewer layers (--layers) or use smaller codecs")
    rows = uncounted(old.manifest.rows, old.manifest.skipped)  # the writer counts them again
    writer = CacheWriter(destination, identity, old.manifest.plan, old.index, rows, history)
    if writer.complete:
        return Converted(writer.manifest, complete=True, reused=True, shards=0)
    _warn_of_finer_codecs(old.manifest.identity, identity)
    old.reader.check_shards()
    written = 0
    try:
        with stop_on_signals() as stop, Worker(writer.progress, "convert") as worker:
            written = _convert(writer, worker, old, stop)
    except FileNotFoundError:  # progress/ is gone: another process completed the cache
        if not writer.completed_by_another():
            raise
    manifest = writer.finalise()
    return Converted(manifest or writer.manifest, complete=manifest is not None, reused=False, shards=written)


def _check_places(source: Path, destination: Path) -> None:
    """Refuse a destination inside the source, which must stay as it is. Raises UsageError."""
    here, there = source.resolve(), destination.resolve()
    if here == there or (source.exists() and destination.exists() and source.samefile(destination)):
        raise UsageError(f"{destination} is the cache to read: name a new directory to write")
    if here in there.parents:
        raise UsageError(f"{destination} is inside the cache to read: name a directory outside of it")


def _identity(
    old: Source,
    context_codec: str | None,
    last_codec: str | None,
    last_hidden: str | None,
    hidden: str | None,
    layer_ids: tuple[int, ...] | None,
) -> Identity:
    found = old.manifest.identity
    features = found.features
    layers = features.layer_ids if layer_ids is None else layer_ids
    layers = tuple(validate_target_layer_ids(layers, found.target.num_layers))
    missing = [layer_id for layer_id in layers if layer_id not in features.layer_ids]
    if missing:
        raise CacheError(
            f"{old.path} holds layers {list(features.layer_ids)}, --layers asks for {missing[0]}: name "
            "some of those, or capture again"
        )
    asked = {"--last-codec": last_codec, "--hidden": hidden}
    asked["--last-hidden"] = None if last_hidden == NO_LAST_HIDDEN else last_hidden
    option = next((name for name, value in asked.items() if value is not None), None)
    if option is not None and not features.has_last_hidden:
        raise CacheError(
            f"{old.path} has no last hidden states, and only a capture can make them: leave out {option}, or "
            "capture again"
        )
    if hidden not in (None, LABELS, features.hidden):
        raise CacheError(
            f"{old.path} has the last hidden states of label rows, and only a capture can make those of "
            f"every token: leave out --hidden {hidden}, or capture again"
        )
    kept = features.stored_as(
        context_codec or features.context_codec,
        NO_LAST_HIDDEN if last_hidden == NO_LAST_HIDDEN else last_codec or features.last_codec,
    )
    kept = dataclasses.replace(kept, layer_ids=layers, hidden=hidden or kept.hidden)
    return dataclasses.replace(found, features=kept)


def _step(manifest: Manifest) -> dict[str, str]:
    """Return the entry of the history about a source."""
    features = manifest.identity.features
    return {
        "from": manifest.checksum,
        "layers": ",".join(map(str, features.layer_ids)),
        "context_codec": features.context_codec,
        "last_codec": features.last_codec,
        **({} if features.hidden == LABELS else {"hidden": features.hidden}),
    }


def _plan_lines(old: Source, identity: Identity, cost: Price, destination: Path) -> Iterator[str]:
    features, manifest = identity.features, old.manifest
    per_token = sum(manifest.shards.bytes) / manifest.num_tokens
    yield (
        f"from {old.path}: {size(manifest.num_bytes)}, {per_token:,.0f} bytes per token; to {destination}: "
        f"layers {list(features.layer_ids)}, "
        f"{codec_words(features.context_codec, features.last_codec, features.hidden)}"
    )
    yield (
        f"{cost.per_token:,.0f} bytes per token, {size(cost.total)} in {len(manifest.plan):,} shards; "
        f"disk: {size(free_bytes(destination))} free"
    )


def _warn_of_finer_codecs(old: Identity, new: Identity) -> None:
    """Warn that a finer codec does not restore what a coarser one lost."""
    pairs = [
        (what, getattr(old.features, key), getattr(new.features, key))
        for key, what in (("context_codec", "context"), ("last_codec", "last hidden"))
    ]
    finer = [
        f"{before} {what} as {after}"
        for what, before, after in pairs
        if after != NO_LAST_HIDDEN and get_codec(before).order < get_codec(after).order
    ]
    if finer:
        click.echo(
            f"warning: {' and '.join(finer)} is no more precise: the error stays, in a larger cache",
            err=True,
        )


class Source:
    """A complete cache whose files are hashed before use.

    Raises:
        CacheError: missing, incomplete, or with damaged files.
    """

    def __init__(self, path: Path):
        self.path, self.reader = path, CacheReader(path)
        self.manifest: Manifest = self.reader.manifest
        self.identity = self.manifest.identity
        records = {record.file: record for record in self.manifest.files}
        self._frozen = records.pop(FROZEN)
        with FileChecks(path, self.manifest, threads=1) as checks:
            problem, table = checks.index([records.pop(INDEX)])
            problems = [problem] if problem else checks.problems(records.values())
        self._refuse(problems)
        assert table is not None
        self.index = table
        last = last_hidden_columns(self.identity.features)
        self.starts, self.lengths, self.shards, self.last_starts, self.last_rows = (
            table[name].to_numpy() for name in ("token_start", "length", "shard", last.start, last.number)
        )
        self.context = ContextRows.of(table, self.manifest.plan.samples)
        self.skipped = self.manifest.skipped.by_shard(self.manifest.plan.samples)
        self.statistics = read_statistics(path, self.identity)
        self.codecs = state_codecs(self.identity, self.statistics)
        self._shard: tuple[int, dict[str, Tensor]] = (-1, {})

    def _refuse(self, problems: list[Problem]) -> None:
        if problems:
            raise CacheError(
                f"{self.path / problems[0].file} is damaged ({problems[0].reason}): `dspark verify "
                f"{self.path} --repair` sets damaged files aside for capture to rewrite; then run this again"
            )

    def price(self, identity: Identity) -> Price:
        """Return the size of this cache with other features."""
        target = sum(r.bytes for r in self.manifest.files if r.file.startswith("target/"))
        return cache_price(identity, self.manifest.plan, self.manifest.rows, self.index, target)

    def shard(self, shard: int) -> dict[str, Tensor]:
        """Return views of a shard's stored tensors. Hashes the file unless it was the last one used."""
        if self._shard[0] != shard:
            self._shard = (-1, {})  # unmaps the last one: one is mapped at a time
            name, shards = shard_file(shard), self.manifest.shards
            record = FileRecord(file=name, bytes=shards.bytes[shard], sha256=shards.sha256[shard])
            with FileChecks(self.path, self.manifest, threads=1) as checks:
                self._refuse(checks.problems([record], self.index))
            specs = shard_specs(self.identity, self.manifest.plan[shard])
            self._shard = (shard, map_shard(self.path / name, specs).tensors)
        return self._shard[1]

    def decode(self, shard: int, state: str, rows: slice | Tensor) -> Tensor:
        """Decode some rows of a state, as training reads them, `[n, H]` bfloat16.

        Raises:
            CacheError: a value that is not finite, or a scale that rule 9 of FORMAT.md forbids.
        """
        stored, bound = self.shard(shard), self.codecs[state]
        width = self.identity.target.hidden_size
        parts = {s: stored[part_name(state, s)][rows] for s in bound.codec.specs(1, width)}
        scales = parts.get("scale")
        good = scales is None or bool((scales.abs() <= MAX_SCALE).all())
        out = torch.empty(len(parts[""]), width, dtype=torch.bfloat16)
        if good:
            bound.decode(parts, out)
        if not good or not bool(torch.isfinite(peaks(out)).all()):
            raise CacheError(
                f"{self.path / shard_file(shard)} is damaged (it has a {'value' if good else 'scale'} of "
                f"{state} that no capture writes): capture again"
            )
        return out

    def context_rows_of(self, shard: int) -> np.ndarray:
        """Return the row of context of each token of a shard, `[T]`."""
        samples = np.flatnonzero(self.shards == shard)
        return self.context.of_tokens(range(samples[0], samples[-1] + 1))

    def last_rows_of(self, shard: int, features: FeatureIdentity) -> np.ndarray:
        """Return the token row of each row of `last_hidden` that a cache of `features` has, `[M]`."""
        mask, samples = self.shard(shard)["loss_mask"].numpy(), np.flatnonzero(self.shards == shard)
        places = zip(self.starts[samples], self.lengths[samples], strict=True)
        return np.concatenate([start + stored_rows(mask[start : start + n], features) for start, n in places])

    def last_rows_by_sample(self, shard: int, features: FeatureIdentity) -> list[int]:
        """Return the rows of `last_hidden` that each sample of a shard has in a cache of `features`."""
        column = self.index[last_hidden_columns(features).number].to_numpy()
        return column[self.shards == shard].tolist()

    def skipped_rows(self, features: FeatureIdentity) -> SkippedRows:
        """Return the rows of skipped samples in the shards of a cache of `features`."""
        return SkippedRows(self.skipped, self.manifest.plan.samples, self.index, features)

    def head(self) -> Tensor:
        """Read the target's `lm_head.weight` `[V, H]`."""
        return self.reader.frozen()["lm_head.weight"]

    def check_frozen(self) -> None:
        """Hash the frozen weights. Raises CacheError if they are damaged."""
        with FileChecks(self.path, self.manifest, threads=1) as checks:
            self._refuse(checks.problems([self._frozen]))

    def copy_target(self, writer: CacheWriter) -> None:
        """Copy `target/`, byte for byte, and the figures of `fidelity`."""
        names = [record.file for record in self.manifest.files if record.file.startswith("target/")]
        others = {n.removeprefix("target/"): (self.path / n).read_bytes() for n in names if n != FROZEN}
        proof = {f"source.{name}": value for name, value in self.manifest.fidelity.items()}
        with (self.path / FROZEN).open("rb") as file:
            frozen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        writer.write_target(others, memoryview(frozen), proof)

    def measure(self, identity: Identity, between: Callable[[], None]) -> dict[str, Statistics]:
        """Return the statistics for a cache of `identity`: this one's, else measured from its rows.

        As in a capture, the rows are the first of `chosen_samples`, without position 0 and skipped samples.

        Args:
            between: called before each sample; may raise to stop.
        """
        wanted = standardised_states(identity)
        known = {state: self.statistics[state] for state in wanted if state in self.statistics}
        sums = {state: StateStatistics() for state in wanted if state not in known}
        kept = self.manifest.skipped.kept(len(self.lengths))
        samples = [i for i in chosen_samples(len(self.lengths)) if kept[i]] if sums else []
        if sums and not samples:
            raise CacheError(
                f"{self.path} skips every sample that statistics are measured from: capture it again with "
                "the codecs that you want"
            )
        last = {}
        for i in samples:
            between()
            shard, start = int(self.shards[i]), int(self.starts[i])
            context = torch.from_numpy(self.context.of_tokens(range(i, i + 1))[1:TOKENS])
            mask = self.shard(shard)["loss_mask"][start : start + int(self.lengths[i])].numpy()
            first = int(self.last_starts[i])
            end = first + int(self.last_rows[i])
            begin = first + int(stored_rows(mask, self.identity.features)[0] == 0)
            last[i] = slice(begin, min(end, begin + TOKENS))
            for state, each in sums.items():
                each.add(self.decode(shard, state, last[i] if state == LAST_HIDDEN else context))
        if LAST_HIDDEN in sums and not any(part.start < part.stop for part in last.values()):
            for i in samples:  # of two tokens each, whose only row is position 0
                row = int(self.last_starts[i])
                sums[LAST_HIDDEN].add(self.decode(int(self.shards[i]), LAST_HIDDEN, slice(row, row + 1)))
        return known | {state: each.result() for state, each in sums.items()}


def _convert(writer: CacheWriter, worker: Worker, old: Source, stop: StopRequest) -> int:
    """Convert every shard that no other process owns, and return their number."""

    def between() -> None:
        stop.check(f"{writer.path} keeps every finished shard, the same command continues")

    plan, pending = writer.manifest.plan, writer.pending()
    old.check_frozen()
    between()
    statistics = writer.statistics(lambda: old.measure(writer.manifest.identity, between))
    if not writer.target_written() and worker.claim(_TARGET):
        old.copy_target(writer)
        worker.release(_TARGET)
    total, written = writer.manifest.num_tokens, 0
    done = total - sum(plan.tokens[shard] for shard in pending)
    filler = Filler(old, writer.manifest.identity, statistics)
    memory = torch.empty(max((writer.shard_bytes(s) for s in pending), default=0), dtype=torch.uint8)
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="convert") as bar:
        for shard in take_shards(writer, worker):
            between()
            buffer = writer.new_shard(shard, memory)
            measured = filler.fill(buffer, shard)
            writer.write_shard(shard, buffer, measured, skipped=old.skipped.get(shard, {}))
            worker.release(claim_name(shard))
            worker.captured(plan.tokens[shard])
            bar.update(plan.tokens[shard])
            written += 1
    return written
