"""What is written is read, through the memory map and without touching the file."""

from __future__ import annotations

import gc
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from tests.pipeline.written import (
    Writing,
    every_byte,
    make_identity,
    make_sample,
    make_writing,
    small_cache,
)

QUICK = settings(max_examples=20)

# A sample's mask ends supervised and has two supervised tokens side by side somewhere.
masks = st.tuples(
    st.lists(st.integers(0, 1), max_size=5), st.just([1, 1]), st.lists(st.integers(0, 1), max_size=4)
).map(lambda parts: [*parts[0], *parts[1], *parts[2], *([1] if parts[2] else [])])


@QUICK
@given(
    st.lists(masks, min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True).map(sorted),
    st.integers(2, 30),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_read(tmp_path_factory, samples, layers, limit, random):
    writing = make_writing(samples, tuple(layers), limit)
    reader = CacheReader(writing.write(tmp_path_factory.mktemp("writer") / "cache"))
    assert reader.verify() == []
    assert len(reader) == len(samples)
    order = list(range(len(samples)))
    random.shuffle(order)
    for i in order:
        expected = writing.samples[i]
        asked = random.sample(layers, random.randint(1, len(layers)))
        got = reader.read(i, asked)
        assert got.input_ids.tolist() == expected.ids
        assert got.loss_mask.tolist() == expected.mask
        assert got.last_positions.tolist() == expected.rows
        assert torch.equal(got.last_hidden, expected.last[expected.rows])
        assert torch.equal(got.context, torch.cat([expected.context[layer] for layer in asked], dim=1))
        assert reader.candidates[i] == len(expected.candidates)
        assert reader.num_last_rows(i) == len(expected.rows)
    assert torch.equal(reader.frozen()["lm_head.weight"], writing.frozen()["embed_tokens.weight"])


def test_special_values_keep_their_bits(scratch):
    """A cache is no place for opinions about numbers: every bf16 pattern, NaNs included, comes back."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # [65536]
    mask = [1] * 2**14
    sample = make_sample(mask, (0,), 4, seed=0)
    sample.context[0] = bits.view(2**14, 4)
    writing = Writing([sample], make_identity((0,), shard_tokens=2**14))
    got = CacheReader(writing.write(scratch())).read(0).context
    assert torch.equal(got.view(torch.int16), bits.view(2**14, 4).view(torch.int16))


def test_a_layer_that_the_cache_lacks_is_named_with_those_it_has(scratch):
    reader = CacheReader(small_cache(scratch()))
    with pytest.raises(CacheError, match=r"\[0, 2, 5\].*3"):
        reader.read(0, [0, 3])


@pytest.mark.parametrize("i", [-1, 7, 10**9])
def test_there_is_no_sample_beyond_the_last(scratch, i):
    reader = CacheReader(small_cache(scratch(), count=7))
    with pytest.raises(IndexError):
        reader.read(i)
    with pytest.raises(IndexError):
        reader.layer_view(i, 0)


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


def mappings_of(path: Path) -> list[tuple[int, int, int, int]]:
    """This process's mappings of a file: start, stop, offset in the file, resident bytes."""
    gc.collect()  # readers of earlier tests
    found, current = [], None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            current = line.endswith(str(path))
            if current:
                start, stop = (int(part, 16) for part in first.split("-"))
                found.append([start, stop, int(line.split()[2], 16), 0])
        elif current and first == "Rss:":
            found[-1][3] = int(line.split()[1]) * 1024
    return [tuple(values) for values in found]


@pytest.fixture(scope="module")
def big_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Writing, Path]:
    """One shard of four layers, 8 MiB each."""
    layers = (0, 1, 2, 3)
    samples = [make_sample([1] * 2048, layers, 1024, seed=i) for i in range(2)]
    writing = Writing(samples, make_identity(layers, hidden=1024, shard_tokens=4096))
    assert len(writing.plan) == 1
    return writing, writing.write(tmp_path_factory.mktemp("big") / "cache")


@needs_proc
def test_a_layer_view_is_the_file_itself(big_cache):
    writing, path = big_cache
    shard = path / "shards/00000.safetensors"
    reader = CacheReader(path)
    assert mappings_of(shard) == []  # opening touches no shard
    view = reader.layer_view(1, 2)
    (mapping,) = mappings_of(shard)
    start, stop, offset, _ = mapping
    pointer, size = view.data_ptr(), view.numel() * 2
    assert start <= pointer
    assert pointer + size <= stop
    in_file = pointer - start + offset
    data = shard.read_bytes()
    assert data[in_file : in_file + size] == writing.samples[1].context[2].view(torch.uint8).numpy().tobytes()


@needs_proc
def test_reading_one_layer_reads_no_other(big_cache):
    """A layer of 8 MiB in a file of 40: less than half the file becomes resident, though the kernel may
    map 2 MiB at a time.
    """
    _, path = big_cache
    shard = path / "shards/00000.safetensors"
    reader = CacheReader(path)
    view = reader.layer_view(0, 1)
    view.view(torch.uint8).sum()
    reader.layer_view(1, 1).view(torch.uint8).sum()
    ((_, _, _, resident),) = mappings_of(shard)
    assert 8 * 2**20 <= resident < 16 * 2**20


@needs_proc
def test_a_mapping_ends_with_the_last_view(big_cache):
    _, path = big_cache
    shard = path / "shards/00000.safetensors"
    reader = CacheReader(path)
    view = reader.layer_view(0, 1)
    expected = view.clone()
    del reader
    assert torch.equal(view, expected)  # a view outlives its reader
    del view
    assert mappings_of(shard) == []


def test_writing_into_a_view_changes_no_file(scratch):
    path = small_cache(scratch())
    before = every_byte(path)
    reader = CacheReader(path)
    original = reader.layer_view(0, 2).clone()
    reader.layer_view(0, 2).fill_(7.0)
    input_ids, loss_mask = reader.tokens(0)
    input_ids.zero_()
    loss_mask.fill_(1)
    assert every_byte(path) == before
    assert torch.equal(CacheReader(path).layer_view(0, 2), original)


def test_a_sample_read_is_a_copy(scratch):
    path = small_cache(scratch())
    reader = CacheReader(path)
    first = reader.read(0)
    for tensor in (first.input_ids, first.loss_mask, first.context, first.last_hidden):
        tensor.zero_()
    again, fresh = reader.read(0), CacheReader(path).read(0)
    for name in ("input_ids", "loss_mask", "context", "last_hidden", "last_positions"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))


def test_the_index_is_mapped_not_read(scratch):
    """Arrow counts what it allocates: of 52 bytes a row, opening may copy the ids but not the rest."""
    writing = make_writing([[1, 1]] * 3_000, limit=20_000)
    path = writing.write(scratch())
    before = pa.total_allocated_bytes()
    reader = CacheReader(path)
    assert pa.total_allocated_bytes() - before < 3_000 * 20
    assert len(reader) == 3_000
