"""What several files here share: a command line with options, an fp32 target and a little data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.conftest import LAYERS
from tests.tiny import make_conversations, make_target


def arguments(target: Path, data: Path, cache: Path, **options: Any) -> list[str | Path]:
    usual = {"layers": LAYERS, "shard_tokens": 512, "batch_tokens": 256}
    exact = {"context_codec": "bf16", "last_codec": "bf16"}
    fp32 = {"dtype": "float32", "device": "cpu"}  # also where bf16 is fast, or a GPU is
    options = {**usual, **exact, **fp32, **options}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return ["capture", "--target", target, "--data", data, "--cache", cache, *sum(pairs, ())]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def places(cache: Path) -> list[tuple[int, int]]:
    """Source and row of each of the cache's samples, in the cache's order."""
    with pa.memory_map(str(cache / "samples.arrow")) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    return list(zip(*(table[name].to_pylist() for name in ("source", "source_row")), strict=True))


def in_data_order(cache: Path) -> list[int]:
    """The cache's samples as the data has them: a cache sorts them by length."""
    found = places(cache)
    return sorted(range(len(found)), key=found.__getitem__)


@pytest.fixture(scope="session")
def fp32_target(tmp_path_factory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "tiny-fp32", "qwen3", dtype=torch.float32)


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "few.jsonl", count=14, seed=5)
