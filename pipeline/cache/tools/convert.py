"""`dspark convert`: write a cache from another one, with other codecs or fewer layers, without the target.

It works shard by shard: each source shard is hashed, decoded, encoded again and published as in a capture. So
a stopped conversion continues, and several processes may share one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import click
import torch
from tqdm import tqdm

from pipeline.cache.codecs import get_codec
from pipeline.cache.features import LABELS, NO_LAST_HIDDEN, codec_words
from pipeline.cache.manifest import (
    Identity,
    Manifest,
)
from pipeline.cache.price import Price, check_disk, free_bytes
from pipeline.cache.progress.claims import Worker, claim_name, take_shards
from pipeline.cache.skipped import uncounted
from pipeline.cache.tools.filler import Filler
from pipeline.cache.tools.source import Source
from pipeline.cache.writer import CacheWriter
from pipeline.errors import CacheError, UsageError
from pipeline.features import validate_target_layer_ids
from pipeline.options import check_hidden, check_last_codec
from pipeline.remote.address import Address, Place
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
    source: Place,
    destination: Place,
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
    old.reader.only(identity.features.layer_ids)
    if not force and not isinstance(destination, Address):
        check_disk(destination, cost, "keep fewer layers (--layers) or use smaller codecs")
    rows = uncounted(old.manifest.rows, old.manifest.skipped)  # the writer counts them again
    writer = _writer(destination, identity, old, rows, history)
    if writer.complete:
        return Converted(writer.manifest, complete=True, reused=True, shards=0)
    _warn_of_finer_codecs(old.manifest.identity, identity)
    old.reader.check_shards()
    written = 0
    try:
        with stop_on_signals() as stop, writer.worker("convert") as worker:
            written = _convert(writer, worker, old, stop)
    except FileNotFoundError:  # progress/ is gone: another process completed the cache
        if not writer.completed_by_another():
            raise
    manifest = writer.finalise()
    return Converted(manifest or writer.manifest, complete=manifest is not None, reused=False, shards=written)


def _writer(
    destination: Place,
    identity: Identity,
    old: Source,
    rows: dict[str, int],
    history: tuple[dict[str, str], ...],
) -> CacheWriter:
    parts = (identity, old.manifest.plan, old.index, rows)
    if isinstance(destination, Address):
        from pipeline.cache.remote.local import staging_folder
        from pipeline.cache.remote.writer import RemoteWriter  # needs obstore
        from pipeline.remote.objects import Objects

        return RemoteWriter(Objects(destination), staging_folder(destination), *parts, history=history)
    return CacheWriter(destination, *parts, history)


def _check_places(source: Place, destination: Place) -> None:
    """Refuse a destination inside the source, which must stay as it is. Raises UsageError."""
    if isinstance(source, Address) or isinstance(destination, Address):
        here, there = (f"{place}".rstrip("/") + "/" for place in (source, destination))
        if there.startswith(here):
            raise UsageError(f"{destination} is the cache to read, or inside of it: name another place")
        return
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
            f"{old.place} holds layers {list(features.layer_ids)}, --layers asks for {missing[0]}: name "
            "some of those, or capture again"
        )
    asked = {"--last-codec": last_codec, "--hidden": hidden}
    asked["--last-hidden"] = None if last_hidden == NO_LAST_HIDDEN else last_hidden
    option = next((name for name, value in asked.items() if value is not None), None)
    if option is not None and not features.has_last_hidden:
        raise CacheError(
            f"{old.place} has no last hidden states, and only a capture can make them: leave out {option}, "
            "or capture again"
        )
    if hidden not in (None, LABELS, features.hidden):
        raise CacheError(
            f"{old.place} has the last hidden states of label rows, and only a capture can make those of "
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


def _plan_lines(old: Source, identity: Identity, cost: Price, destination: Place) -> Iterator[str]:
    features, manifest = identity.features, old.manifest
    per_token = sum(manifest.shards.bytes) / manifest.num_tokens
    yield (
        f"from {old.place}: {size(manifest.num_bytes)}, {per_token:,.0f} bytes per token; to {destination}: "
        f"layers {list(features.layer_ids)}, "
        f"{codec_words(features.context_codec, features.last_codec, features.hidden)}"
    )
    room = "" if isinstance(destination, Address) else f"; disk: {size(free_bytes(destination))} free"
    yield (
        f"{cost.per_token:,.0f} bytes per token, {size(cost.total)} in {len(manifest.plan):,} shards{room}"
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
