"""Training from a cache with the last hidden states of all tokens: as from one of label rows, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cache import CacheReader
from tests.conftest import capture_arguments, run_ok
from tests.train.runs import figures_of, train_arguments, weights_of
from train.data.loader import Batch, load_batch, load_encoded_batch
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors

SAMPLES, LAYERS, TOKENS = [7, 0, 21], (4, 0), 512


@pytest.fixture(scope="module")
def every(tmp_path_factory, target_dir: Path, data_file: Path) -> Path:
    """The capture of `cache_dir` with `--hidden all-tokens`."""
    cache = tmp_path_factory.mktemp("every") / "cache"
    run_ok(*capture_arguments(target_dir, data_file, cache), "--hidden", "all-tokens")
    return cache


def load(reader: CacheReader, encoded: bool) -> Batch:
    collate = collate_anchors(random_anchors(6, 0, 0))
    if encoded:
        batch = load_encoded_batch(reader, SAMPLES, LAYERS, TOKENS, collate, pin=False)
        return batch.to(torch.device("cpu"))
    return load_batch(reader, SAMPLES, LAYERS, TOKENS, collate)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_batch_is_the_same(cache_dir: Path, every: Path, encoded: bool) -> None:
    expected, got = (load(CacheReader(cache), encoded).tensors() for cache in (cache_dir, every))
    assert got.keys() == expected.keys()
    assert "target_last_hidden_states" in got
    for name, value in got.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[name])), name


@pytest.mark.parametrize("encoded", [False, True])
def test_a_reader_that_asks_for_all_gives_a_batch_of_all(every: Path, encoded: bool) -> None:
    """Every token's state at its place, and nothing after the last."""
    reader = CacheReader(every, hidden="all-tokens")
    states = load(reader, encoded).target_last_hidden_states[0]
    wanted = torch.cat([reader.read(i).last_hidden for i in SAMPLES])
    assert torch.equal(states[: len(wanted)], wanted)
    assert not states[len(wanted) :].any()
    assert wanted.float().abs().sum(dim=1).min() > 0


def test_a_run_is_the_same(cache_dir: Path, every: Path, tmp_path: Path) -> None:
    """Weights, losses and held-out figures, with a first layer that is solved from the states, too."""
    options = {"train__max_steps": 4, "train__eval_every": 2, "train__log_every": 2, "draft__init": "ridge"}
    for name, cache in (("labels", cache_dir), ("every", every)):
        run_ok(*train_arguments(cache, tmp_path / name, **options))
    expected, weights = weights_of(tmp_path / "labels"), weights_of(tmp_path / "every")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    lines, others = figures_of(tmp_path / "every"), figures_of(tmp_path / "labels")
    assert len(lines) == len(others) >= 4
    assert lines == others
