"""Fixtures of the cache's tests: new directories, and a bound on memory for files that lie."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """A lying size must not cost memory: whoever believes one of the huge ones here gets a MemoryError."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import torch  # its own mappings must not count

    torch.zeros(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 4 * 2**30
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory):
    """New directories, as many as asked for."""
    return lambda: tmp_path_factory.mktemp("writer") / "cache"
