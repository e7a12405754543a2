"""Fixtures of tests on pretend GPUs: one process with two of them, and a cache that it captured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_less.session import Session
from tests.tiny import make_target

LAYERS = "0,1"
CODECS = (("bf16", "bf16"), ("nf4", "int8"), ("lm3", "fp8"))


@pytest.fixture(scope="session")
def gpu(tokens_of_tests_stay_with_them) -> Iterator[Session]:
    with Session(gpus=2) as session:
        yield session


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of the family that is trained most, in bf16."""
    return make_target(tmp_path_factory.mktemp("target") / "tiny-qwen3", "qwen3", num_hidden_layers=3)


def capture_words(
    target: Path, data: Path, cache: Path, device: str, context: str, last: str
) -> list[str | Path]:
    words: list[str | Path] = ["capture", "--target", target, "--data", data, "--cache", cache]
    words += ["--layers", LAYERS, "--shard-tokens", "512", "--batch-tokens", "256", "--dtype", "bfloat16"]
    return [*words, "--context-codec", context, "--last-codec", last, "--device", device]


@pytest.fixture(scope="session")
def gpu_cache(gpu: Session, qwen: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache captured on a pretend GPU. Read-only by agreement."""
    cache = tmp_path_factory.mktemp("gpu") / "cache"
    gpu.ok(*capture_words(qwen, data_file, cache, "cuda", "nf4", "int8"))
    return cache
