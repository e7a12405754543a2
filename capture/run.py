"""The capture loop: run the hooked target once over the data, shard by shard of a fixed plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from capture.console import note, say
from capture.data.summary import position_lines
from capture.engines.engine import CaptureEngine
from capture.engines.group import Group, open_group
from capture.engines.open import open_engine
from capture.engines.options import HUGGING_FACE
from capture.one_pass.engine import OnePassEngine
from capture.one_pass.settle import answered_writer, one_pass_engine, settle, shard_plan
from capture.one_pass.two_steps import answer_first
from capture.options import CaptureOptions
from capture.plan import check_room, plan_lines
from capture.prepare import PreparedCapture, prepare
from capture.shards.bad import BadSamples
from capture.shards.clock import Clock
from capture.shards.disk import ShardDisk
from capture.shards.evidence import prove_target
from capture.shards.fill import FilledShard, ShardFiller
from capture.shards.statistics import measure_statistics
from capture.workers import worker_place
from pipeline.cache import CacheWriter, Manifest
from pipeline.cache.fidelity import Measured
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.progress.claims import DEAD_AFTER_SECONDS, Worker, claim_name, take_shards
from pipeline.cache.remote.local import staging_folder
from pipeline.cache.statistics import state_codecs
from pipeline.device import reuse_freed_memory
from pipeline.errors import CacheError
from pipeline.process import WorkerPlace
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from pipeline.signals import StopRequest, stop_on_signals

# Name of the claim to write `target/`.
_TARGET = "target"

# Times that shards with other answers than were kept are written again.
_ROUNDS = 3


@dataclass(frozen=True)
class Captured:
    """Result of a capture."""

    manifest: Manifest
    complete: bool
    """False when other processes still hold shards."""
    reused: bool
    """True when the cache was complete before, and no target was loaded."""
    shards: int
    """Shards written by this process."""


def capture(options: CaptureOptions, place: WorkerPlace | None = None) -> Captured:
    """Capture what `options` names into its cache, or continue an interrupted capture.

    Args:
        place: number of this process among those that fill the cache; None reads torchrun's environment.

    Raises:
        DSparkError: see `pipeline.errors`; finished shards are kept.
    """
    place = worker_place(None, options.engine) if place is None else place
    with open_group(options.engine) as group:
        return _capture(options, place, group)


def _capture(options: CaptureOptions, place: WorkerPlace, group: Group | None) -> Captured:
    """Capture as `capture` does.

    Args:
        group: the processes over which transformers splits the target, if it does.
    """
    if options.answers.regenerate and options.engine.engine == HUGGING_FACE:
        options = answer_first(options, place)
    prepared = prepare(options if group else _on_device_of(place, options))
    if place.rank == 0:
        for line in plan_lines(prepared):
            say(line)
        for line in position_lines(prepared.target.config, prepared.data.facts.lengths):
            note(line)
    prepared.check_directory()
    check_room(prepared)
    writer = _writer(prepared)
    if writer.complete:
        return Captured(writer.manifest, complete=True, reused=True, shards=0)
    shards = 0
    if writer.pending() or not writer.target_written() or not writer.statistics_written():
        shards = _capture_pending(writer, prepared, place, group)
    rounds = 0
    while prepared.answers_first and not prepared.answered and not writer.pending() and not writer.complete:
        wrong = settle(writer, prepared)
        if not wrong:
            break
        rounds += 1
        if rounds > _ROUNDS:
            raise CacheError(
                f"shards {wrong} of {prepared.options.cache} do not hold their answers, though written "
                f"{_ROUNDS} times: another process writes them too, or the store changes what it is given"
            )
        writer.forget(wrong)
        shards += _capture_pending(writer, prepared, place, group)
    manifest = writer.finalise(bad_samples(prepared).check)
    return Captured(manifest or writer.manifest, complete=manifest is not None, reused=False, shards=shards)


def _writer(prepared: PreparedCapture) -> CacheWriter:
    """Open the cache, or begin it. Reads all weights of the target, for their hash."""
    identity, cache = prepared.full_identity(), prepared.options.cache
    if prepared.answered:
        return answered_writer(prepared, identity)
    if isinstance(cache, Address):
        from pipeline.cache.remote.writer import RemoteWriter  # needs obstore

        parts = (prepared.plan, prepared.index, dict(prepared.data.rows), prepared.options.staging_bytes)
        return RemoteWriter(Objects(cache), staging_folder(cache), identity, *parts)
    rows = dict(prepared.data.rows)
    return CacheWriter(cache, identity, prepared.plan, prepared.index, rows)


def _on_device_of(place: WorkerPlace, options: CaptureOptions) -> CaptureOptions:
    """Choose this process's device, unless `--device-map` spreads the target."""
    target = options.target
    if target.device_map is not None:
        return options
    return dataclasses.replace(
        options, target=dataclasses.replace(target, device=place.device(target.device))
    )


def _capture_pending(
    writer: CacheWriter, prepared: PreparedCapture, place: WorkerPlace, group: Group | None
) -> int:
    """Start the engine and capture until nothing is missing but what live processes hold.

    Returns:
        Shards written by this process.
    """
    if prepared.target.device.type == "cpu":
        reuse_freed_memory()
    with closing(open_engine(prepared, group)) as engine:
        return _capture_with(engine, writer, prepared, place)


def _capture_with(
    engine: CaptureEngine, writer: CacheWriter, prepared: PreparedCapture, place: WorkerPlace
) -> int:
    """Prove an engine, and capture as `_capture_pending` does."""
    identity, data, order = writer.manifest.identity, prepared.data, prepared.batching.order
    bad = bad_samples(prepared, writer.skipped())
    statistics = writer.statistics(lambda: measure_statistics(engine, identity, data, order, bad))
    codecs = state_codecs(identity, statistics)
    proof = prove_target(engine, identity, prepared, codecs.get(LAST_HIDDEN), place.rank == 0)
    written = 0
    try:
        with stop_on_signals() as stop, writer.worker(place.label) as worker:
            engine.while_waiting = functools.partial(_check_stop, writer, stop)
            one_pass = one_pass_engine(engine, prepared, writer.path)
            filler = ShardFiller(one_pass or engine, identity, codecs, Clock())
            while True:
                if not writer.target_written() and worker.claim(_TARGET):
                    _write_target(writer, prepared, engine, proof)
                written += capture_shards(writer, worker, place, filler, prepared, stop, bad, one_pass)
                done = writer.target_written() and not writer.pending()
                if done or not worker.others_died(_waiting(writer, stop)):
                    break
    except FileNotFoundError:  # another process completed the cache and removed progress/
        if not writer.completed_by_another():
            raise
    return written


def _check_stop(writer: CacheWriter, stop: StopRequest) -> None:
    """Raise StoppedError if a signal asked to stop."""
    stop.check(f"{writer.path} keeps every finished shard, the same command continues")


def _waiting(writer: CacheWriter, stop: StopRequest) -> Callable[[int], None]:
    """Return a function that a wait calls every second: it checks for a stop, and notes the reason once."""
    said = False

    def wait(processes: int) -> None:
        nonlocal said
        _check_stop(writer, stop)
        if not said:
            note(
                f"the remaining shards belong to processes elsewhere ({processes}): waiting for a sign of "
                f"life, at most {DEAD_AFTER_SECONDS:.0f} seconds"
            )
        said = True

    return wait


def _write_target(
    writer: CacheWriter, prepared: PreparedCapture, engine: CaptureEngine, proof: dict[str, float]
) -> None:
    """Write the parts of the target that training needs: config, tokenizer, embedding and head."""
    frozen = {"embed_tokens.weight": _compact(engine.embedding)}
    if not prepared.identity.target.tied_embeddings:
        frozen["lm_head.weight"] = _compact(engine.head)
    writer.write_target(prepared.target.files(), frozen, proof)


def _compact(weight: Tensor) -> Tensor:
    """Return a weight in bf16 if that is lossless (a bf16 checkpoint run in fp32), else unchanged."""
    weight = weight.detach().cpu()
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else weight.contiguous()


def capture_shards(
    writer: CacheWriter,
    worker: Worker,
    place: WorkerPlace,
    filler: ShardFiller,
    prepared: PreparedCapture,
    stop: StopRequest,
    bad: BadSamples | None = None,
    one_pass: OnePassEngine | None = None,
) -> int:
    """Capture every shard that no other process holds. Return their number.

    The target works on one shard while threads hash and write the shards before it.

    Args:
        bad: decides about bad samples; None makes it of the options.
        one_pass: answers the samples first; None captures them as they are.
    """
    bad = bad or bad_samples(prepared, writer.skipped())
    batching, data = prepared.batching, prepared.data
    plan, pending, clock = writer.manifest.plan, writer.pending(), filler.clock
    every_shared = prepared.shared
    total = writer.manifest.num_tokens
    done = total - sum(plan.tokens[shard] for shard in pending)
    largest = max((writer.shard_bytes(shard) for shard in pending), default=0)
    name = f"capture {place.label}".strip()
    written = 0
    with (
        tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc=name, position=place.local_rank
        ) as bar,
        ShardDisk(largest, clock, filler.device) as disk,
    ):

        def between(tokens: int) -> None:
            worker.captured(tokens)
            bar.update(tokens)
            disk.check()
            _check_stop(writer, stop)

        for shard in take_shards(writer, worker, place.rank, place.world):
            memory = disk.buffer()
            members = list(batching.batches_of(shard))
            batches = [[data[int(batching.order[i])] for i in batch] for batch in members]
            found_bad = functools.partial(_found_in_shard, bad, members[0].start)
            shape, more = None, {}
            if one_pass is not None:
                batches = one_pass.answer(shard, batches)
                shape, more = shard_plan(batches), one_pass.measured
            buffer = writer.new_shard(shard, memory, shape)
            shared = every_shared[members[0].start : members[-1].stop] or None
            filled = filler.fill(buffer, batches, between, found_bad, shared)
            disk.put(memory, _finish(writer, worker, shard, filled, clock, bad, more))
            written += 1
    return written


def bad_samples(prepared: PreparedCapture, known: Mapping[int, str] | None = None) -> BadSamples:
    """Return what the options make of bad samples.

    Args:
        known: as for `BadSamples`.
    """
    options, sources = prepared.options, prepared.identity.data.sources
    skip = options.bad_states == "skip"
    return BadSamples(skip, options.max_bad_states, prepared.index, sources, known)


def _found_in_shard(bad: BadSamples, first: int, sample: int, reason: str, key: int | str | None) -> None:
    """Tell `bad` of a sample of the shard whose first sample is row `first` of the index."""
    bad.found(first + sample, reason, key)


def _finish(
    writer: CacheWriter,
    worker: Worker,
    shard: int,
    filled: FilledShard,
    clock: Clock,
    bad: BadSamples,
    more: Measured,
) -> Callable[[], None]:
    """Return a shard's last step, for a thread: wait for its copies, check it, hash it, write it.

    Args:
        more: figures of it besides those that the check measures.
    """

    def finish() -> None:
        measured = filled.finish() | more
        skipped = filled.skipped()
        writer.write_shard(shard, filled.buffer, measured, step=clock.step, skipped=skipped)
        worker.release(claim_name(shard))
        if skipped:
            bad.check()

    return finish
