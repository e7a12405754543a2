"""The cache on disk: see FORMAT.md for the bytes."""

from pipeline.cache.index import (
    SampleFacts,
    build_index,
    count_candidates,
    last_hidden_rows,
    plan_shards,
    sample_id,
)
from pipeline.cache.manifest import (
    DataIdentity,
    FeatureIdentity,
    Identity,
    Manifest,
    TargetIdentity,
    TokenizerIdentity,
    read_manifest,
)
from pipeline.cache.reader import CachedSample, CacheReader, held_out, last_positions
from pipeline.cache.writer import CacheWriter

__all__ = [
    "CacheReader",
    "CacheWriter",
    "CachedSample",
    "DataIdentity",
    "FeatureIdentity",
    "Identity",
    "Manifest",
    "SampleFacts",
    "TargetIdentity",
    "TokenizerIdentity",
    "build_index",
    "count_candidates",
    "held_out",
    "last_hidden_rows",
    "last_positions",
    "plan_shards",
    "read_manifest",
    "sample_id",
]
