"""Fill the buffer of one shard: the target's forward, encoding, copies, checks.

On a GPU nothing here blocks: forward and encoding run on its main stream, copies to page-locked memory on a
second one. The values that check the states are computed on the GPU, and looked at after the copies.
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
from capture.engines.checks import peaks_reason, problem, row_peaks
from capture.engines.engine import CaptureEngine, on_device
from capture.shards.clock import Clock
from capture.shards.peaks import ContextPeaks
from pipeline.cache import Identity
from pipeline.cache.fidelity import TEACHER_TV, Measured, checked_rows, measure_rows
from pipeline.cache.layout import LAST_HIDDEN, context_name, part_name
from pipeline.cache.prefixes import ContextRows
from pipeline.cache.rows import stored_rows
from pipeline.cache.shard import ShardBuffer
from pipeline.cache.skipped import REASONS, TOO_LARGE, state_rows
from pipeline.cache.statistics import StateCodec
from pipeline.device import if_it_fits, out_of_memory
from pipeline.errors import TargetError

# Maximum mean total variation between the stored teacher and the target over the few rows that are checked
# per shard: that of the proof (see `capture.engines.proof`), and room for an outlier among them.
MAX_SHARD_TEACHER_TV = 0.25
# Batches in flight on a GPU while the next one is prepared.
BATCHES_AHEAD = 2
# Called with a bad sample's number in its shard, the reason, and the state that shows it; raises to stop.
BadSample = Callable[[int, str, int | str | None], None]


def _refuse(sample: int, reason: str, key: int | str | None) -> None:
    """Raise TargetError for any bad sample."""
    raise TargetError(problem(f"place {sample} of a shard", reason, key, 0))


class Copier:
    """Copy to the CPU: asynchronously from a GPU, immediately from any other device."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Copy `source` into `out` on the CPU. The copy is complete after the wait that `mark` returns."""
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
        """Return `source` on the CPU. Its values are valid after the wait that `mark` returns."""
        if source.device.type != "cuda":
            return source.cpu()
        out = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self.copy(source, out)
        return out

    def mark(self) -> Callable[[], None]:
        """Return a function that waits for every copy started so far."""
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
    """A shard whose copies may be incomplete. Call `finish` before its bytes are used."""

    buffer: ShardBuffer
    samples: list[TokenizedSample]
    checked: list[int]
    """Rows of `last_hidden` to compare with the target's."""
    last_rows: list[int]
    """Each sample's number of rows of `last_hidden`."""
    found_bad: BadSample
    shared: list[int]
    """First rows of context that each sample has from the one before."""
    beginnings: dict[int, dict[int | str, Tensor]] = field(default_factory=dict)
    """Peaks, by state, of the rows that others have from a sample that could not be run, by its number."""
    bad: dict[int, str] = field(default_factory=dict)
    """Reason of each bad sample, by its number in the shard. `finish` completes it."""
    _filled: tuple[int, int, int] = (0, 0, 0)
    """Samples, rows of context and label rows filled so far."""
    _wait: Callable[[], None] = lambda: None
    _peaks: list[tuple[int | str, int, Tensor]] = field(default_factory=list)
    """For each state of each batch: its key, its first sample, and the largest absolute value of each row."""
    _measured: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, peaks: list[tuple[int | str, int, Tensor]], measured: list[dict[str, Tensor]]) -> None:
        """Keep values that `finish` will check after the copies."""
        self._peaks += peaks
        for values in measured:
            for name, value in values.items():
                self._measured.setdefault(name, []).append(value)

    def finish(self) -> Measured:
        """Wait for the copies, check every state, blank bad samples, and return the good ones' errors.

        Raises:
            TargetError: a teacher that differs from the target's; or what `found_bad` raises.
        """
        self._wait()
        ran = self._good_rows()
        context = ContextPeaks(self.lengths, self.shared, dict(self.bad), self.beginnings)
        for key, first, peaks in self._peaks:
            self._check_peaks(key, first, peaks.numpy(), context)
        good = torch.from_numpy(self._good_rows()[ran])
        self._blank()
        measured = {name: tuple(torch.cat(rows)[good].tolist()) for name, rows in self._measured.items()}
        variation = measured.get(TEACHER_TV) or (0.0,)
        if not sum(variation) / len(variation) <= MAX_SHARD_TEACHER_TV:
            raise TargetError(
                f"the stored teacher of {len(self.samples)} samples, among them the one at row "
                f"{self.samples[0].source_row + 1} of the data, differs from the target's: mean total "
                f"variation {sum(variation) / len(variation):.3f}, expected at most {MAX_SHARD_TEACHER_TV}"
            )
        return measured

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.input_ids) for sample in self.samples]

    def _check_peaks(self, key: int | str, first: int, peaks: np.ndarray, context: ContextPeaks) -> None:
        """Check the row peaks of consecutive samples, the first of which is the shard's sample `first`."""
        start, i = 0, first
        while start < len(peaks):
            of_last = key == LAST_HIDDEN
            rows = self.last_rows[i] if of_last else len(self.samples[i].input_ids) - self.shared[i]
            own = peaks[start : start + rows]
            reason = peaks_reason(own) if of_last else context.reason(key, i, own)
            if reason is not None:
                self.mark(i, reason, key)
            start, i = start + rows, i + 1

    def mark(self, sample: int, reason: str, key: int | str | None = None) -> None:
        """Mark a sample as bad, for the gravest of its reasons. Raises what `found_bad` does."""
        reason = min(reason, self.bad.get(sample, reason), key=REASONS.index)
        if self.bad.get(sample) != reason:
            self.bad[sample] = reason
            self.found_bad(sample, reason, key)

    def skipped(self) -> dict[str, list[int]]:
        """Return the bad samples by reason, as a shard's record holds them. Call it after `finish`."""
        found: dict[str, list[int]] = {}
        for sample in sorted(self.bad):
            found.setdefault(self.bad[sample], []).append(sample)
        return found

    def _good_rows(self) -> np.ndarray:
        """Return which of the checked rows belong to samples that are not known as bad, as bools."""
        ends = np.cumsum(self.last_rows)
        owners = np.searchsorted(ends, self.checked, side="right")
        return ~np.isin(owners, list(self.bad))

    def _blank(self) -> None:
        """Write zero bytes over the states of bad samples."""
        labels, number = np.array(self.last_rows), len(self.samples)
        last_ends = np.cumsum(labels)
        lengths, shared = np.array(self.lengths), np.array(self.shared)
        context = ContextRows(lengths, np.cumsum(lengths) - lengths, [number], shared)
        for i, own in context.unused(range(number), self.bad).items():
            last = slice(int(last_ends[i] - labels[i]), int(last_ends[i]))
            for _, rows in state_rows(self.buffer.tensors, own, last):
                rows.view(torch.uint8).zero_()


class ShardFiller:
    """Run the target over the batches of a shard and write the encoded rows into its buffer."""

    def __init__(
        self,
        engine: CaptureEngine,
        identity: Identity,
        codecs: Mapping[str, StateCodec],
        clock: Clock,
    ):
        self.engine, self._identity, self.clock = engine, identity, clock
        self.device = engine.device
        self._codecs = codecs
        self._copier = Copier(clock)
        self._limit = sys.maxsize
        """Maximum padded tokens per forward, lowered when the device runs out of memory."""

    @torch.no_grad()
    def fill(
        self,
        buffer: ShardBuffer,
        batches: Sequence[Sequence[TokenizedSample]],
        between: Callable[[int], None] = lambda tokens: None,
        found_bad: BadSample = _refuse,
        shared: Sequence[int] | None = None,
    ) -> FilledShard:
        """Run `batches`, the samples of one shard in order.

        Args:
            between: called after each batch with its number of tokens; raises to stop.
            found_bad: called with each bad sample's number in the shard, its reason and the state that shows
                it, here or by the shard's `finish`; raises to stop.
            shared: first rows of context that each sample has from the one before; None for none.

        Raises:
            TargetError: a layer did not run.
        """
        tensors = buffer.tensors
        samples = [sample for batch in batches for sample in batch]
        last_rows = [len(stored_rows(s.loss_mask, self._identity.features)) for s in samples]
        shared = [0] * len(samples) if shared is None else list(shared)
        checked = self._checked(samples, shared)
        shard = FilledShard(buffer, samples, checked, last_rows, found_bad, shared)
        tensors["input_ids"].copy_(torch.from_numpy(np.concatenate([s.input_ids for s in shard.samples])))
        tensors["loss_mask"].copy_(torch.from_numpy(np.concatenate([s.loss_mask for s in shard.samples])))
        ahead: deque[Callable[[], None]] = deque()
        self.engine.expect(batches)
        for batch in batches:
            for part in self._fitting(list(batch)):
                limit, bad = self._limit, len(shard.bad)
                self._run(shard, part)
                if len(shard.bad) > bad:  # a sample that fits nowhere says nothing about other batches
                    self._limit = limit
            ahead.append(self._copier.mark())
            if len(ahead) > BATCHES_AHEAD:
                with self.clock.step("waiting"):
                    ahead.popleft()()
            between(sum(len(sample.input_ids) for sample in batch))
        shard._wait = self._copier.mark()
        return shard

    def _checked(self, samples: Sequence[TokenizedSample], shared: list[int]) -> list[int]:
        """Return rows of `last_hidden` to check, among those whose context is not another sample's."""
        features = self._identity.features
        positions = [stored_rows(sample.loss_mask, features) for sample in samples]
        own = [rows >= start for rows, start in zip(positions, shared, strict=True)]
        chosen = checked_rows([int(np.count_nonzero(each)) for each in own], features)
        return np.flatnonzero(np.concatenate(own))[chosen].tolist()

    def _fitting(self, batch: list[TokenizedSample]) -> Iterator[list[TokenizedSample]]:
        """Yield the batch in parts within the limit of padded tokens, one sample at least."""
        rows = max(1, min(len(batch), self._limit // longest(batch)))
        for start in range(0, len(batch), rows):
            yield batch[start : start + rows]

    def _run(self, shard: FilledShard, batch: list[TokenizedSample]) -> None:
        """Forward, encode and copy the next batch, in halves if it does not fit the device's memory."""
        if self._fits(shard, batch):
            return
        if len(batch) == 1:
            # Memory of copies in flight is free after this wait: a second failure is the sample's own.
            self._copier.mark()()
            torch.cuda.empty_cache()
            if not self._fits(shard, batch):
                torch.cuda.empty_cache()
                first, token, last = shard._filled
                shard.mark(first, TOO_LARGE)
                rows = len(batch[0].input_ids) - shard.shared[first]
                shard._filled = (first + 1, token + rows, last + shard.last_rows[first])
                self._fill_beginning(shard, first, token)
            return
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

    def _fill_beginning(self, shard: FilledShard, sample: int, token: int) -> None:
        """Fill what the sample after one that could not be run has from it, by running that much of it.

        Args:
            token: first row of context of `sample`.
        """
        begin, end = shard.shared[sample], (*shard.shared, 0)[sample + 1]
        if end <= begin:
            return
        whole = shard.samples[sample]
        cut = TokenizedSample(whole.source_row, whole.input_ids[:end], whole.loss_mask[:end])
        states = if_it_fits(lambda: self.engine.states([cut]))
        if states is None or states.failed:  # nor can the next one be run, which begins so
            return
        for layer_id in self._identity.features.layer_ids:
            name, rows = context_name(layer_id), states.take(layer_id, np.arange(begin, end))
            self._store(shard, name, self._encode(name, rows), token)
            shard.beginnings.setdefault(sample, {})[layer_id] = self._peaks(rows)

    def _fits(self, shard: FilledShard, batch: list[TokenizedSample]) -> bool:
        """Run a batch and return True; False, keeping no memory of it, if it does not fit."""
        try:
            self._run_whole(shard, batch)
        except (RuntimeError, MemoryError) as error:  # its traceback keeps the batch's memory, and ends here
            if not out_of_memory(error):
                raise
            return False
        return True

    def _run_whole(self, shard: FilledShard, batch: list[TokenizedSample]) -> None:
        """Forward, encode and copy the next batch. It counts as filled only when all of it succeeded."""
        with self.clock.step("forward", self.device):
            states = self.engine.states(batch)
        first, token, last = shard._filled
        starts = np.cumsum([0, *(len(sample.input_ids) for sample in batch)])
        features = self._identity.features
        labels = [start + stored_rows(s.loss_mask, features) for start, s in zip(starts, batch, strict=False)]
        label_rows = np.concatenate(labels)  # numbers of tokens of the batch
        # Positions of the shard's checked label rows among this batch's label rows; none of a failed sample.
        ran = ~np.isin(np.searchsorted(starts, label_rows, side="right") - 1, list(states.failed))
        among = [i - last for i in shard.checked if last <= i < last + len(label_rows)]
        checked = np.array([i for i in among if ran[i]], np.int64)
        shared = shard.shared[first : first + len(batch)]
        # Numbers of the tokens whose context is stored; None is all.
        own = [np.arange(a + n, b) for a, b, n in zip(starts, starts[1:], shared, strict=False)]
        context = np.concatenate(own) if any(shared) else None
        checked_context = label_rows[checked]
        if context is not None:
            checked_context = np.searchsorted(context, checked_context)
        peaks, measured = [], []
        for layer_id in self._identity.features.layer_ids:
            rows = states.take(layer_id, context)
            name = context_name(layer_id)
            parts = self._encode(name, rows)
            peaks.append((layer_id, first, self._peaks(rows)))
            measured.append(self._compare(name, rows, parts, checked_context))
            self._store(shard, name, parts, token)
        if LAST_HIDDEN in self._codecs:
            rows = states.take(LAST_HIDDEN, label_rows)
            parts = self._encode(LAST_HIDDEN, rows)
            peaks.append((LAST_HIDDEN, first, self._peaks(rows)))
            measured.append(self._compare(LAST_HIDDEN, rows, parts, checked))
            self._store(shard, LAST_HIDDEN, parts, last)
        shard.add(peaks, measured)
        stored = int(starts[-1]) - sum(shared)
        shard._filled = (first + len(batch), token + stored, last + len(label_rows))
        for sample, reason in sorted(states.failed.items()):
            shard.mark(first + sample, reason)
            before = int(starts[sample]) - sum(shared[:sample])
            self._fill_beginning(shard, first + sample, token + before)

    def _encode(self, state: str, rows: Tensor) -> dict[str, Tensor]:
        with self.clock.step("encode", rows.device):
            return self._codecs[state].encode(rows)

    def _peaks(self, rows: Tensor) -> Tensor:
        with self.clock.step("check", rows.device):
            return self._copier.to_cpu(row_peaks(rows))

    def _store(self, shard: FilledShard, name: str, parts: dict[str, Tensor], start: int) -> None:
        """Copy the encoded parts of a state to its tensors, starting at row `start`."""
        for suffix, encoded in parts.items():
            out = shard.buffer.tensors[part_name(name, suffix)][start : start + len(encoded)]
            self._copier.copy(encoded, out)

    def _compare(
        self, name: str, rows: Tensor, parts: dict[str, Tensor], checked: np.ndarray
    ) -> dict[str, Tensor]:
        """Measure the error of storing the checked rows of a state, `[n, H]`: relative, and the teacher's."""
        if not len(checked):
            return {}
        with self.clock.step("check", rows.device):
            index = on_device(checked, rows.device)
            chosen = {suffix: encoded[index] for suffix, encoded in parts.items()}
            own = rows[index]
            values = measure_rows(name, self._codecs[name], own, chosen, self.engine.head, self._identity)
            return {what: self._copier.to_cpu(value) for what, value in values.items()}


def longest(samples: Sequence[TokenizedSample]) -> int:
    """Return the tokens of the longest sample."""
    return max(len(sample.input_ids) for sample in samples)
