"""The size of a cache on disk, computed before it is written."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from pipeline.cache.codecs import Statistics, get_codec
from pipeline.cache.index import index_bytes
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import INDEX, MANIFEST, STATISTICS, Identity, Manifest, Plan, read_manifest
from pipeline.cache.rows import last_hidden_columns
from pipeline.cache.shard import file_layout
from pipeline.cache.statistics import standardised_states, statistics_bytes
from pipeline.errors import CacheError
from pipeline.files import plain_size
from pipeline.text import size

# Share of a cache's size that must stay free on its disk, because other files grow too.
DISK_RESERVE = 0.01


@dataclass(frozen=True)
class Price:
    """Size of a cache on disk, in bytes."""

    shards: int
    others: int
    """Index, statistics, manifest, and the files of `target/`."""
    tokens: int

    @property
    def total(self) -> int:
        return self.shards + self.others

    @property
    def per_token(self) -> float:
        return self.shards / self.tokens


def cache_price(
    identity: Identity, plan: Plan, rows: dict[str, int], index: pa.Table, target_bytes: int
) -> Price:
    """Compute the size of a cache.

    Args:
        rows: as in the manifest.
        index: the sample index.
        target_bytes: size of the files of `target/`.
    """
    features, width = identity.features, identity.target.hidden_size
    context = get_codec(features.context_codec)
    row_bytes = get_codec(features.last_codec).row_bytes(width) if features.has_last_hidden else 0
    tokens, last_rows = sum(plan.tokens), sum(getattr(plan, last_hidden_columns(features).total))
    header = len(file_layout(shard_specs(identity, plan[0])).header)
    context_bytes = len(features.layer_ids) * context.row_bytes(width)
    shards = tokens * (4 + 1) + sum(plan.context_rows) * context_bytes + last_rows * row_bytes
    shards += len(plan) * header
    digest = "0" * 64
    manifest = Manifest(created_by="", identity=identity, rows=rows, plan=plan, fidelity={})
    table = len(plan) * len(f'{shards // len(plan)}, "{digest}", ')
    others = len(index_bytes(index)) + len(manifest.to_json()) + table + _statistics_bytes(identity)
    return Price(shards, others + target_bytes, tokens)


def _statistics_bytes(identity: Identity) -> int:
    """Return the size of the statistics file and of its entry in the manifest."""
    empty = torch.empty(identity.target.hidden_size)
    states = standardised_states(identity)
    entry = 200 if states else 0
    return entry + sum(map(len, statistics_bytes({s: Statistics(empty, empty) for s in states})))


def free_bytes(path: Path) -> int:
    """Return the bytes free for this user on the disk of `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def written_bytes(cache: Path) -> int:
    """Return the bytes of a cache written so far, without files that were set aside."""
    inside = (path for folder in ("shards", "target") for path in (cache / folder).glob("*"))
    paths = [cache / INDEX, cache / STATISTICS, *inside]
    return sum(max(0, plain_size(path)) for path in paths if not path.name.endswith(".partial"))


def check_disk(cache: Path, cost: Price, remedy: str) -> None:
    """Refuse a cache that the disk can't hold.

    Args:
        remedy: the command's way to a smaller cache, for the message.

    Raises:
        CacheError: the message has the bytes needed and the bytes free.
    """
    if (cache / MANIFEST).is_file() and read_manifest(cache).status == "complete":
        return  # it needs no more space, whatever the estimate
    need, free = cost.total - written_bytes(cache), free_bytes(cache)
    if need * (1 + DISK_RESERVE) > free:
        raise CacheError(
            f"{cache} needs {size(need)} more, but its disk has {size(free)} free: {remedy}, "
            "use another disk, or give --force to start anyway"
        )
