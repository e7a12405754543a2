"""A small cache, in a directory and in an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.remote.sync import sync
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from tests.pipeline.written import every_byte, small_cache
from tests.s3 import faulty, s3, s3_server

__all__ = ["faulty", "s3", "s3_server"]


@pytest.fixture
def local_cache(scratch) -> Path:
    return small_cache(scratch(), count=12)


@pytest.fixture
def unhashed_cache(s3: Address, local_cache: Path) -> Address:
    """Return a cache as other tools copy one: without hashes of tensors."""
    for name, data in every_byte(local_cache).items():
        Objects(s3).write(name, data)
    return s3


@pytest.fixture
def remote_cache(s3: Address, local_cache: Path) -> Address:
    sync(local_cache, s3)
    return s3
