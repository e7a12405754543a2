"""Batches read past the page cache are those read through it, and auto takes the faster way."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from pipeline.cache import CacheReader
from pipeline.cache.direct import READ_BYTES, DirectReads, Piece
from pipeline.cache.shard import MappedShard, map_shard, open_direct, shard_buffer
from pipeline.cache.tools.convert import convert
from pipeline.errors import CacheError, ConfigError
from tests.conftest import assert_refused, run_cli
from train.data import reads as module
from train.data.loader import load_encoded_batch, loaded
from train.data.packing import epoch_packs
from train.data.reads import TRIALS, TURNS, Reads, available_memory, used_bytes
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors

CPU = torch.device("cpu")
COLLATE = collate_anchors(random_anchors(16, 0, 0))


@pytest.fixture(autouse=True)
def whole_blocks_on_any_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reads go through the page cache where temporary files have none past it."""
    (tmp_path / "probe").write_bytes(b"0" * 4096)
    if open_direct(tmp_path / "probe") is None:
        for place in ("shard", "shards"):
            monkeypatch.setattr(
                f"pipeline.cache.{place}.open_direct", lambda path: os.open(path, os.O_RDONLY)
            )


def shard_of(path: Path, rows: int) -> dict:
    specs = {
        "wide": (torch.float32, (rows, 300)),
        "odd": (torch.uint8, (rows, 7)),
        "half": (torch.bfloat16, (rows,)),
    }
    buffer = shard_buffer(specs)
    for tensor in buffer.tensors.values():
        tensor.view(torch.uint8).random_(0, 255)
    path.write_bytes(buffer.bytes())
    return specs


def test_every_byte_arrives_wherever_a_piece_begins(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    shard = map_shard(path, shard_of(path, 4001), direct=True)
    pieces = []
    for name, tensor in shard.tensors.items():
        for rows in (
            slice(0, 1),
            slice(1, 2),
            slice(5, 2000),
            slice(3990, 4001),
            slice(0, 4001),
            slice(7, 7),
        ):
            pieces.append(Piece(shard, tensor[rows], torch.zeros_like(tensor[rows])))
        assert name
    assert max(piece.view.nbytes for piece in pieces) > 2 * READ_BYTES
    reads = DirectReads(4)
    reads.read(pieces)
    reads.close()
    for piece in pieces:
        assert torch.equal(piece.view.view(torch.uint8), piece.out.view(torch.uint8))


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    shard = map_shard(path, shard_of(path, 4001), direct=True)
    view = shard.tensors["wide"][3000:]
    piece = Piece(shard, view, torch.empty_like(view))
    for size in (4096 * 3, 4096 * 3 + 17, shard.offset(view) + 5000):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(CacheError, match=f"{path} is damaged .it was cut"):
            DirectReads(1).read([piece])


@pytest.fixture(params=["bf16", "nf4"])
def encoded(request, tmp_path: Path, cache_dir: Path) -> Path:
    convert(cache_dir, tmp_path / "cache", context_codec=request.param)
    return tmp_path / "cache"


def batches(cache: Path, how: str | None) -> list[dict]:
    reader = CacheReader(cache)
    layers, packs = reader.layer_ids, epoch_packs(reader.lengths, 256, 0, 0)
    reads = None if how is None else Reads(reader, how, layers, 10**12, 0)
    found = loaded(reader, ((pack, COLLATE) for pack in packs), layers, 256, CPU, reads=reads)
    return [
        {name: value.clone() for name, value in batch.tensors().items() if torch.is_tensor(value)}
        for batch in found
    ]


def test_batches_are_the_same_bits_either_way(encoded: Path) -> None:
    want = batches(encoded, None)
    assert len(want) > 5
    for how in ("mmap", "direct", "auto"):
        got = batches(encoded, how)
        for one, other in zip(got, want, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]), (how, name)


def test_direct_reads_no_page_of_the_states(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def through(*_: object) -> None:
        raise AssertionError("read through the page cache")

    reader = CacheReader(encoded)
    reads = Reads(reader, "direct", reader.layer_ids, 10**12, 0)
    monkeypatch.setattr(MappedShard, "read", through)
    monkeypatch.setattr(MappedShard, "read_ahead", through)
    packs = itertools.islice(epoch_packs(reader.lengths, 256, 0, 0), 3)
    for pack in packs:
        load_encoded_batch(reader, pack, reader.layer_ids, 256, COLLATE, pin=False, threads=reads.threads)
    reads.close()


@pytest.mark.parametrize(
    ("past", "through", "chosen"), [(5.0, 1.0, True), (1.0, 5.0, False), (1.05, 1.0, False)]
)
def test_auto_takes_the_faster_way_and_says_so(cache_dir, monkeypatch, past, through, chosen) -> None:
    reader, said = CacheReader(cache_dir), []
    reads = Reads(reader, "auto", reader.layer_ids, 10**12, 0, said.append)
    ways = []
    for number in range(2 * TRIALS * TURNS):
        way = reads.direct()
        ways.append(way)
        times = iter([0.0, 1.0 / (past if way else through)])
        monkeypatch.setattr(module.time, "perf_counter", lambda times=times: next(times))
        assert not said
        with reads.timed(way, [number % TRIALS] if number % 3 else []):  # as where ranks lack a pack
            pass
        reads.tell()
    assert ways == [way for _ in range(TURNS) for way in (False, True) for _ in range(TRIALS)]
    assert {reads.direct() for _ in range(40)} == {chosen}
    assert said[0].startswith(f"reading {'past' if chosen else 'through'} the page cache: ")
    reads.close()


def test_a_wait_for_the_consumer_is_not_timed_as_reading(encoded: Path, monkeypatch) -> None:
    inside = threading.local()

    class Watched(SimpleQueue):
        def get(self, *rest: object) -> object:
            assert not getattr(inside, "timed", False), "waits for memory while it is timed"
            return super().get(*rest)

    @contextmanager
    def timed(self: Reads, direct: bool, samples: object) -> Iterator[None]:
        inside.timed = True
        yield
        inside.timed = False

    monkeypatch.setattr("train.data.loader.SimpleQueue", Watched)
    monkeypatch.setattr(Reads, "timed", timed)
    assert len(batches(encoded, "auto")) > 5


def test_auto_keeps_to_the_page_cache_where_memory_holds_the_cache(cache_dir) -> None:
    reader = CacheReader(cache_dir)
    reads = Reads(reader, "auto", reader.layer_ids, 100, 100)
    assert not any(reads.direct() for _ in range(9))
    assert reads.threads is None


def test_used_bytes_are_those_of_the_states_read(cache_dir) -> None:
    reader = CacheReader(cache_dir)
    layers, samples = reader.layer_ids[:2], range(len(reader))
    tensors = [reader.parts(i, f"context.{layer}") for i in samples for layer in layers]
    tensors += [reader.parts(i, "last_hidden") for i in samples]
    assert used_bytes(reader, samples, layers) == sum(t.nbytes for parts in tensors for t in parts.values())


@pytest.mark.parametrize(
    ("limit", "found"), [(None, 4000), ("max", 4000), ("10000", 4000), ("2000", 2000 - 1500 + 700)]
)
def test_memory_is_the_machines_or_what_its_container_leaves(tmp_path, limit, found) -> None:
    assert available_memory() is None or available_memory() > 2**20
    assert available_memory(tmp_path) is None
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    (group / "memory.current").write_text("1500\n")
    (group / "memory.stat").write_text("anon 800\nfile 700\n")
    if limit is not None:
        (group / "memory.max").write_text(f"{limit}\n")
    assert available_memory(tmp_path) == (found if limit == "2000" else 4096)


def test_reads_that_a_disk_refuses_go_through_its_page_cache(tmp_path, monkeypatch) -> None:
    path = tmp_path / "shard"
    shard = map_shard(path, shard_of(path, 4001), direct=True)
    real = os.preadv

    def refused(file: int, *rest: object) -> int:
        if file == shard.direct:
            raise OSError(22, "Invalid argument")
        return real(file, *rest)

    monkeypatch.setattr(os, "preadv", refused)
    piece = Piece(shard, shard.tensors["wide"], torch.zeros(4001, 300))
    reads = DirectReads(2)
    reads.read([piece])
    assert torch.equal(piece.out.view(torch.uint8), piece.view.view(torch.uint8))
    monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(CacheError, match=f"{path} can't be read .Input/output error"):
        reads.read([piece])
    reads.close()


def test_a_disk_without_such_reads_is_named(cache_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.cache.shards.open_direct", lambda _path: None)
    reader = CacheReader(cache_dir)
    with pytest.raises(ConfigError, match='"direct" reads past the page cache, which the disk of'):
        Reads(reader, "direct", reader.layer_ids, 10**12, 0)
    assert not Reads(reader, "auto", reader.layer_ids, 10**12, 0).direct()
    config = Path(__file__).parents[2] / "configs" / "example.toml"
    settings = ("draft.target_layer_ids=[2]", "draft.draft_vocab_size=100", 'train.reader="direct"')
    changes = [word for setting in settings for word in ("--set", setting)]
    result = run_cli("train", "--cache", cache_dir, "--config", config, "--run", tmp_path / "run", *changes)
    assert_refused(result, 2, "which the disk of", 'set it to "auto" or "mmap"')
