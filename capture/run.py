"""The capture loop: the hooked target runs once over the data, shard by shard of a fixed plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from capture.batching import CapturePlan
from capture.data.conversations import TokenizedSample
from capture.data.tokens import TokenizedData
from capture.plan import CaptureOptions, PreparedCapture, check_disk, plan_lines, prepare, price
from capture.shards.clock import Clock
from capture.shards.disk import ShardDisk
from capture.shards.fill import FilledShard, ShardFiller
from capture.shards.proof import prove_target
from capture.shards.statistics import measure_statistics
from capture.target import HFDSparkTargetModel
from capture.workers import worker_place
from pipeline.cache import CacheWriter, Manifest
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.progress.claims import DEAD_AFTER_SECONDS, Worker, claim_name, take_shards
from pipeline.cache.statistics import state_codecs
from pipeline.device import reuse_freed_memory
from pipeline.process import WorkerPlace
from pipeline.signals import StopRequest, stop_on_signals

# What the writing of `target/` is called among claims.
_TARGET = "target"


@dataclass(frozen=True)
class Captured:
    """How a capture ended."""

    manifest: Manifest
    complete: bool
    """False when other processes still hold shards."""
    reused: bool
    """Whether the cache was there already, and no target was loaded."""
    shards: int
    """Written by this process."""


def capture(options: CaptureOptions) -> Captured:
    """Capture what `options` names into its cache, or continue where earlier captures stopped.

    Raises:
        DSparkError: see `pipeline.errors`; nothing finished is ever lost.
    """
    place = worker_place(options.worker)
    if options.target.device_map is None:
        device = place.device(options.target.device)
        options = dataclasses.replace(options, target=dataclasses.replace(options.target, device=device))
    prepared = prepare(options)
    if place.rank == 0:
        for line in plan_lines(prepared):
            click.echo(line)
    prepared.check_directory()
    identity = prepared.identity(prepared.target.identity())
    if not options.force:
        features = identity.features
        check_disk(prepared, price(prepared, features.context_codec, features.last_codec))
    writer = CacheWriter(options.cache, identity, prepared.plan, prepared.index, dict(prepared.data.rows))
    if writer.complete:
        return Captured(writer.manifest, complete=True, reused=True, shards=0)
    written = 0
    if writer.pending() or not writer.target_written() or not writer.statistics_written():
        if prepared.target.device.type == "cpu":
            reuse_freed_memory()
        elif prepared.target.device.type == "cuda":
            torch.cuda.set_device(prepared.target.device)
        target = HFDSparkTargetModel(prepared.target.model(), prepared.layer_ids)
        statistics = writer.statistics(
            lambda: measure_statistics(target, identity, prepared.data, prepared.batching.order)
        )
        codecs = state_codecs(identity, statistics)
        proof = prove_target(target, identity, _proof_samples(prepared), codecs[LAST_HIDDEN])
        try:
            with stop_on_signals() as stop, Worker(writer.progress, place.label) as worker:
                filler = ShardFiller(target, identity, codecs, Clock())
                while True:
                    if not writer.target_written() and worker.claim(_TARGET):
                        _write_target(writer, prepared, target.model, proof)
                    written += capture_shards(
                        writer, worker, place, filler, prepared.batching, prepared.data, stop
                    )
                    done = writer.target_written() and not writer.pending()
                    if done or not worker.others_died(_waiting(writer, stop)):
                        break
        except FileNotFoundError:  # no progress/ any more
            if not writer.completed_by_another():
                raise
    manifest = writer.finalise()
    return Captured(manifest or writer.manifest, complete=manifest is not None, reused=False, shards=written)


def _waiting(writer: CacheWriter, stop: StopRequest) -> Callable[[int], None]:
    """What to do every second of a wait for signs of life: say so, once, and stop when asked to."""
    said = False

    def wait(processes: int) -> None:
        nonlocal said
        stop.check(f"{writer.path} keeps every finished shard, the same command continues")
        if not said:
            click.echo(
                f"what is left belongs to processes elsewhere ({processes}): waiting for a sign of life, "
                f"at most {DEAD_AFTER_SECONDS:.0f} seconds",
                err=True,
            )
        said = True

    return wait


def _proof_samples(prepared: PreparedCapture) -> list[TokenizedSample]:
    """Two samples that will share a batch, of different lengths if any two do; else the first alone."""
    lengths, order = prepared.data.facts.lengths, prepared.batching.order
    batches = [batch for batch in prepared.batching.batches if len(batch) > 1]
    uneven = (b for b in batches if lengths[order[b[0]]] != lengths[order[b[-1]]])
    batch = next(uneven, batches[0] if batches else prepared.batching.batches[0])
    return [prepared.data[int(order[i])] for i in sorted({batch[0], batch[-1]})]


def _write_target(
    writer: CacheWriter, prepared: PreparedCapture, model: nn.Module, proof: dict[str, float]
) -> None:
    """Keep what training needs of the target: config, tokenizer, embedding and head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    frozen = {"embed_tokens.weight": _compact(embedding)}
    if not prepared.shape.tied_embeddings:
        frozen["lm_head.weight"] = _compact(head)
    writer.write_target(prepared.target.files(), frozen, proof)


def _compact(weight: Tensor) -> Tensor:
    """A weight in bf16 where that loses nothing (a bf16 checkpoint run in fp32), else as it is."""
    weight = weight.detach().cpu()
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else weight.contiguous()


def capture_shards(
    writer: CacheWriter,
    worker: Worker,
    place: WorkerPlace,
    filler: ShardFiller,
    batching: CapturePlan,
    data: TokenizedData,
    stop: StopRequest,
) -> int:
    """Capture every shard that nobody else holds; return how many.

    The target works on one shard while those before it are hashed and written by threads.
    """
    plan, pending, clock = writer.manifest.plan, writer.pending(), filler.clock
    total = writer.manifest.num_tokens
    done = total - sum(plan.tokens[shard] for shard in pending)
    largest = max((writer.shard_bytes(shard) for shard in pending), default=0)
    name = f"capture {place.label}".strip()
    written = 0
    with (
        tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc=name, position=place.local_rank
        ) as bar,
        ShardDisk(largest, clock, pinned=filler.device.type == "cuda") as disk,
    ):

        def between(tokens: int) -> None:
            worker.captured(tokens)
            bar.update(tokens)
            disk.check()
            stop.check(f"{writer.path} keeps every finished shard, the same command continues")

        for shard in take_shards(writer, worker, place.rank, place.world):
            memory = disk.buffer()
            batches = [[data[int(batching.order[i])] for i in batch] for batch in batching.batches_of(shard)]
            filled = filler.fill(writer.new_shard(shard, memory), batches, between)
            disk.put(memory, _finish(writer, worker, shard, filled, clock))
            written += 1
    return written


def _finish(
    writer: CacheWriter, worker: Worker, shard: int, filled: FilledShard, clock: Clock
) -> Callable[[], None]:
    """What is left to do for a shard, in a thread: wait for its copies, check it, hash it, write it."""

    def finish() -> None:
        measured = filled.finish()
        writer.write_shard(shard, filled.buffer, measured, step=clock.step)
        worker.release(claim_name(shard))

    return finish
