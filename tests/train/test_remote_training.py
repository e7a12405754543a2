"""Training from an object store is training from the directory, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.cache import CacheReader
from pipeline.remote.address import Address
from tests.conftest import run_ok
from tests.s3 import s3, s3_server
from tests.train.runs import figures_of, train_arguments, weights_of

__all__ = ["s3", "s3_server"]


def test_a_run_from_an_object_store_is_that_of_the_directory(
    tmp_path: Path, cache_dir: Path, s3: Address
) -> None:
    run_ok("sync", cache_dir, str(s3))
    sizes = CacheReader(cache_dir).manifest.shards.bytes
    store = tmp_path / "store"
    settings = {
        "draft__init": "ridge",
        "draft__draft_vocab_size": 100,
        "train__max_steps": 12,
        "train__log_every": 1,
        "train__eval_every": 6,
        "train__shuffle_shards": 2,
    }
    run_ok(*train_arguments(cache_dir, tmp_path / "near", **settings))
    settings |= {
        "train__local_cache_dir": json.dumps(str(store)),
        "train__local_cache_bytes": sum(sizes) // 2,
    }
    run_ok(*train_arguments(s3, tmp_path / "far", **settings))
    assert figures_of(tmp_path / "near") == figures_of(tmp_path / "far")
    near, far = weights_of(tmp_path / "near"), weights_of(tmp_path / "far")
    assert near.keys() == far.keys()
    assert all(torch.equal(near[name], far[name]) for name in near)
    evaluated = run_ok("evaluate", "--cache", str(s3), "--run", tmp_path / "far", "--device", "cpu", "--json")
    again = run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "far", "--device", "cpu", "--json")
    ours, theirs = json.loads(evaluated), json.loads(again)
    assert ours["tau"] == theirs["tau"]
