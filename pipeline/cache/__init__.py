"""The cache on disk. FORMAT.md specifies its bytes."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "CacheReader": "pipeline.cache.reader",
        "CacheWriter": "pipeline.cache.writer",
        "CachedSample": "pipeline.cache.cached_sample",
        "DataIdentity": "pipeline.cache.manifest",
        "EngineIdentity": "pipeline.cache.engine",
        "FeatureIdentity": "pipeline.cache.features",
        "Identity": "pipeline.cache.manifest",
        "Manifest": "pipeline.cache.manifest",
        "SampleFacts": "pipeline.cache.index",
        "TargetIdentity": "pipeline.cache.manifest",
        "TokenizerIdentity": "pipeline.cache.manifest",
        "build_index": "pipeline.cache.index",
        "count_candidates": "pipeline.cache.index",
        "held_out": "pipeline.cache.split",
        "last_hidden_rows": "pipeline.cache.rows",
        "plan_shards": "pipeline.cache.index",
        "read_manifest": "pipeline.cache.manifest",
        "sample_id": "pipeline.cache.index",
    },
)
