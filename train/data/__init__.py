"""Packed batches from the cache: order of the samples, choice of the anchors, loading."""
