"""Load packed batches from the cache onto a device.

A batch is one row of `P = batch_tokens` positions: samples end to end, then padding (document -1). For a
CPU, features are decoded from the page cache straight into the batch. For a GPU, stored bytes are copied
from the page cache into pinned memory and decoded on the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from pipeline.cache.direct import DirectReads
from pipeline.cache.layout import LAST_HIDDEN, context_name
from pipeline.cache.rows import runs
from pipeline.device import use_device
from train.data.ahead import fetched_ahead
from train.data.reads import Reads

Loaded = TypeVar("Loaded")

# Tokens read before this process releases the memory-mapped pages that they were read from.
RELEASE_TOKENS = 2048
# Batches read ahead, and threads that read them.
DEPTH, THREADS = 2, 2


@dataclass(frozen=True)
class PackedSample:
    """A sample and its position in a pack."""

    id: bytes
    start: int
    loss_mask: np.ndarray
    """`[S]` uint8."""


Arguments = dict[str, Tensor | np.ndarray]
"""Arguments of a draft's module by name. Tensors are on its device; arrays are facts that the host needs."""

Collate = Callable[[Sequence[PackedSample]], Arguments]
"""Function from a pack's samples to the arguments that a kind of draft adds, `[1, ..]`."""


@dataclass(kw_only=True)
class Pack:
    """Samples in one row of P tokens."""

    input_ids: Tensor  # [1, P] int64
    loss_mask: Tensor  # [1, P] uint8
    document_ids: Tensor  # [1, P] int32, -1 after the last sample
    collated: Arguments = field(default_factory=dict)
    """What this kind of draft adds."""
    num_tokens: int
    flops: float = 0.0
    """FLOPs of a forward and backward over the pack; 0 unless the loader counted them."""

    def fields(self) -> dict[str, Tensor]:
        """Return the fields that are tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def tensors(self) -> Arguments:
        """Return all fields and what was collated, by the names of the module's arguments."""
        return self.fields() | self.collated


@dataclass(kw_only=True)
class Batch(Pack):
    """A pack with the target's states, the input of a draft's module.

    A cache without last hidden states gives None for them.
    """

    target_hidden_states: Tensor  # [1, P, L, H] bfloat16, of any strides, zero after the last sample
    target_last_hidden_states: Tensor | None  # [1, P, H] bfloat16, zero where no loss can use it

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; on a CPU the batch itself."""
        if device.type == "cpu":
            return self
        collated = _each_tensor(self.collated, lambda tensor: tensor.to(device))
        fields = {name: tensor.to(device) for name, tensor in self.fields().items()}
        return replace(self, **fields, collated=collated)


@dataclass(kw_only=True)
class EncodedBatch(Pack):
    """A pack with the target's states as stored, in memory that a GPU can copy from."""

    reader: CacheReader
    context: dict[int, dict[str, Tensor]]
    """The stored tensors of each layer, by layer id and suffix, `[num_tokens, ..]`."""
    last_hidden: dict[str, Tensor] | None
    """The stored tensors of the last hidden states, by suffix, `[M, ..]`; None if the cache has none."""
    last_positions: Tensor
    """Positions of those rows in the pack, `[M]`."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device and decode there, on the device's current stream."""

        def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        tokens = there(self.fields())
        collated = _each_tensor(self.collated, lambda tensor: tensor.to(device, non_blocking=True))
        positions = tokens.pop("last_positions")
        hidden, width = self.reader.hidden_size, self.input_ids.shape[1]
        context = torch.empty(width, len(self.context), hidden, dtype=torch.bfloat16, device=device)
        context[self.num_tokens :] = 0
        for column, (layer_id, parts) in enumerate(self.context.items()):
            out = context[: self.num_tokens, column]
            self.reader.codec(context_name(layer_id)).decode(there(parts), out)
        last_hidden = None
        if self.last_hidden is not None:
            states = torch.empty(len(positions), hidden, dtype=torch.bfloat16, device=device)
            self.reader.codec(LAST_HIDDEN).decode(there(self.last_hidden), states)
            last_hidden = context.new_zeros(width, hidden).index_copy_(0, positions, states)
        counts = {"num_tokens": self.num_tokens, "flops": self.flops}
        return Batch(**tokens, **counts, **_states(context, last_hidden), collated=collated)


def _each_tensor(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return arguments with every tensor changed; arrays stay as they are, on the host."""
    return {n: change(value) if isinstance(value, Tensor) else value for n, value in arguments.items()}


def _states(context: Tensor, last_hidden: Tensor | None) -> dict[str, Tensor | None]:
    last = None if last_hidden is None else last_hidden[None]
    return {"target_hidden_states": context[None], "target_last_hidden_states": last}


def load_pack(reader: CacheReader, samples: Sequence[int], batch_tokens: int, collate: Collate) -> Pack:
    """Lay the tokens of samples into one row. Read no features.

    Args:
        samples: sample numbers, of at most `batch_tokens` tokens together; no sample gives a pack of padding.
        collate: function that makes the tensors of the kind of draft.
    """
    input_ids = torch.zeros(batch_tokens, dtype=torch.int64)
    loss_mask = torch.zeros(batch_tokens, dtype=torch.uint8)
    document_ids = torch.full((batch_tokens,), -1, dtype=torch.int32)
    packed, start = [], 0
    for document, i in enumerate(samples):
        ids, mask = reader.tokens(i)
        rows = slice(start, start + len(ids))
        input_ids[rows], loss_mask[rows], document_ids[rows] = ids, mask, document
        packed.append(PackedSample(reader.sample_ids[i].tobytes(), start, mask.numpy()))
        start += len(ids)
    return Pack(
        input_ids=input_ids[None],
        loss_mask=loss_mask[None],
        document_ids=document_ids[None],
        collated=collate(packed),
        num_tokens=start,
    )


def load_batch(
    reader: CacheReader,
    samples: Sequence[int],
    layer_ids: Sequence[int],
    batch_tokens: int,
    collate: Collate,
    memory: Tensor | None = None,
) -> Batch:
    """Read samples into a batch on the CPU. Decode each feature row straight into its place.

    Args:
        memory: memory for the states, from `batch_memory`; None allocates it.
    """
    pack = load_pack(reader, samples, batch_tokens, collate)
    memory = batch_memory(reader, layer_ids, batch_tokens) if memory is None else memory
    context = memory[: len(layer_ids)]  # layer by layer, so that stored rows fill contiguous memory
    context[:, pack.num_tokens :] = 0
    last_hidden = memory[-1].zero_() if reader.has_last_hidden else None
    for i, rows in _places(reader, samples, layer_ids):
        for layer_id, states in zip(layer_ids, context, strict=True):
            reader.read_rows(i, context_name(layer_id), slice(None), states[rows])
        if last_hidden is None:
            continue
        begin = 0
        for run in runs(reader.last_positions(pack.loss_mask[0, rows]).numpy()):
            end = begin + run.stop - run.start
            reader.read_rows(i, LAST_HIDDEN, slice(begin, end), last_hidden[rows][run])
            begin = end
    return Batch(**vars(pack), **_states(context.transpose(0, 1), last_hidden))


def batch_memory(reader: CacheReader, layer_ids: Sequence[int], batch_tokens: int) -> Tensor:
    """Allocate the states of a batch, `[L + 1, P, H]` bfloat16: the layers, then any last hidden states."""
    return torch.empty(
        len(layer_ids) + reader.has_last_hidden, batch_tokens, reader.hidden_size, dtype=torch.bfloat16
    )


def load_encoded_batch(
    reader: CacheReader,
    samples: Sequence[int],
    layer_ids: Sequence[int],
    batch_tokens: int,
    collate: Collate,
    *,
    pin: bool = True,
    threads: DirectReads | None = None,
) -> EncodedBatch:
    """Read samples as stored into a batch that `EncodedBatch.to` copies to a device and decodes.

    Args:
        pin: read into page-locked memory, so that copies to a GPU are asynchronous.
        threads: read states past the page cache, by these; None reads through it.
    """
    pack = load_pack(reader, samples, batch_tokens, collate)
    num_last = sum(reader.num_last_rows(i) for i in samples)
    positions = torch.empty(num_last, dtype=torch.int64, pin_memory=pin)

    def buffers(state: str, rows: int) -> dict[str, Tensor]:
        specs = reader.codec(state).codec.specs(rows, reader.hidden_size)
        return {
            name: torch.empty(shape, dtype=dtype, pin_memory=pin) for name, (dtype, shape) in specs.items()
        }

    context = {layer_id: buffers(context_name(layer_id), pack.num_tokens) for layer_id in layer_ids}
    last_hidden, begin = buffers(LAST_HIDDEN, num_last) if reader.has_last_hidden else None, 0
    wanted: list[tuple[int, str, dict[str, Tensor]]] = []
    for i, rows in _places(reader, samples, [] if threads else layer_ids):
        last_rows = slice(begin, begin + reader.num_last_rows(i))
        states = [(context_name(layer_id), parts, rows) for layer_id, parts in context.items()]
        if last_hidden is not None:
            states.append((LAST_HIDDEN, last_hidden, last_rows))
        for state, parts, own in states:
            out = {name: part[own] for name, part in parts.items()}
            if threads is None:
                reader.fetch(i, state, out)
            else:
                wanted.append((i, state, out))
        positions[last_rows] = reader.last_positions(pack.loss_mask[0, rows]) + rows.start
        begin = last_rows.stop
    if threads is not None:
        threads.read([piece for each in wanted for piece in reader.pieces(*each)])
        for each in wanted:
            reader.check_scales(*each)
    values = dict(vars(pack))
    if pin:
        values |= {name: tensor.pin_memory() for name, tensor in pack.fields().items()}
        values["collated"] = _each_tensor(pack.collated, Tensor.pin_memory)
    return EncodedBatch(
        **values, reader=reader, context=context, last_hidden=last_hidden, last_positions=positions
    )


def _places(
    reader: CacheReader, samples: Sequence[int], layer_ids: Sequence[int]
) -> Iterator[tuple[int, slice]]:
    """Yield each sample with its rows of the pack. Request readahead first, and release the pages read.

    Args:
        layer_ids: those to be read ahead, with the last hidden states; none reads nothing ahead.
    """
    states = [*map(context_name, layer_ids), *([LAST_HIDDEN] if reader.has_last_hidden else [])]
    for i in samples if layer_ids else ():
        reader.read_ahead(i, states)
    start, released, begun = 0, 0, set[int]()
    for i in samples:
        stop = start + int(reader.lengths[i])
        yield i, slice(start, stop)
        begun.add(reader.shard_of(i))
        if stop - released >= RELEASE_TOKENS:
            reader.release(begun)
            begun, released = set(), stop
        start = stop
    reader.release(begun)


def prefetch(
    jobs: Iterable[Callable[[], Loaded]],
    device: torch.device,
    depth: int = DEPTH,
    threads: int = THREADS,
) -> Iterator[Loaded]:
    """Run loading jobs on threads, `depth` ahead, and yield their results in order.

    A job's error is raised in place of its result.

    Args:
        device: device that the results go to, current in the threads.
    """
    with ThreadPoolExecutor(
        threads, thread_name_prefix="batches", initializer=use_device, initargs=(device,)
    ) as pool:
        pending: deque[Future[Loaded]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def loaded(
    reader: CacheReader,
    packs: Iterable[tuple[Sequence[int], Collate]],
    layer_ids: Sequence[int],
    batch_tokens: int,
    device: torch.device,
    count_flops: Callable[[Pack], float] = lambda _pack: 0.0,
    reads: Reads | None = None,
) -> Iterator[Batch]:
    """Yield batches on a device, in order. Threads read ahead.

    Use a batch before asking for the next one: on a CPU its memory is then reused.

    Args:
        packs: the samples of each batch and their collate function.
        count_flops: function that computes each batch's `flops`.
        reads: decides which batches are read past the page cache; None reads none so.

    Raises:
        CacheError: a sample is damaged; raised in place of its batch, on a GPU one batch earlier.
    """
    packs = fetched_ahead(reader, packs)
    # Reuse memory: page faults on fresh memory take longer than the copying.
    free: SimpleQueue[Tensor] = SimpleQueue()
    on_gpu = device.type == "cuda"
    for _ in range(0 if on_gpu else DEPTH + 1):  # the batches ahead, and the one in use
        free.put(batch_memory(reader, layer_ids, batch_tokens))

    def load(samples: Sequence[int], collate: Collate) -> tuple[Batch | EncodedBatch, Tensor | None]:
        direct = reads is not None and reads.direct()
        memory = None if direct or on_gpu else free.get()  # first: a wait for the consumer is no reading
        chosen = (reader, samples, layer_ids, batch_tokens, collate)
        with nullcontext() if reads is None else reads.timed(direct, samples):
            if memory is not None:
                batch = load_batch(*chosen, memory)
            else:
                threads = reads.threads if direct and reads is not None else None
                batch = load_encoded_batch(*chosen, pin=on_gpu, threads=threads)
                batch = batch if on_gpu else batch.to(device)
        batch.flops = count_flops(batch)
        return batch, memory

    def told(jobs: Iterable[tuple[Batch | EncodedBatch, Tensor | None]]) -> Iterator:
        try:
            for job in jobs:
                if reads is not None:
                    reads.tell()
                yield job
        finally:
            if reads is not None:
                reads.close()

    jobs = told(prefetch((partial(load, *pack) for pack in packs), device))
    if on_gpu:
        yield from _copied((batch for batch, _ in jobs), device)
        return
    for batch, memory in jobs:
        yield batch.to(device)
        if memory is not None:
            free.put(memory)


def _copied(batches: Iterator[EncodedBatch], device: torch.device) -> Iterator[Batch]:
    """Copy and decode one batch ahead of the one in use, on a separate stream."""
    stream = torch.cuda.Stream(device)
    ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def take() -> Batch:
        batch, copied = ahead.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in filter(torch.is_tensor, batch.tensors().values()):
            tensor.record_stream(current)  # so that its memory is not reused while that stream reads it
        return batch

    for encoded in batches:
        with torch.cuda.stream(stream):
            batch = encoded.to(device)
            ahead.append((batch, stream.record_event()))
        if len(ahead) > 1:
            yield take()
    while ahead:
        yield take()
