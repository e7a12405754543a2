"""One shard of a cache, from the target's forward to the bytes in a buffer.

On a GPU nothing here waits for it: forward and encoding run on its main stream, copies to page-locked memory
on a second one, and what checks the states is computed there too and looked at when the copies are done.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from capture.console import note
from capture.data.conversations import TokenizedSample
from capture.shards.clock import Clock
from capture.target import HFDSparkTargetModel
from pipeline.cache import Identity, last_hidden_rows
from pipeline.cache.fidelity import TEACHER_TV, Measured, measure_rows, spread
from pipeline.cache.layout import LAST_HIDDEN, context_name, part_name
from pipeline.cache.shard import ShardBuffer
from pipeline.cache.statistics import StateCodec
from pipeline.errors import TargetError
from pipeline.hooks import input_device

# Mean total variation above which the stored teacher is not the target's. bf16 rounding of the logits alone
# costs about 0.01; a teacher from before the final norm costs 0.3 or more.
MAX_TEACHER_TV = 0.05
# The same over the few rows that are checked in a shard, among which one may be an odd one.
MAX_SHARD_TEACHER_TV = 0.25
# Batches that may be under way on a GPU while the next one is prepared.
BATCHES_AHEAD = 2


class Copier:
    """Copies to the CPU: beside the computation from a GPU, at once from anywhere else."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Copy `source` into `out` on the CPU; done once `mark()`'s wait is over."""
        if source.device.type != "cuda":
            with self._clock.step("copy"):
                out.copy_(source)
            return
        if source.device not in self._streams:
            self._streams[source.device] = torch.cuda.Stream(source.device)
        stream = self._streams[source.device]
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream), self._clock.step("copy", source.device):
            out.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def to_cpu(self, source: Tensor) -> Tensor:
        """`source` on the CPU; its values are there once `mark()`'s wait is over."""
        if source.device.type != "cuda":
            return source.cpu()
        out = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self.copy(source, out)
        return out

    def mark(self) -> Callable[[], None]:
        """A function that waits for every copy asked for so far."""
        events = []
        for device, stream in self._streams.items():
            with torch.cuda.device(device):
                events.append(torch.cuda.Event(blocking=True))
                events[-1].record(stream)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait


@dataclass
class FilledShard:
    """A shard whose copies may still be under way. Call `finish` before its bytes are used."""

    buffer: ShardBuffer
    samples: list[TokenizedSample]
    checked: list[int]
    """Label rows that are compared with the target's."""
    _filled: tuple[int, int, int] = (0, 0, 0)
    """Samples, tokens and label rows that are in so far."""
    _wait: Callable[[], None] = lambda: None
    _peaks: list[tuple[int | str, int, Tensor]] = field(default_factory=list)
    """Of each state of each batch: its key, its first sample, and the largest value of each row."""
    _measured: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, peaks: list[tuple[int | str, int, Tensor]], measured: list[dict[str, Tensor]]) -> None:
        """Keep what is to be looked at once the copies are done."""
        self._peaks += peaks
        for values in measured:
            for name, value in values.items():
                self._measured.setdefault(name, []).append(value)

    def finish(self) -> Measured:
        """Wait for the copies, check every state, and return what was measured.

        Raises:
            TargetError: NaN, infinity or zeros, or a teacher that is not the target's; naming the sample.
        """
        self._wait()
        for key, first, peaks in self._peaks:
            self._check_peaks(key, first, peaks.numpy())
        measured = {name: tuple(torch.cat(rows).tolist()) for name, rows in self._measured.items()}
        variation = measured.get(TEACHER_TV, (0.0,))
        if not sum(variation) / len(variation) <= MAX_SHARD_TEACHER_TV:
            raise TargetError(
                f"the stored teacher of {len(self.samples)} samples, among them the one at row "
                f"{self.samples[0].source_row + 1} of the data, differs from the target's: mean total "
                f"variation {sum(variation) / len(variation):.3f}, expected at most {MAX_SHARD_TEACHER_TV}"
            )
        return measured

    def _check_peaks(self, key: int | str, first: int, peaks: np.ndarray) -> None:
        """`peaks` are the largest values of the rows of consecutive samples, from the shard's `first` on."""
        start, i = 0, first
        while start < len(peaks):
            sample = self.samples[i]
            rows = len(last_hidden_rows(sample.loss_mask)) if key == LAST_HIDDEN else len(sample.input_ids)
            check_peaks(peaks[start : start + rows], key, sample)
            start, i = start + rows, i + 1


def state_name(key: int | str) -> str:
    """What messages call a state."""
    return "the last hidden state" if key == LAST_HIDDEN else f"layer {key}"


def check_peaks(peaks: np.ndarray, key: int | str, sample: TokenizedSample) -> None:
    """Refuse states that no draft should learn from, given the largest absolute value of each row."""
    if not np.isfinite(peaks).all():
        problem = "holds NaN or infinity"
    elif not peaks.any():
        problem = "is all zero"
    else:
        return
    raise TargetError(
        f"{state_name(key)} of the sample at row {sample.source_row + 1} of the data {problem}: "
        "check the target's weights, or try --dtype float32"
    )


def row_peaks(rows: Tensor) -> Tensor:
    """The largest absolute value of each row `[n, H]`: `[n]` fp32, NaN where there is one."""
    return rows.abs().amax(dim=1).float()


class ShardFiller:
    """Runs the target over the batches of a shard and lays the encoded rows into its buffer."""

    def __init__(
        self,
        target: HFDSparkTargetModel,
        identity: Identity,
        codecs: Mapping[str, StateCodec],
        clock: Clock,
    ):
        self.target, self._identity, self.clock = target, identity, clock
        self.device = input_device(target.model)
        self._codecs = codecs
        self._copier = Copier(clock)
        self._limit = sys.maxsize
        """Padded tokens of a forward that fit the device, as far as is known."""

    @torch.no_grad()
    def fill(
        self,
        buffer: ShardBuffer,
        batches: Sequence[Sequence[TokenizedSample]],
        between: Callable[[int], None] = lambda tokens: None,
    ) -> FilledShard:
        """Run `batches`, the samples of one shard in order.

        Args:
            between: called after each batch with its number of tokens; may raise to stop.

        Raises:
            TargetError: a sample does not fit the device's memory, or a layer did not run.
        """
        tensors = buffer.tensors
        samples = [sample for batch in batches for sample in batch]
        label_rows = sum(len(last_hidden_rows(sample.loss_mask)) for sample in samples)
        shard = FilledShard(buffer, samples, spread(label_rows))
        tensors["input_ids"].copy_(torch.from_numpy(np.concatenate([s.input_ids for s in shard.samples])))
        tensors["loss_mask"].copy_(torch.from_numpy(np.concatenate([s.loss_mask for s in shard.samples])))
        ahead: deque[Callable[[], None]] = deque()
        for batch in batches:
            for part in self._fitting(list(batch)):
                self._run(shard, part)
            ahead.append(self._copier.mark())
            if len(ahead) > BATCHES_AHEAD:
                with self.clock.step("waiting"):
                    ahead.popleft()()
            between(sum(len(sample.input_ids) for sample in batch))
        shard._wait = self._copier.mark()
        return shard

    def _fitting(self, batch: list[TokenizedSample]) -> Iterator[list[TokenizedSample]]:
        """The batch in parts of at most as many padded tokens as were seen to fit."""
        rows = max(1, min(len(batch), self._limit // longest(batch)))
        for start in range(0, len(batch), rows):
            yield batch[start : start + rows]

    def _run(self, shard: FilledShard, batch: list[TokenizedSample]) -> None:
        """Forward, encode and copy the next batch; in halves where it does not fit the device's memory."""
        try:
            return self._run_whole(shard, batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise TargetError(
                    f"the sample at row {batch[0].source_row + 1} of the data, {longest(batch):,} tokens, "
                    f"does not fit the memory of {self.device} by itself: lower --max-length, or spread the "
                    "target over more GPUs with --device-map auto"
                ) from error
        # Outside the handler, whose traceback would keep the failed batch's memory.
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        if self._limit == sys.maxsize:
            note(
                f"warning: {len(batch)} rows of {longest(batch):,} tokens do not fit the memory of "
                f"{self.device}: such batches are split from now on"
            )
        self._limit = min(self._limit, half * longest(batch))
        self._run(shard, batch[:half])
        self._run(shard, batch[half:])

    def _run_whole(self, shard: FilledShard, batch: list[TokenizedSample]) -> None:
        """Forward, encode and copy the next batch. Nothing is counted as filled unless all of it is."""
        with self.clock.step("forward", self.device):
            states = self.target.states(pad(batch, self.device))
        first, token, last = shard._filled
        lengths = [len(sample.input_ids) for sample in batch]
        width = max(lengths)
        token_rows = np.concatenate([row * width + np.arange(n) for row, n in enumerate(lengths)])
        labels = [last_hidden_rows(sample.loss_mask) for sample in batch]
        label_rows = np.concatenate([row * width + rows for row, rows in enumerate(labels)])
        # Which of the shard's checked label rows are here, and where they lie among this batch's rows.
        checked = np.array([i - last for i in shard.checked if last <= i < last + len(label_rows)], np.int64)
        checked_tokens = np.searchsorted(token_rows, label_rows[checked])
        token_index, label_index = self._index(token_rows), self._index(label_rows)
        peaks, measured = [], []
        for layer_id in self._identity.features.layer_ids:
            rows = states.pop(layer_id).flatten(0, 1)
            rows = rows[token_index.to(rows.device)] if len(token_rows) < len(rows) else rows
            name = context_name(layer_id)
            parts = self._encode(name, rows)
            peaks.append((layer_id, first, self._peaks(rows)))
            measured.append(self._compare(name, rows, parts, checked_tokens))
            self._store(shard, name, parts, token)
        rows = states.pop(LAST_HIDDEN).flatten(0, 1)
        rows = rows[label_index.to(rows.device)]
        parts = self._encode(LAST_HIDDEN, rows)
        peaks.append((LAST_HIDDEN, first, self._peaks(rows)))
        measured.append(self._compare(LAST_HIDDEN, rows, parts, checked))
        self._store(shard, LAST_HIDDEN, parts, last)
        shard.add(peaks, measured)
        shard._filled = (first + len(batch), token + len(token_rows), last + len(label_rows))

    def _encode(self, state: str, rows: Tensor) -> dict[str, Tensor]:
        with self.clock.step("encode", rows.device):
            return self._codecs[state].encode(rows)

    def _peaks(self, rows: Tensor) -> Tensor:
        with self.clock.step("check", rows.device):
            return self._copier.to_cpu(row_peaks(rows))

    def _store(self, shard: FilledShard, name: str, parts: dict[str, Tensor], start: int) -> None:
        """Copy the encoded parts of a state to its tensors, from row `start` on."""
        for suffix, encoded in parts.items():
            out = shard.buffer.tensors[part_name(name, suffix)][start : start + len(encoded)]
            self._copier.copy(encoded, out)

    def _compare(
        self, name: str, rows: Tensor, parts: dict[str, Tensor], checked: np.ndarray
    ) -> dict[str, Tensor]:
        """What storing does to some of a state's rows `[n, H]`: their relative error, and the teacher's."""
        if not len(checked):
            return {}
        with self.clock.step("check", rows.device):
            index = self._index(checked).to(rows.device)
            chosen = {suffix: encoded[index] for suffix, encoded in parts.items()}
            head = self.target.get_output_embeddings().weight
            values = measure_rows(name, self._codecs[name], rows[index], chosen, head, self._identity)
            return {what: self._copier.to_cpu(value) for what, value in values.items()}

    def _index(self, rows: np.ndarray) -> Tensor:
        """Row numbers on the device."""
        index = torch.from_numpy(rows.astype(np.int64))
        return index.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else index


def longest(samples: Sequence[TokenizedSample]) -> int:
    """Tokens of the longest sample."""
    return max(len(sample.input_ids) for sample in samples)


def pad(samples: Sequence[TokenizedSample], device: torch.device) -> Tensor:
    """Right-pad samples to `input_ids` `[B, S]` on `device`."""
    ids = torch.zeros(len(samples), longest(samples), dtype=torch.long, pin_memory=device.type == "cuda")
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.from_numpy(sample.input_ids)
    return ids.to(device, non_blocking=True)
