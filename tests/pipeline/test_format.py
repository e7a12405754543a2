"""Golden bytes: a cache packed by hand reads back exactly, and the writer's bytes are the hand's."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline import files
from pipeline.cache import (
    CacheReader,
    CacheWriter,
    SampleFacts,
    build_index,
    count_candidates,
    last_hidden_rows,
    plan_shards,
    sample_id,
)
from pipeline.cache.manifest import Identity
from pipeline.cache.shard import DTYPE_NAMES, file_bytes, file_layout, map_shard, shard_buffer
from pipeline.config import build
from tests.pipeline.handmade import (
    CANDIDATES,
    HIDDEN,
    LABEL_ROWS,
    LAYERS,
    MASKS,
    SHARDS,
    TOKENS,
    VOCAB,
    HandCache,
    bf16,
    context_rows,
    embed_rows,
    hand_columns,
    hand_manifest,
    hand_shard,
    head_rows,
    last_rows,
    name_of,
)
from tests.pipeline.written import Writing, make_identity, make_sample

# The bytes of format version 1. They may change only together with the version.
SHARD_0_SHA256 = "4b8fd771d9a4a8cb10e2e11f687d7bfa39fc77845c1a5a2cafb45c29910d0974"
INDEX_SHA256 = "1131af89569cf1c4c964bcda0ff05fa0640c68abde6e00a40122ee92effa5da6"


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return HandCache().save(tmp_path_factory.mktemp("hand") / "cache")


def side_by_side(sample: int, layers: tuple[int, ...]) -> list[list[float]]:
    """The layers' rows joined left to right."""
    columns = [context_rows(sample, layer) for layer in layers]
    return [[value for rows in columns for value in rows[p]] for p in range(len(TOKENS[sample]))]


def test_the_example_row_of_the_format_page():
    assert bf16([[1.0, -2.5]]).hex(" ") == "80 3f 20 c0"


def test_a_cache_made_by_hand_reads_back_exactly(hand):
    reader = CacheReader(hand)
    assert len(reader) == 3
    assert reader.layer_ids == LAYERS
    assert reader.hidden_size == HIDDEN
    assert reader.verify() == []
    for i in range(3):
        sample = reader.read(i)
        assert sample.sample_id == name_of(i).hex() == reader.sample_id(i)
        assert (sample.input_ids.dtype, sample.loss_mask.dtype) == (torch.int32, torch.uint8)
        assert sample.input_ids.tolist() == list(TOKENS[i])
        assert sample.loss_mask.tolist() == list(MASKS[i])
        assert sample.context.dtype == sample.last_hidden.dtype == torch.bfloat16
        assert sample.context.tolist() == side_by_side(i, LAYERS)
        assert sample.last_hidden.tolist() == last_rows(i)
        assert sample.last_positions.tolist() == list(LABEL_ROWS[i])
        assert reader.candidates[i] == CANDIDATES[i]
        assert reader.lengths[i] == len(TOKENS[i])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_subset_of_layers_in_any_order(hand, count):
    reader = CacheReader(hand)
    for layers in permutations(LAYERS, count):
        for i in range(3):
            assert reader.read(i, layers).context.tolist() == side_by_side(i, layers)


def test_a_layer_view_is_that_layer(hand):
    reader = CacheReader(hand)
    for i in range(3):
        for layer in LAYERS:
            assert reader.layer_view(i, layer).tolist() == context_rows(i, layer)


def test_frozen_weights_by_hand(hand):
    frozen = CacheReader(hand).frozen()
    assert frozen.keys() == {"embed_tokens.weight", "lm_head.weight"}
    assert frozen["embed_tokens.weight"].tolist() == embed_rows()
    assert frozen["lm_head.weight"].tolist() == head_rows()
    assert frozen["lm_head.weight"].dtype == torch.bfloat16


def test_tied_frozen_weights_are_one_tensor(tmp_path):
    cache = HandCache()
    cache.manifest["identity"]["target"]["tied_embeddings"] = True
    del cache.frozen.entries[0]
    frozen = CacheReader(cache.save(tmp_path)).frozen()
    assert frozen["lm_head.weight"].tolist() == frozen["embed_tokens.weight"].tolist() == embed_rows()
    assert frozen["lm_head.weight"].data_ptr() == frozen["embed_tokens.weight"].data_ptr()


def test_the_embedding_and_post_norm_layers_can_be_stored(tmp_path):
    """Ids -1 and num_layers - 1 are legal; opening such a cache warns that SGLang can't serve them."""
    cache = HandCache()
    cache.manifest["identity"]["features"]["layer_ids"] = [-1, 2, 6]
    for shard in cache.shards:
        shard.entry("context.0")[0] = "context.-1"
        shard.entry("context.5")[0] = "context.6"
    cache.save(tmp_path)
    with pytest.warns(UserWarning, match="SGLang"):
        reader = CacheReader(tmp_path)
    assert reader.read(0, [6, -1]).context.tolist() == side_by_side(0, (5, 0))


def test_a_cache_can_be_moved(hand, tmp_path):
    """Rule 18: nothing in it knows where it lies."""
    moved = shutil.copytree(hand, tmp_path / "elsewhere")
    assert CacheReader(moved).read(1).input_ids.tolist() == list(TOKENS[1])
    assert str(hand).encode() not in (hand / "manifest.json").read_bytes()


def test_an_index_of_many_record_batches_is_the_same_index(hand, tmp_path):
    """An Arrow file may cut its rows anywhere."""

    def one_row_each(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        return sink.getvalue().to_pybytes()

    reader = CacheReader(HandCache(edit_index=one_row_each).save(tmp_path))
    assert [reader.sample_id(i) for i in range(3)] == [name_of(i).hex() for i in range(3)]
    assert reader.read(2).context.tolist() == side_by_side(2, LAYERS)


def test_the_small_functions_agree_with_the_hand():
    for i in range(3):
        ids, mask = np.array(TOKENS[i], dtype=np.int64), np.array(MASKS[i], dtype=np.uint8)
        assert sample_id(ids, mask) == name_of(i)
        assert last_hidden_rows(mask).tolist() == list(LABEL_ROWS[i])
        assert count_candidates(mask) == CANDIDATES[i]


# --- The other way: the writer's bytes, parsed by hand -------------------------------------------


# What was measured of two shards' rows, and the figures that follow: their sum is 2.25; the
# 99th percentile of five sorted values is 96% of the way from the fourth to the fifth.
MEASURED = ((0.25, 0.5, 0.5), (0.25, 0.75))
FIDELITY = {
    "proof_tv_max": 0.125,
    "teacher_tv_mean": 0.45,
    "teacher_tv_p99": pytest.approx(0.5 + 0.96 * 0.25),
    "teacher_tv_rows": 5.0,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same content through CacheWriter."""
    path = tmp_path_factory.mktemp("written") / "cache"
    facts = SampleFacts(
        sample_ids=np.array([list(name_of(i)) for i in range(3)], dtype=np.uint8),
        sources=np.array([0, 0, 1]),
        source_rows=np.array([0, 2, 0]),
        lengths=np.array([len(tokens) for tokens in TOKENS]),
        last_rows=np.array([len(rows) for rows in LABEL_ROWS]),
        candidates=np.array(CANDIDATES),
    )
    index, plan = build_index(facts, plan_shards([5, 4, 2], 9))
    manifest = hand_manifest()
    writer = CacheWriter(path, build(Identity, manifest["identity"]), plan, index, manifest["rows"])
    others = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    frozen = {
        "embed_tokens.weight": torch.tensor(embed_rows()).bfloat16(),
        "lm_head.weight": torch.tensor(head_rows()).bfloat16(),
    }
    writer.write_target(others, frozen, {"proof_tv_max": 0.125})
    for shard, members in enumerate(SHARDS):
        tensors = {
            "input_ids": torch.tensor([t for i in members for t in TOKENS[i]], dtype=torch.int32),
            "loss_mask": torch.tensor([m for i in members for m in MASKS[i]], dtype=torch.uint8),
            "last_hidden": torch.tensor([row for i in members for row in last_rows(i)]).bfloat16(),
        }
        for layer in LAYERS:
            rows = [row for i in members for row in context_rows(i, layer)]
            tensors[f"context.{layer}"] = torch.tensor(rows).bfloat16()
        buffer = writer.new_shard(shard)
        assert buffer.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            buffer.tensors[name].copy_(tensor)
        writer.write_shard(shard, buffer, {"teacher_tv": MEASURED[shard]})
    assert writer.finalise() is not None
    return path


def parse(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length].decode("utf-8")), data[8 + length :]


@pytest.mark.parametrize("shard", [0, 1])
def test_a_written_shard_holds_the_bytes_packed_by_hand(written, shard):
    header, body = parse((written / f"shards/{shard:05d}.safetensors").read_bytes())
    expected = {name: (dtype, shape, data) for name, dtype, shape, data in hand_shard(SHARDS[shard]).entries}
    assert header.keys() == expected.keys()  # hence no __metadata__
    spans = []
    for name, (dtype, shape, data) in expected.items():
        assert header[name].keys() == {"dtype", "shape", "data_offsets"}
        start, stop = header[name]["data_offsets"]
        assert (header[name]["dtype"], header[name]["shape"]) == (dtype, shape)
        assert body[start:stop] == data
        spans.append((start, stop))
    spans.sort()
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == len(body)


def test_a_written_shard_is_byte_for_byte_the_golden_one(written):
    data = (written / "shards/00000.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHARD_0_SHA256


def logical_bytes(columns: dict[str, list]) -> bytes:
    """Every column's values one after another, little-endian, whatever the file looks like."""
    widths = {"source": "i", "source_row": "q", "shard": "i", "token_start": "q", "length": "i"}
    widths |= {"last_start": "q", "last_rows": "i", "candidates": "i"}
    packed = b"".join(columns["sample_id"])
    for name, letter in widths.items():
        packed += name.encode() + struct.pack(f"<{len(columns[name])}{letter}", *columns[name])
    return packed


def test_the_index_by_hand_and_the_written_one_are_the_golden_one(hand, written):
    assert hashlib.sha256(logical_bytes(hand_columns())).hexdigest() == INDEX_SHA256
    for cache in (hand, written):
        table = pa.ipc.open_file(pa.memory_map(str(cache / "samples.arrow"))).read_all()
        assert table.schema.names == list(hand_columns())
        assert not any(f.nullable for f in table.schema)
        assert hashlib.sha256(logical_bytes(table.to_pydict())).hexdigest() == INDEX_SHA256


def test_the_written_index_is_not_compressed(written):
    """Rule 10's page head: a reader maps it without reading it, so its values lie in the file as they are."""
    data = (written / "samples.arrow").read_bytes()
    assert data.startswith(b"ARROW1")
    assert b"".join(hand_columns()["sample_id"]) in data
    assert struct.pack("<3q", *hand_columns()["token_start"]) in data


# --- The library's bytes: a written file is what safetensors itself writes -----------------------


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes as a tensor, NaNs and all."""
    count = math.prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape) if count else torch.zeros(shape, dtype=dtype)


def from_the_library(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    save_file(tensors, path)
    return path.read_bytes()


DTYPES = list(DTYPE_NAMES)
LAYOUTS: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "every dtype, names in their order": {f"t{i}": (d, (3, 5)) for i, d in enumerate(DTYPES)},
    "every dtype, names against it": {f"t{9 - i}": (d, (3, 5)) for i, d in enumerate(DTYPES)},
    "every dtype twice, odd sizes": {
        f"{word}.{i}": (d, (size, 7))
        for i, d in enumerate(DTYPES)
        for word, size in (("context", 13), ("last", 1))
    },
    "layers by number and by name": {
        f"context.{i}": (torch.bfloat16, (9, 3)) for i in (-1, 0, 1, 2, 9, 10, 11, 27, 100)
    },
    "a codec of several parts": {
        name: spec
        for i in (1, 8, 14)
        for name, spec in {
            f"context.{i}": (torch.uint8, (11, 3)),
            f"context.{i}.scale": (torch.bfloat16, (11, 1)),
            f"context.{i}.mean": (torch.float32, (11,)),
            f"context.{i}.half": (torch.float16, (11, 5)),
        }.items()
    },
    "names beyond ASCII": dict.fromkeys(("ä", "z", "Z", "~", "_", "😀", "a b"), (torch.uint8, (3,))),
    "one byte": {"x": (torch.uint8, (1,))},
    "nothing in it": {
        "empty": (torch.float32, (0, 4)),
        "x": (torch.uint8, (5,)),
        "none": (torch.int32, (0,)),
    },
    "many dimensions": {"x": (torch.int32, (1, 2, 3, 1)), "y": (torch.float16, (1,))},
    # The header's padding takes every length from 0 to 7.
    **{f"a name of {n}": {"x" * n: (torch.uint8, (n,)), "y": (torch.bfloat16, (3,))} for n in range(1, 9)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_laid_out_in_memory_is_what_the_library_writes(tmp_path, name):
    tensors = {key: filled(*spec, seed=i) for i, (key, spec) in enumerate(LAYOUTS[name].items())}
    expected = from_the_library(tensors, tmp_path / "library")
    assert b"".join(file_bytes(tensors)) == expected
    assert file_layout(LAYOUTS[name]).size == len(expected)
    # Filled through its views; in memory of its own, and in larger memory that held something else.
    for memory in (None, torch.full((len(expected) + 100,), 0xA5, dtype=torch.uint8)):
        buffer = shard_buffer(LAYOUTS[name], memory)
        assert buffer.tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert buffer.tensors[key].dtype == tensor.dtype
            buffer.tensors[key].copy_(tensor)
        assert bytes(buffer.bytes()) == expected
        if memory is not None:
            assert memory[len(expected) :].eq(0xA5).all()


def test_frozen_weights_that_do_not_lie_in_order_are_written_in_order(tmp_path):
    """A head that is a transposed view, or a slice of something larger, and one that wants a gradient."""
    table = torch.arange(60.0).view(6, 10)
    tensors = {"lm_head.weight": table.T, "embed_tokens.weight": table[:, 2:5]}
    expected = from_the_library({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "library")
    assert b"".join(file_bytes(tensors)) == expected
    assert b"".join(file_bytes({k: t.clone().requires_grad_() for k, t in tensors.items()})) == expected


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2, 9, 10, 11)])
def test_the_files_of_a_written_cache_are_what_the_library_writes(tmp_path, layers):
    """Shards and frozen weights, untied, of odd sizes."""
    samples = [make_sample([0] * (i % 3) + [1] * (2 + i), layers, hidden=5, seed=i) for i in range(6)]
    identity = make_identity(layers, hidden=5, shard_tokens=11, num_layers=13, tied_embeddings=False)
    writing, path = Writing(samples, identity), tmp_path / "cache"
    writer = writing.open(path)
    frozen = {
        "lm_head.weight": filled(torch.bfloat16, (17, 5), 0),
        "embed_tokens.weight": filled(torch.float32, (17, 5), 1),
    }
    writer.write_target({"config.json": b"{}"}, frozen)
    for shard in reversed(writer.pending()):
        writing.write_shard(writer, shard)
    assert writer.finalise() is not None
    assert len(writing.plan) > 2
    for shard in range(len(writing.plan)):
        data = (path / f"shards/{shard:05d}.safetensors").read_bytes()
        assert data == from_the_library(writing.tensors(shard), tmp_path / "library")
        assert len(data) == writer.shard_bytes(shard)
    data = (path / "target/frozen.safetensors").read_bytes()
    assert data == from_the_library(frozen, tmp_path / "library")


@pytest.mark.parametrize("sizes", [[], [0], [1], [7, 0, 1], [8, 9, 16, 1, 3], [100]])
def test_what_is_published_in_pieces_is_all_of_it(tmp_path, monkeypatch, sizes):
    """Blocks of 8 bytes; a system that takes 3 at a time, as it may."""
    pieces = [bytes(range(size)) for size in sizes]
    monkeypatch.setattr(files, "BLOCK_BYTES", 8)
    real = Path.open

    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error: object):
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, data: memoryview) -> int:
            return self.file.write(data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: Slow(real(self, *a, **k)))
        size, digest = files.publish_bytes(tmp_path / "file", *pieces)
    data = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == data
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_written_manifest_says_what_the_hand_says(written):
    ours, theirs = hand_manifest(), json.loads((written / "manifest.json").read_text(encoding="utf-8"))
    files, shards = theirs.pop("files"), theirs.pop("shards")
    for key in ("created_by", "checksum"):
        theirs.pop(key)
    for key in ("files", "shards", "created_by", "checksum", "fidelity"):
        ours.pop(key)
    assert theirs.pop("fidelity") == FIDELITY
    assert theirs == ours
    on_disk = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    named = [f"shards/{i:05d}.safetensors" for i in range(len(shards["bytes"]))]
    assert {f["file"] for f in files} == on_disk - {"manifest.json", *named}
    assert set(named) <= on_disk
    for name, size, digest in zip(named, shards["bytes"], shards["sha256"], strict=True):
        data = (written / name).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    for record in files:
        data = (written / record["file"]).read_bytes()
        assert record.keys() == {"file", "bytes", "sha256"}
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_written_cache_reads_as_the_hand_made_one(hand, written):
    ours, theirs = CacheReader(hand), CacheReader(written)
    assert theirs.verify() == []
    for i in range(3):
        a, b = ours.read(i), theirs.read(i)
        assert a.sample_id == b.sample_id
        for name in ("input_ids", "loss_mask", "context", "last_hidden", "last_positions"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    for name, weight in ours.frozen().items():
        assert torch.equal(weight, theirs.frozen()[name])


def test_an_unaligned_shard_reads_exactly(tmp_path):
    """The format asks for no alignment: odd headers and an odd first tensor shift everything."""
    for padding in range(8):
        shard = hand_shard((0, 1))
        shard.edit_text = lambda text, padding=padding: text + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(shard.pack())
        specs = {
            "input_ids": (torch.int32, (9,)),
            "loss_mask": (torch.uint8, (9,)),
            "last_hidden": (torch.bfloat16, (5, HIDDEN)),
            **{f"context.{layer}": (torch.bfloat16, (9, HIDDEN)) for layer in LAYERS},
        }
        tensors = map_shard(path, specs).tensors
        assert tensors["input_ids"].tolist() == [*TOKENS[0], *TOKENS[1]]
        assert tensors["last_hidden"].tolist() == last_rows(0) + last_rows(1)
        assert tensors["context.5"].tolist() == context_rows(0, 5) + context_rows(1, 5)


def test_nothing_in_the_vocabulary_is_out_of_reach(tmp_path):
    """The first and the last token id are in range, the one after is not."""
    for token in (0, VOCAB - 1):
        cache = HandCache()
        ids = struct.pack("<2i", token, token)
        cache.shards[1].entry("input_ids")[3] = ids
        cache.columns["sample_id"][2] = hashlib.sha256(ids + bytes(MASKS[2])).digest()[:16]
        path = cache.save(tmp_path / str(token))
        assert CacheReader(path).tokens(2)[0].tolist() == [token, token]
