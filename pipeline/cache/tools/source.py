"""A complete cache to convert, in a directory or an object store, whose files are hashed before use."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import Statistics
from pipeline.cache.codecs.base import peaks
from pipeline.cache.contents import SampleChecks
from pipeline.cache.features import FeatureIdentity
from pipeline.cache.layout import LAST_HIDDEN, part_name, shard_specs
from pipeline.cache.manifest import FROZEN, INDEX, FileRecord, Identity, Manifest, shard_file
from pipeline.cache.prefixes import ContextRows
from pipeline.cache.price import Price, cache_price
from pipeline.cache.reader import MAX_SCALE, CacheReader
from pipeline.cache.remote.mirror import REMEDY
from pipeline.cache.rows import last_hidden_columns, stored_rows
from pipeline.cache.shard import map_shard
from pipeline.cache.skipped import SkippedRows
from pipeline.cache.statistics import (
    TOKENS,
    StateStatistics,
    chosen_samples,
    read_statistics,
    standardised_states,
    state_codecs,
)
from pipeline.cache.verify import FileChecks, Problem
from pipeline.cache.writer import CacheWriter
from pipeline.errors import CacheError
from pipeline.remote.address import Address, Place


class Source:
    """A complete cache whose files are hashed before use.

    Raises:
        CacheError: missing, incomplete, or with damaged files.
        StoreError: the object store can't be read.
    """

    def __init__(self, place: Place):
        self.place, self.reader = place, CacheReader(place)
        path = self.path = self.reader.path
        """Directory of its small files: the cache, or their copies on this machine."""
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
        if not problems:
            return
        if isinstance(self.place, Address):
            where, remedy = f"{self.place}/{problems[0].file}", REMEDY
        else:
            where = self.place / problems[0].file
            repair = f"`dspark verify {self.place} --repair` sets damaged files aside for capture to rewrite"
            remedy = f"{repair}; then run this again"
        raise CacheError(f"{where} is damaged ({problems[0].reason}): {remedy}")

    def price(self, identity: Identity) -> Price:
        """Return the size of this cache with other features."""
        target = sum(r.bytes for r in self.manifest.files if r.file.startswith("target/"))
        return cache_price(identity, self.manifest.plan, self.manifest.rows, self.index, target)

    def shard(self, shard: int) -> dict[str, Tensor]:
        """Return views of a shard's stored tensors. Hashes the file unless it was the last one used."""
        if self._shard[0] != shard:
            self._shard = (-1, {})  # unmaps the last one: one is mapped at a time
            if self.reader.files.remote:
                self._shard = (shard, self._fetched(shard))
                return self._shard[1]
            name, shards = shard_file(shard), self.manifest.shards
            record = FileRecord(file=name, bytes=shards.bytes[shard], sha256=shards.sha256[shard])
            with FileChecks(self.path, self.manifest, threads=1) as checks:
                self._refuse(checks.problems([record], self.index))
            specs = shard_specs(self.identity, self.manifest.plan[shard])
            self._shard = (shard, map_shard(self.path / name, specs).tensors)
        return self._shard[1]

    def _fetched(self, shard: int) -> dict[str, Tensor]:
        """Return what the reader fetches of a shard in an object store, compared with its hashes."""
        tensors = self.reader.files.map(shard).tensors
        contents = SampleChecks(self.manifest, self.index, self.skipped)
        problem = contents.problem(shard, tensors["input_ids"].numpy(), tensors["loss_mask"].numpy())
        problem = problem or contents.not_blank(shard, tensors)
        self._refuse([Problem(shard_file(shard), problem)] if problem else [])
        return tensors

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
                f"{self.reader.files.name(shard)} is damaged (it has a {'value' if good else 'scale'} of "
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
