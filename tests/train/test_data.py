"""Batches, schedule and optimiser."""

from __future__ import annotations

import itertools
import math
import mmap
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train.data.loader as batches_module
from pipeline.cache import CacheReader
from pipeline.cache.shard import advise, file_bytes, map_shard
from pipeline.errors import CacheError
from tests.conftest import run_ok
from tests.train.drafts import small_model
from train.config import TrainConfig
from train.data import sampling
from train.data.loader import Batch, Collate, load_batch, load_encoded_batch, loaded, prefetch
from train.data.sampling import anchor_quotas, spread_anchors
from train.draft.blocks.collate import collate_anchors
from train.draft.dspark.kind import DSPARK
from train.trainer.optimizer import build_optimizers, learning_rate, normalise_gradients


@pytest.fixture(scope="module")
def reader(cache_dir: Path) -> CacheReader:
    return CacheReader(cache_dir)


SAMPLES, LAYERS, TOKENS = [7, 0, 21], (4, 0), 512


def random_anchors(total: int, seed: int, epoch: int) -> Collate:
    return collate_anchors(sampling.random_anchors(total, seed, epoch))


def test_a_batch_holds_exactly_the_samples(reader: CacheReader) -> None:
    batch = load_batch(reader, SAMPLES, LAYERS, TOKENS, random_anchors(6, 0, 0))
    assert batch.target_hidden_states.shape == (1, TOKENS, 2, reader.hidden_size)
    start = 0
    for document, i in enumerate(SAMPLES):
        sample = reader.read(i, LAYERS)
        length = len(sample.input_ids)
        rows = slice(start, start + length)
        assert torch.equal(batch.input_ids[0, rows], sample.input_ids.long())
        assert torch.equal(batch.loss_mask[0, rows], sample.loss_mask)
        assert batch.document_ids[0, rows].tolist() == [document] * length
        assert torch.equal(batch.target_hidden_states[0, rows].flatten(1), sample.context)
        # The teacher of every supervised label t >= 1 sits at t - 1; nothing sits elsewhere.
        labels = [t for t in range(1, length) if sample.loss_mask[t]]
        states = batch.target_last_hidden_states[0, rows]
        assert torch.equal(states[[t - 1 for t in labels]], sample.last_hidden)
        assert not states[[p for p in range(length) if p + 1 not in labels]].any()
        start += length
    assert batch.num_tokens == start
    assert (batch.document_ids[0, start:] == -1).all()
    for name in ("input_ids", "loss_mask", "target_hidden_states", "target_last_hidden_states"):
        assert not getattr(batch, name)[0, start:].any()


@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("nf4", "int8"), ("fp8", "fp32")])
def test_decoded_on_the_device_or_before_it_is_the_same(cache_dir: Path, tmp_path: Path, codecs) -> None:
    """What a GPU gets, here decoded on the CPU: the stored bytes of a batch in one piece."""
    context, last = codecs
    options = ("--context-codec", context, "--last-codec", last)
    run_ok("convert", cache_dir, tmp_path / "c", *options)
    reader = CacheReader(tmp_path / "c")
    plain = load_batch(reader, SAMPLES, LAYERS, TOKENS, random_anchors(6, 0, 0))
    encoded = load_encoded_batch(reader, SAMPLES, LAYERS, TOKENS, random_anchors(6, 0, 0), pin=False)
    decoded = encoded.to(torch.device("cpu"))
    assert decoded.tensors().keys() == plain.tensors().keys()
    for name, value in plain.tensors().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(decoded.tensors()[name])), name
    assert decoded.num_tokens == plain.num_tokens


def test_a_batch_of_nothing(reader: CacheReader) -> None:
    for load in (load_batch, partial(load_encoded_batch, pin=False)):
        batch = load(reader, [], LAYERS, 32, random_anchors(6, 0, 0))
        assert batch.num_tokens == 0
        assert not batch.collated["block_keep_mask"].any()
        batch = batch if isinstance(batch, Batch) else batch.to(torch.device("cpu"))
        assert batch.target_hidden_states.shape == (1, 32, 2, reader.hidden_size)
        assert not batch.target_hidden_states.any()


def test_quotas_by_hand() -> None:
    assert anchor_quotas([3, 2], 9).tolist() == [3, 2]
    assert anchor_quotas([60, 30, 10], 10).tolist() == [6, 3, 1]
    # Shares of 7: 3.5, 2.1, 1.4: the half goes to the first.
    assert anchor_quotas([50, 30, 20], 7).tolist() == [4, 2, 1]
    assert anchor_quotas([], 7).tolist() == []


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(1, 4000))
@settings(max_examples=100)
def test_quotas_are_in_proportion(counts: list[int], total: int) -> None:
    quotas = anchor_quotas(counts, total)
    assert quotas.sum() == min(total, sum(counts))
    assert (quotas <= counts).all()
    if sum(counts) > total:
        assert (abs(quotas - np.array(counts) * total / sum(counts)) < 1).all()


def test_anchors_are_each_inside_their_sample(reader: CacheReader) -> None:
    batch = load_batch(reader, SAMPLES, (0,), TOKENS, random_anchors(13, seed=5, epoch=2))
    kept = batch.collated["anchor_positions"][batch.collated["block_keep_mask"]].tolist()
    assert len(kept) == 13
    assert batch.collated["anchor_positions"].shape[1] == 16  # a multiple of 16, the last three dummies
    assert kept == sorted(set(kept))
    mask, documents = batch.loss_mask[0].tolist(), batch.document_ids[0].tolist()
    assert all(mask[p] and mask[p + 1] and documents[p] == documents[p + 1] for p in kept)
    candidates = [int(reader.candidates[i]) for i in SAMPLES]
    assert np.bincount([documents[p] for p in kept]).tolist() == anchor_quotas(candidates, 13).tolist()


def test_packs_are_filled_up_to_one_number_of_blocks(reader: CacheReader) -> None:
    choose = sampling.random_anchors(13, 0, 0)
    few, many = (load_batch(reader, SAMPLES, (0,), TOKENS, collate_anchors(choose, n)) for n in (0, 47))
    nothing = load_batch(reader, [], (0,), TOKENS, collate_anchors(choose, 47))
    shapes = {name: value.shape for name, value in many.collated.items()}
    each = dict.fromkeys(("anchor_positions", "block_keep_mask", "supervised_tokens"), (1, 48))
    assert shapes == {**each, "spans": (1, 48, 2)}
    assert {name: value.shape for name, value in nothing.collated.items()} == shapes
    for name, value in many.collated.items():
        assert (value[:, :16] == few.collated[name]).all()
        assert not value[:, 16:].any()


def test_anchors_depend_on_the_sample_and_its_quota_alone(reader: CacheReader) -> None:
    def drawn(samples: list[int], total: int, seed: int = 5, epoch: int = 2) -> list[list[int]]:
        batch = load_batch(reader, samples, (0,), TOKENS, random_anchors(total, seed, epoch))
        kept = batch.collated["anchor_positions"][batch.collated["block_keep_mask"]].tolist()
        ends = np.cumsum(reader.lengths[samples]).tolist()
        starts = [0, *ends[:-1]]
        return [[p - a for p in kept if a <= p < b] for a, b in zip(starts, ends, strict=True)]

    together = drawn([3, 9, 14], 12)
    assert drawn([14, 3, 9], 12) == [together[2], together[0], together[1]]
    for i, own in zip((3, 9, 14), together, strict=True):
        assert drawn([i], len(own)) == [own]
    assert together != drawn([3, 9, 14], 12, epoch=3)
    assert together != drawn([3, 9, 14], 12, seed=6)


def test_spread_anchors_by_hand() -> None:
    choose = spread_anchors(3)
    assert [a.tolist() for a in choose([np.array([2, 3, 4, 9, 11]), np.array([2, 9])], [b"", b""])] == [
        [2, 4, 11],
        [2, 9],
    ]


def test_loaded_batches_come_in_order_with_their_flops(reader: CacheReader) -> None:
    packs = [([i, i + 1], random_anchors(6, 0, 0)) for i in range(5)]
    device = torch.device("cpu")
    batches = loaded(reader, packs, LAYERS, TOKENS, device, lambda pack: 2.0 * pack.num_tokens)
    for (samples, choose), batch in zip(packs, batches, strict=True):
        alone = load_batch(reader, samples, LAYERS, TOKENS, choose)
        for name, value in alone.tensors().items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(batch.tensors()[name])), name
        assert batch.flops == 2 * alone.num_tokens


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages in /proc")
def test_reading_leaves_no_file_pages_behind(tmp_path: Path) -> None:
    """What a batch was read from leaves this process's memory; the views still read the same."""
    size = 64 * mmap.PAGESIZE
    specs = {"x": (torch.uint8, (size,))}
    path = tmp_path / "shard"
    values = torch.arange(size).to(torch.uint8)
    path.write_bytes(b"".join(file_bytes({"x": values})))
    shard = map_shard(path, specs, random=True)
    view = shard.tensors["x"]
    advise(mmap.MADV_WILLNEED, view[100:-100])
    assert torch.equal(view, values)
    resident = _resident_pages(view)
    advise(mmap.MADV_DONTNEED, view[100:200], view[-200:-100])
    assert resident >= 64
    assert _resident_pages(view) <= 3  # those at the ends are shared with what was not released
    assert torch.equal(view, values)
    out = torch.empty(500, dtype=torch.uint8)
    shard.read(view[1000:1500], out)
    assert torch.equal(out, values[1000:1500])
    path.write_bytes(path.read_bytes()[:1300])
    with pytest.raises(CacheError, match=r"shard is damaged \(it was cut to 1300 bytes"):
        shard.read(view[1000:1500], out)


def test_a_batch_lets_go_of_what_it_was_read_from(reader: CacheReader, monkeypatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(reader, "release", released.extend)
    monkeypatch.setattr(batches_module, "RELEASE_TOKENS", 1)
    load_batch(reader, SAMPLES, LAYERS, TOKENS, random_anchors(6, 0, 0))
    assert set(released) == {reader.shard_of(i) for i in SAMPLES}
    assert len(released) >= len(SAMPLES)


def _resident_pages(view: torch.Tensor) -> int:
    """Pages of the mapping that this process has in memory, from /proc."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            found = int(span[1], 16) <= view.data_ptr() + 200 < int(span[2], 16)
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024 // mmap.PAGESIZE
    raise AssertionError("not mapped")


def test_prefetch_keeps_order_and_raises_where_due() -> None:
    def fail():
        raise OSError("disk gone")

    def job(number: int) -> int:
        time.sleep((5 - number) / 200)  # the last ones are done first
        return number

    jobs = [partial(job, i) for i in range(5)]
    for threads, depth in itertools.product((1, 2, 8), (0, 2, 8)):
        assert list(prefetch(jobs, torch.device("cpu"), depth, threads)) == [0, 1, 2, 3, 4]
    batches = prefetch([*jobs[:3], fail, *jobs[3:]], torch.device("cpu"), depth=2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(lr=1.0, warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == rates[11] == pytest.approx(1.0)  # warm-up ends, cosine starts at its top
    assert rates[100] == pytest.approx(0.1)
    assert rates[11 + 89 // 2] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 44 / 89)) / 2)
    assert learning_rate(0, 1, TrainConfig(lr=1.0)) == pytest.approx(1.0)


def test_gradients_are_divided_and_clipped_by_hand() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    for weight, limit, wanted in ((4.0, 10.0, [3.0, 4.0]), (4.0, 1.0, [0.6, 0.8]), (0.0, 1.0, None)):
        model.weight.grad = torch.tensor([[12.0, 16.0]]) if wanted else torch.zeros(1, 2)
        norm = normalise_gradients(model, torch.tensor(weight), limit)
        assert norm.item() == pytest.approx(5.0 if wanted else 0.0)
        assert model.weight.grad[0].tolist() == pytest.approx(wanted or [0.0, 0.0], rel=1e-5)


def test_every_trained_weight_is_optimised_once_and_the_markov_head_at_its_own_rate() -> None:
    model = small_model(markov_head_type="gated")
    model.embed_tokens.requires_grad_(False)
    config = TrainConfig(lr=0.1, markov_lr_scale=3.0, weight_decay=0.2)
    (optimizer,) = build_optimizers(model, config, DSPARK.lr_scales(config))
    groups = optimizer.param_groups
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        scale = 3.0 if name.startswith("markov_head.") else 1.0
        assert found[id(parameter)] == (scale, 0.2 if parameter.ndim >= 2 else 0.0), name
