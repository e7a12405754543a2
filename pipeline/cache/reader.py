"""Read a complete cache: any sample, with any subset of its layers, through a memory map."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.cached_sample import CachedSample, read_sample
from pipeline.cache.codecs import get_codec
from pipeline.cache.direct import Piece
from pipeline.cache.features import LABELS
from pipeline.cache.frozen import read_frozen
from pipeline.cache.index import check_skipped, count_candidates, open_index, sample_ids
from pipeline.cache.index import sample_id as content_id
from pipeline.cache.layout import LAST_HIDDEN, context_name, part_name
from pipeline.cache.manifest import INDEX, MANIFEST, Manifest, read_manifest
from pipeline.cache.prefixes import ContextRows, within
from pipeline.cache.rows import last_hidden_columns, slices_of, stored_rows
from pipeline.cache.shard import MappedShard, advise
from pipeline.cache.shards import LocalShards, check_files
from pipeline.cache.statistics import StateCodec, check_statistics_listed, read_statistics, state_codecs
from pipeline.cache.verify import FileChecks
from pipeline.cache.wanted import check_last_hidden, check_layers, check_rows
from pipeline.errors import CacheError
from pipeline.remote.address import Address, Place, parse_place

if TYPE_CHECKING:
    from pipeline.cache.remote.local import LocalStore

# Scales beyond it could decode to infinity (FORMAT.md, rule 9).
MAX_SCALE = 2.0**60


class CacheReader:
    """Read access to a complete cache. Samples are numbered from 0, without those that the cache skips.

    Opening reads the manifest, maps the index and checks the other small files. It touches no shard, so its
    time does not depend on their contents. A shard is checked and mapped when first read; `check_shards`
    checks all of them at once. Nothing is ever written.

    Args:
        place: the cache directory, or its address in an object store, or a text that names either.
        hidden: rows that reads of last hidden states give: `labels` for the label rows, which training needs;
            `all-tokens` for every token's, of a cache that has them.
        store: local store of a cache in an object store, by default that of the machine.

    Raises:
        CacheError: missing, incomplete, of another version, damaged, or without the rows of `hidden`.
        StoreError: the object store can't be read.
    """

    def __init__(self, place: str | Place, *, hidden: str = LABELS, store: LocalStore | None = None):
        self.place = parse_place(place) if isinstance(place, str) else place
        """Directory or address of the cache, as messages name it."""
        if isinstance(self.place, Address):
            from pipeline.cache.remote.shards import open_remote  # needs obstore

            self.path, self.files = open_remote(self.place, store)
            self.manifest: Manifest = self.files.manifest
        else:
            self.path, self.manifest = self.place, read_manifest(self.place)
            self.files = LocalShards(self.path, self.manifest)
            """Its shards, wherever they are."""
        if self.manifest.status != "complete":
            done = len(list((self.path / "progress").glob("[0-9]*.json")))
            work = "conversion" if self.manifest.history else "capture"
            raise CacheError(
                f"{self.path} is incomplete ({done} of {len(self.manifest.plan)} shards written): "
                f"run the same {work} again to finish it"
            )
        features = self.manifest.identity.features
        self.layer_ids: tuple[int, ...] = features.layer_ids
        self.has_last_hidden: bool = features.has_last_hidden
        """True if the cache has last hidden states, from which the teacher's logits are computed."""
        check_rows(self.place, features, hidden)
        self._features, self._wanted = features, replace(features, hidden=hidden)
        self.hidden_size: int = self.manifest.identity.target.hidden_size
        for codec in features.codecs:
            get_codec(codec)  # an unknown one is refused before anything else is read
        check_statistics_listed(self.path, self.manifest)
        check_files(self.path, self.manifest)
        self._codecs = state_codecs(
            self.manifest.identity, read_statistics(self.path, self.manifest.identity)
        )
        table = open_index(self.path / INDEX, self.manifest.plan)
        check_skipped(table, self.path / MANIFEST, self.manifest.skipped)
        self._read_index(table)
        self._alone: set[int] = set()

    def _read_index(self, table: pa.Table) -> None:
        """Take the columns of the index, without its skipped samples."""
        skipped = self.manifest.skipped
        self._context = ContextRows.of(table, self.manifest.plan.samples)
        kept = np.flatnonzero(skipped.kept(len(table))) if len(skipped) else slice(None)
        self.numbers = np.arange(len(table))[kept]
        """Row of the index of each sample, by which messages and commands name it."""
        ids = sample_ids(table)
        self.sample_ids, self.skipped_ids = ids[kept], ids[list(skipped.sample)]
        self.sources, self.source_rows = (table[n].to_numpy()[kept] for n in ("source", "source_row"))
        self.shards, self._start, self.lengths, self._labels, self.candidates = (
            table[name].to_numpy()[kept]
            for name in ("shard", "token_start", "length", "last_rows", "candidates")
        )
        last, given = last_hidden_columns(self._features), last_hidden_columns(self._wanted).number
        self._last_start, self._stored_rows, self.last_rows = (
            table[name].to_numpy()[kept] for name in (last.start, last.number, given)
        )

    def check_shards(self) -> None:
        """Check that every shard exists and has its size, so that a run can't fail half way.

        Asks the filesystem once per shard, which takes seconds for the largest caches, or for one listing of
        an object store; so opening does not.

        Raises:
            CacheError: names the first shard that is missing or has another size.
        """
        self.files.check()

    def only(self, layer_ids: Sequence[int]) -> None:
        """Fetch no other layers from now on, if the cache lives in an object store."""
        self.files.only([*map(context_name, layer_ids), LAST_HIDDEN])

    def alone(self, samples: Iterable[int]) -> None:
        """Fetch these samples one by one, not their shards, if the cache lives in an object store.

        For a few samples out of many shards, such as those held out.
        """
        if self.files.remote:
            self._alone |= set(map(int, samples))

    @contextmanager
    def tokens_only(self) -> Iterator[None]:
        """Fetch token ids and masks without any state, within a block."""
        before = self.files.only(())
        try:
            yield
        finally:
            self.files.only(before)

    @contextmanager
    def briefly_alone(self, samples: Iterable[int]) -> Iterator[None]:
        """Fetch samples as `alone` does, within a block."""
        before = set(self._alone)
        self.alone(samples)
        try:
            yield
        finally:
            self._alone = before

    def __len__(self) -> int:
        return len(self.shards)

    def sample_id(self, i: int) -> str:
        """Return the id of sample `i`, in hex: a hash of its content, the same in every cache."""
        return self.sample_ids[i].tobytes().hex()

    def require_layers(self, layer_ids: Sequence[int]) -> tuple[int, ...]:
        """Check that the cache holds `layer_ids` and return them. Raises CacheError, naming a missing one."""
        check_layers(self.place, self._features, layer_ids)
        return tuple(layer_ids)

    def require_last_hidden(self, user: str) -> None:
        """Check that the cache has last hidden states. Raise CacheError if not.

        Args:
            user: what needs them, for the message.
        """
        check_last_hidden(self.place, self._features, user)

    def _tokens_of(self, i: int) -> slice:
        """Return where the token ids of sample `i` lie in what `piece` names."""
        if not 0 <= i < len(self):
            raise IndexError(f"expected a sample from 0 to {len(self) - 1}, got {i}")
        start = 0 if i in self._alone else int(self._start[i])
        return slice(start, start + int(self.lengths[i]))

    def _stored(self, i: int, state: str) -> list[slice]:
        """Return where all rows of a state of sample `i` lie in what `piece` names, as slices in order."""
        tokens = self._tokens_of(i)
        if state == LAST_HIDDEN:
            start = 0 if i in self._alone else int(self._last_start[i])
            return [slice(start, start + int(self._stored_rows[i]))]
        return [tokens] if i in self._alone else self._context.places(int(self.numbers[i]))

    def tokens(self, i: int) -> tuple[Tensor, Tensor]:
        """Return views of a sample's `input_ids` `[S]` int32 and `loss_mask` `[S]` uint8.

        Raises:
            CacheError: they contradict the index, the sample's id or the vocabulary.
        """
        tokens, shard = self._tokens_of(i), self._shard_of(i).tensors
        input_ids, loss_mask = shard["input_ids"][tokens], shard["loss_mask"][tokens]
        low, high = input_ids.aminmax()
        if low < 0 or high >= self.manifest.identity.target.vocab_size:
            raise self._damaged_sample(i, "has token ids outside the vocabulary")
        ids, mask = input_ids.numpy(), loss_mask.numpy()
        counts = (int(mask[1:].sum()), count_candidates(mask))
        if mask.max() > 1 or not mask[-1] or counts != (self._labels[i], self.candidates[i]):
            raise self._damaged_sample(i, "has a loss mask that contradicts the index")
        if content_id(ids, mask) != self.sample_ids[i].tobytes():
            raise self._damaged_sample(i, "has other tokens than its id says")
        return input_ids, loss_mask

    def _damaged_sample(self, i: int, reason: str) -> CacheError:
        shard = self.files.name(self.shard_of(i))
        return CacheError(
            f"{shard} is damaged (sample {self.numbers[i]} {reason}): run `dspark verify`, or capture again"
        )

    def layer_view(self, i: int, layer_id: int) -> Tensor:
        """Return a layer's stored features of sample `i`: `[S, H]` bfloat16 for codec bf16.

        A view, unless the sample shares rows with others that do not lie before its own.
        """
        return self.parts(i, context_name(layer_id))[""]

    def codec(self, state: str) -> StateCodec:
        """Return the codec of one state (`context.<layer id>` or `last_hidden`), with its statistics."""
        return self._codecs[state]

    def parts(self, i: int, state: str) -> dict[str, Tensor]:
        """Return views of one state's stored tensors of sample `i`, by suffix, for its codec to decode.

        Args:
            state: `context.<layer id>`, which has S rows, or `last_hidden`, which has M; a copy where the
                cache has other rows between them.

        Raises:
            CacheError: a scale that is not finite, or beyond `MAX_SCALE`; for `last_hidden`, a damaged mask.
        """
        shard = self._shard_of(i)
        parts, places = self._parts(i, state, shard), self._places(i, state, shard)
        if len(places) == 1:
            return {suffix: part[places[0]] for suffix, part in parts.items()}
        return {suffix: torch.cat([part[rows] for rows in places]) for suffix, part in parts.items()}

    def _shard_of(self, i: int) -> MappedShard:
        return self.files.map(self.piece(i))

    def piece(self, i: int) -> Hashable:
        """Return what is fetched and mapped to read sample `i`: the number of its shard, or its own rows."""
        if i not in self._alone:
            return int(self.shards[i])
        from pipeline.cache.remote.shards import SampleRows

        start, last = int(self._start[i]), int(self._last_start[i])
        tokens, rows = start + int(self.lengths[i]), last + int(self._stored_rows[i])
        context = tuple((p.start, p.stop) for p in self._context.places(int(self.numbers[i])))
        return SampleRows(
            int(self.numbers[i]),
            self.sample_ids[i].tobytes(),
            int(self.shards[i]),
            (start, tokens),
            context,
            (last, rows),
        )

    def _tensors(self, state: str, shard: MappedShard) -> dict[str, Tensor]:
        """Return a state's tensors of a shard, by suffix."""
        suffixes = self._codecs[state].codec.specs(1, self.hidden_size)
        return {suffix: shard.tensors[part_name(state, suffix)] for suffix in suffixes}

    def _places(self, i: int, state: str, shard: MappedShard, rows: slice = slice(None)) -> list[slice]:
        """Return where the rows of a state that reads give lie in a shard, as slices in order.

        Args:
            rows: some of them, counted from 0.
        """
        stored = self._stored(i, state)
        if state != LAST_HIDDEN or self._wanted.hidden == self._features.hidden:
            return within(stored, rows)
        mask = shard.tensors["loss_mask"][self._tokens_of(i)].numpy()
        if np.count_nonzero(mask[1:]) != self._labels[i]:
            raise self._damaged_sample(i, "has a loss mask that contradicts the index")
        runs = slices_of(mask, self._wanted, self._features, rows)
        return [place for run in runs for place in within(stored, run)]

    def _parts(self, i: int, state: str, shard: MappedShard) -> dict[str, Tensor]:
        """Return a state's tensors in the given map of the shard, because another thread may map it again."""
        parts = self._tensors(state, shard)
        for rows in self._stored(i, state) if "scale" in parts else []:
            self.check_scales(i, state, {"scale": parts["scale"][rows]})
        return parts

    def read_ahead(self, i: int, states: Iterable[str]) -> None:
        """Ask the kernel to read these states of sample `i`, and nothing around them, from the disk."""
        shard = self._shard_of(i)
        for state in states:
            tensors = self._tensors(state, shard).values()
            for rows in self._places(i, state, shard):
                for tensor in tensors:
                    shard.read_ahead(tensor[rows])

    def release(self, shards: Iterable[int]) -> None:
        """Drop these shards' pages from this process's memory; they stay in the page cache.

        Call it rarely: it interrupts every processor that runs this process.
        """
        for shard in filter(None, map(self.files.mapped, shards)):
            advise(mmap.MADV_DONTNEED, *shard.tensors.values())

    def fetch(self, i: int, state: str, out: Mapping[str, Tensor]) -> None:
        """Copy one state's stored tensors of sample `i` into contiguous CPU tensors, by suffix.

        Raises:
            CacheError: see `parts`; a file that ends too early.
        """
        for piece in self.pieces(i, state, out):
            piece.shard.read(piece.view, piece.out)
        self.check_scales(i, state, out)

    def pieces(self, i: int, state: str, out: Mapping[str, Tensor]) -> Iterator[Piece]:
        """Yield what `fetch` copies. Its scales are then to be checked by `check_scales`."""
        shard, start = self._shard_of(i), 0
        parts = self._tensors(state, shard)
        for rows in self._places(i, state, shard):
            stop = start + rows.stop - rows.start
            for suffix, part in parts.items():
                yield Piece(shard, part[rows], out[suffix][start:stop])
            start = stop

    def check_scales(self, i: int, state: str, parts: Mapping[str, Tensor]) -> None:
        """Refuse a sample with scales that rule 9 forbids. Raises CacheError."""
        if "scale" in parts and not bool((parts["scale"].abs() <= MAX_SCALE).all()):
            raise self._damaged_sample(i, f"has a scale of {state} that is not finite or beyond 2^60")

    def read_rows(self, i: int, state: str, rows: slice, out: Tensor) -> None:
        """Decode some rows of one state of sample `i` into `out` `[n, H]` bfloat16 on the CPU.

        Raises:
            CacheError: see `fetch`.
        """
        bound, shard, start = self._codecs[state], self._shard_of(i), 0
        parts = self._parts(i, state, shard)
        for place in self._places(i, state, shard, rows):
            stored = {suffix: part[place] for suffix, part in parts.items()}
            some = out[start : start + len(stored[""])]
            start += len(some)
            if bound.codec.name == "bf16" and some.is_contiguous():
                shard.read(stored[""], some)
            else:
                bound.decode(stored, some)

    def read_context(self, i: int, layer_ids: Sequence[int], out: Tensor) -> None:
        """Decode a sample's context features into `out` `[S, L*H]`, layers in the order given."""
        for column, layer_id in enumerate(layer_ids):
            columns = slice(column * self.hidden_size, (column + 1) * self.hidden_size)
            state = context_name(layer_id)
            self._codecs[state].decode(self.parts(i, state), out[:, columns])

    def read_last_hidden(self, i: int, out: Tensor) -> None:
        """Decode a sample's last hidden states into `out` `[M, H]`. Raises CacheError if there are none."""
        self.require_last_hidden("this read")
        self._codecs[LAST_HIDDEN].decode(self.parts(i, LAST_HIDDEN), out)

    def last_positions(self, loss_mask: Tensor) -> Tensor:
        """Return the positions `[M]` of the last hidden states that reads of a sample give."""
        return torch.from_numpy(stored_rows(loss_mask.numpy(), self._wanted))

    def num_last_rows(self, i: int) -> int:
        """Return M, the number of rows of last hidden states that reads of sample `i` give if it has any."""
        return int(self.last_rows[i])

    def read(self, i: int, layer_ids: Sequence[int] | None = None) -> CachedSample:
        """Read sample `i` with these layers, by default all of the cache's, as copies.

        Raises:
            CacheError: a layer the cache lacks, or a damaged shard.
            IndexError: no such sample.
        """
        return read_sample(self, i, self.require_layers(self.layer_ids if layer_ids is None else layer_ids))

    def frozen(self) -> dict[str, Tensor]:
        """Read the target's `embed_tokens.weight` and `lm_head.weight` `[V, H]`; one tensor if tied."""
        return read_frozen(self.path, self.manifest.identity.target)

    def shard_of(self, i: int) -> int:
        """Return the number of sample `i`'s shard."""
        return int(self.shards[i])

    def verify(self, progress: Callable[[int], None] = lambda _bytes: None) -> list[str]:
        """Hash every file again and return the names of those that differ from the manifest.

        Args:
            progress: called with the size of every block read.
        """
        with FileChecks(self.path, self.manifest, progress=progress) as checks:
            return [bad.file for bad in checks.problems(self.manifest.all_files())]
