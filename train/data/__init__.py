"""From the cache to packed batches: which samples, which anchors, in which order."""
