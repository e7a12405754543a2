"""Caches in an object store: their small files mirrored, their shards fetched into a bounded local store."""
