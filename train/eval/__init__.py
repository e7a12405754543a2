"""Measure a draft on a cache's held-out samples; no target."""
