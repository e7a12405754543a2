"""`dspark inspect`: facts of a cache or of its capture's progress, as plain values and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.cache.codecs import bits_per_value, get_codec
from pipeline.cache.engine import EngineIdentity, engine_words
from pipeline.cache.features import LABELS, NO_LAST_HIDDEN, codec_words, hidden_words
from pipeline.cache.fidelity import TEACHER_TV
from pipeline.cache.index import check_skipped, open_index, sample_ids
from pipeline.cache.manifest import (
    INDEX,
    MANIFEST,
    PROGRESS,
    Manifest,
    read_manifest,
)
from pipeline.cache.optional import plain_values
from pipeline.cache.progress.claims import WorkerState, live_workers
from pipeline.cache.progress.finished import finished_shards, listed_shards, target_written
from pipeline.cache.split import held_out
from pipeline.cache.verify import DAMAGED
from pipeline.errors import CacheError
from pipeline.remote.address import Address, Place
from pipeline.text import duration, size

Facts = dict[str, Any]
# A rate over a shorter time means nothing.
SHORTEST_SECONDS = 0.001
# Skipped samples that are shown with their places.
SHOWN = 5


def cache_facts(place: Place, *, fraction: float) -> Facts:
    """Collect the facts in manifest, index and progress, in JSON's types. Reads no shard, writes nothing.

    Args:
        fraction: share of the samples that would be held out.

    Raises:
        CacheError: no manifest, or a complete cache with a damaged index.
    """
    if isinstance(place, Address):
        cache, manifest, running = _far(place)
    else:
        cache, manifest, running = place, read_manifest(place), None
        if manifest.status != "complete":
            running = _running(cache, manifest)
            again = read_manifest(cache)
            if again.status == "complete":  # another process has just finished it
                manifest, running = again, None
    facts: Facts = {
        "cache": str(place),
        "status": manifest.status,
        "created_by": manifest.created_by,
        "identity": plain_values(manifest.identity),
        "samples": manifest.num_samples,
        "tokens": manifest.num_tokens,
        "labels": manifest.num_last_rows,
        "of_prompts": manifest.identity.data.of_prompts,
        "supervised_share": manifest.num_last_rows / max(1, manifest.num_tokens),
        "shards": len(manifest.plan),
        "rows": manifest.rows,
        "fidelity": manifest.fidelity,
        "history": list(manifest.history),
        "skipped": _skipped(manifest),
    }
    facts |= {} if cache is None else _of_the_index(cache, manifest, fraction)
    if running is not None:
        return facts | {"progress": running}
    missing = 0
    if not isinstance(place, Address):
        missing = len(manifest.plan) - sum(1 for _ in listed_shards(cache / "shards", ".safetensors"))
    assert cache is not None
    return facts | {"bytes": _bytes(cache, manifest), "shards_missing": max(0, missing)}


def _far(address: Address) -> tuple[Path | None, Manifest, Facts | None]:
    """Return a remote cache's folder of small files, and manifest; progress instead if it is unfinished."""
    from pipeline.cache.remote.local import default_store
    from pipeline.cache.remote.mirror import found_manifest, mirrored
    from pipeline.cache.remote.progress import remote_progress
    from pipeline.remote.objects import Objects

    objects = Objects(address)
    manifest = found_manifest(objects)
    if manifest is None or manifest.status == "complete":
        manifest, _, folder = mirrored(objects, default_store())
        return folder, manifest, None
    found = remote_progress(objects, manifest)
    return None, manifest, _progress(manifest, found.finished, found.target_written, found.workers)


def _of_the_index(cache: Path, manifest: Manifest, fraction: float) -> Facts:
    """Collect the facts of the index; none while a capture has not written it."""
    try:
        table = open_index(cache / INDEX, manifest.plan)
    except CacheError:
        if manifest.status == "complete":
            raise
        return {}
    check_skipped(table, cache / MANIFEST, manifest.skipped)
    kept, lengths = manifest.skipped.kept(len(table)), table["length"].to_numpy()
    held = held_out(sample_ids(table), fraction) & kept
    names = manifest.identity.data.sources
    counts = np.bincount(table["source"].to_numpy()[kept], minlength=len(names))[: len(names)]
    return {
        "sources": [{"name": n, "samples": int(c)} for n, c in zip(names, counts, strict=True)],
        "held_out": {
            "fraction": fraction,
            "samples": int(held.sum()),
            "tokens": int(lengths[held].sum(dtype=np.int64)),
            "labels": int(table["last_rows"].to_numpy()[held].sum(dtype=np.int64)),
        },
    }


def _skipped(manifest: Manifest) -> Facts:
    """Collect the skipped samples: counts by reason, and the places of all."""
    skipped, names = manifest.skipped, manifest.identity.data.sources
    return {
        "reasons": skipped.counts(),
        "samples": [
            {
                "number": number,
                "source": names[source] if source < len(names) else f"source {source}",
                "source_row": row,
                "reason": reason,
            }
            for number, source, row, reason in zip(
                skipped.sample, skipped.source, skipped.source_row, skipped.reason, strict=True
            )
        ],
    }


def _bytes(cache: Path, manifest: Manifest) -> Facts:
    """Collect the sizes of a complete cache's files."""
    shards = sum(manifest.shards.bytes)
    others = {record.file: record.bytes for record in manifest.files}
    index = others.pop(INDEX)
    own = (cache / MANIFEST).stat().st_size
    aside = [path.lstat().st_size for path in (cache / DAMAGED).rglob("*") if not path.is_dir()]
    return {
        "shards": shards,
        "index": index,
        "target": sum(others.values()),
        "manifest": own,
        "total": manifest.num_bytes + own,
        "a_token": shards / max(1, manifest.num_tokens),
        "set_aside": sum(aside),
    }


def _running(cache: Path, manifest: Manifest) -> Facts:
    """Collect the progress of a capture. Its files may come, go and be half written at any moment."""
    try:
        states = live_workers(cache / PROGRESS)
    except OSError:
        states = []
    return _progress(manifest, finished_shards(cache, manifest), target_written(cache), states)


def _progress(
    manifest: Manifest, finished: Mapping[int, int], written: bool, states: Sequence[WorkerState]
) -> Facts:
    """Return the facts of a capture's progress.

    Args:
        finished: bytes of each finished shard.
        written: True if the target's files are.
        states: the living workers.
    """
    done = sum(manifest.plan.tokens[shard] for shard in finished)
    workers = [_worker(state) for state in states]
    rate = sum(worker["tokens_per_second"] for worker in workers)
    return {
        "shards_done": len(finished),
        "tokens_done": done,
        "bytes_done": sum(finished.values()),
        "target_written": written,
        "workers": workers,
        "tokens_per_second": rate,
        "seconds_left": (manifest.num_tokens - done) / rate if rate else None,
    }


def _worker(state: WorkerState) -> Facts:
    """Return a worker's account of itself, without impossible figures."""
    sensible = (
        math.isfinite(state.seconds) and state.seconds >= SHORTEST_SECONDS and 0 <= state.tokens <= 2**48
    )
    return {
        "label": _printable(state.label),
        "host": _printable(state.host),
        "pid": state.pid,
        "seconds": state.seconds if sensible else 0.0,
        "tokens": state.tokens if sensible else 0,
        "tokens_per_second": state.tokens / state.seconds if sensible else 0.0,
    }


def _printable(text: str) -> str:
    """Replace characters that could control a terminal: the text comes from a file of anybody."""
    return "".join(c if c.isprintable() else "?" for c in text)[:80]


def _data_words(facts: Facts) -> str:
    if facts["of_prompts"]:
        return f"{facts['samples']:,} prompts, at most {facts['tokens']:,} tokens with their answers"
    return (
        f"{facts['samples']:,} samples, {facts['tokens']:,} tokens, {facts['labels']:,} of them "
        f"supervised ({facts['supervised_share']:.0%})"
    )


def fact_lines(facts: Facts) -> Iterator[str]:
    """Format the facts of `cache_facts` for the terminal."""
    target, features = facts["identity"]["target"], facts["identity"]["features"]
    data = facts["identity"]["data"]
    yield click.style(f"cache {facts['cache']}: {facts['status']}", bold=True)
    if facts["status"] != "complete":
        yield from _progress_lines(facts)
    yield (
        f"  target    {target['name']} ({target['architecture']}, {target['dtype']}), "
        f"width {target['hidden_size']:,}, {target['num_layers']} layers, vocabulary {target['vocab_size']:,}"
    )
    yield f"            weights {target['weights'][:16]}, tokenizer {_tokenizer(facts)}"
    if "engine" in facts["identity"]:
        engine = EngineIdentity(**facts["identity"]["engine"])
        yield f"            run by {_printable(engine_words(engine))}"
    width = target["hidden_size"]
    last = f"last hidden{hidden_words(features.get('hidden', LABELS))}"
    stored = [
        f"{features[key]} {what} ({bits_per_value(get_codec(features[key]), width):.4g} bits per value)"
        for key, what in (("context_codec", "context"), ("last_codec", last))
        if features[key] != NO_LAST_HIDDEN
    ]
    if features["last_codec"] == NO_LAST_HIDDEN:
        stored.append("no last hidden")
    yield f"  features  layers {list(features['layer_ids'])}, {', '.join(stored)}"
    yield f"  data      {_data_words(facts)}"
    for source in facts.get("sources", [{"name": name} for name in data["sources"]]):
        count = f": {source['samples']:,} samples" if "samples" in source else ""
        yield f"            {_printable(source['name'])}{count}"
    settings = ", ".join(f"{name} {_printable(value)}" for name, value in sorted(data["settings"].items()))
    yield f"            settings: {settings or 'none'}"
    yield f"            rows: {', '.join(f'{name} {n:,}' for name, n in sorted(facts['rows'].items()))}"
    yield f"            content {data['sha256'][:16]}"
    yield from _skipped_lines(facts["skipped"])
    if "held_out" in facts:
        held = facts["held_out"]
        yield (
            f"  held out  {held['samples']:,} samples, {held['tokens']:,} tokens, {held['labels']:,} "
            f"supervised at a fraction of {held['fraction']:g}"
        )
    yield f"  shards    {facts['shards']:,} of at most {facts['identity']['shard_tokens']:,} tokens"
    if "bytes" in facts:
        yield from _size_lines(facts)
    yield from _fidelity_lines(facts["fidelity"])
    yield from _history_lines(facts["history"])


def _skipped_lines(skipped: Facts) -> Iterator[str]:
    """Format the skipped samples: a line of counts, and one of the first places."""
    samples = skipped["samples"]
    if not samples:
        return
    counts = ", ".join(f"{n:,} {reason}" for reason, n in skipped["reasons"].items())
    yield f"  skipped   {len(samples):,} samples, which no reader returns: {counts}"
    places = [f"#{s['number']} (row {s['source_row'] + 1:,} of {_printable(s['source'])})" for s in samples]
    more = f" and {len(samples) - SHOWN:,} more, see --json" if len(samples) > SHOWN else ""
    yield f"            {', '.join(places[:SHOWN])}{more}"


def _tokenizer(facts: Facts) -> str:
    return facts["identity"]["tokenizer"]["sha256"][:16]


def _size_lines(facts: Facts) -> Iterator[str]:
    sizes = facts["bytes"]
    yield (
        f"  sizes     {size(sizes['total'])}: shards {size(sizes['shards'])}, index {size(sizes['index'])}, "
        f"target {size(sizes['target'])}; {sizes['a_token']:,.0f} bytes per token"
    )
    if facts["shards_missing"]:
        yield f"  missing   {facts['shards_missing']:,} shards: see `dspark verify {facts['cache']} --fast`"
    if sizes["set_aside"]:
        yield f"  aside     {size(sizes['set_aside'])} in {DAMAGED}/, which no command reads: remove it"


def _progress_lines(facts: Facts) -> Iterator[str]:
    progress = facts["progress"]
    share = progress["tokens_done"] / max(1, facts["tokens"])
    yield (
        f"  progress  {progress['shards_done']:,} of {facts['shards']:,} shards, "
        f"{progress['tokens_done']:,} of {facts['tokens']:,} tokens ({share:.0%}), "
        f"{size(progress['bytes_done'])}"
    )
    for worker in progress["workers"]:
        yield (
            f"            {worker['label'] or 'worker'} on {worker['host']}, process {worker['pid']}: "
            f"{worker['tokens_per_second']:,.0f} tokens/s"
        )
    if not progress["workers"]:
        work = "conversion" if facts["history"] else "capture"
        yield f"  rate      no process is running: run the same {work} again to continue"
    elif progress["seconds_left"] is None:
        yield f"  rate      not known yet, {len(progress['workers'])} running"
    else:
        yield (
            f"  rate      {progress['tokens_per_second']:,.0f} tokens/s by {len(progress['workers'])} "
            f"running, {duration(progress['seconds_left'])} left"
        )


def summary_lines(manifest: Manifest) -> Iterator[str]:
    """Format a complete cache in two lines, for the end of the command that wrote it."""
    target, features = manifest.identity.target, manifest.identity.features
    yield (
        f"  {target.name} ({target.architecture}, {target.dtype}), layers {list(features.layer_ids)}, "
        f"{codec_words(features.context_codec, features.last_codec, features.hidden)}"
    )
    yield (
        f"  {manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens, "
        f"{manifest.num_last_rows:,} labels, {len(manifest.plan)} shards, {size(manifest.num_bytes)}"
    )
    yield from _skipped_lines(_skipped(manifest))


def _history_lines(history: list[dict[str, str]]) -> Iterator[str]:
    """Format the caches that this one was converted from, a line each."""
    head = "  history   "
    for step in history:
        words = {key: _printable(value) for key, value in step.items()}
        layers, context, last = (
            words.get(key, "?").replace(",", ", ") for key in ("layers", "context_codec", "last_codec")
        )
        yield (
            f"{head}converted from {words.get('from', '?')[:16]}: layers [{layers}], "
            f"{codec_words(context, last, words.get('hidden', LABELS))}"
        )
        head = " " * len(head)


def _fidelity_lines(fidelity: dict[str, float], whose: str = "") -> Iterator[str]:
    """Format mean and 99th percentile of the measured errors, a line per quantity; then the source's."""
    source = {k.removeprefix("source."): v for k, v in fidelity.items() if k.startswith("source.")}
    fidelity = {k: v for k, v in fidelity.items() if not k.startswith("source.")}
    proof = {name.removeprefix("proof."): v for name, v in fidelity.items() if name.startswith("proof.")}
    means = [name.removesuffix("_mean") for name in fidelity if name.endswith("_mean")]
    rows = fidelity.get(f"{TEACHER_TV}_rows")
    head = " " * 12 if whose else "  fidelity  "
    for name in sorted((n for n in means if not n.startswith("proof.")), key=_layer_order):
        words = (
            "teacher total variation" if name == TEACHER_TV else name.replace("relative_error.", "error of ")
        )
        late = fidelity.get(f"{name}_p99")
        text = f"{words}: mean {fidelity[f'{name}_mean']:.4g}" + (
            f", p99 {late:.4g}" if late is not None else ""
        )
        yield head + whose + text + (f", over {rows:,.0f} rows" if rows and name == TEACHER_TV else "")
        head = " " * len(head)
    if proof:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(proof.items()))
        yield f"{head}{whose}proof: {figures}"
    if source:
        yield from _fidelity_lines(source, f"{whose}source's ")


def _layer_order(name: str) -> tuple[int, int, str]:
    """Return the sort key of a quantity: the teacher first, then layers by number, then last hidden."""
    tail = name.rpartition(".")[2]
    number = int(tail) if tail.removeprefix("-").isdecimal() else 2**31
    return (0 if name == TEACHER_TV else 1, number, name)
