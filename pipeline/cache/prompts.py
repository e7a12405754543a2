"""A cache whose prompts are being answered: its files of answers, and shards below the plan's bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.manifest import PROGRESS, PROMPTS, Identity, Manifest, ShardPlan
from pipeline.cache.same import differing_fields
from pipeline.errors import CacheError
from pipeline.text import one_line


def answers_file(cache: Path, shard: int) -> Path:
    """Return the file of a shard's answers, in the cache's directory."""
    return cache / PROGRESS / f"answers-{shard:05d}.jsonl"


def is_answered(found: Manifest, asked: Identity) -> bool:
    """Return whether a complete cache has the answers to the prompts of another identity, all else alike."""
    if found.status != "complete" or not asked.data.of_prompts:
        return False
    content = found.identity.data.sha256
    settled = replace(asked, data=replace(asked.data, sha256=content))
    same = found.identity.data.settings.get(PROMPTS) == asked.data.sha256
    return same and not differing_fields(found.identity, settled)


def has_tokens(path: Path, input_ids: np.ndarray) -> bool:
    """Return whether a shard's file has these token ids, `[T]`."""
    try:
        with safe_open(path, "np") as tensors:
            return np.array_equal(tensors.get_tensor("input_ids"), input_ids)
    except (OSError, SafetensorError):
        return False


def held_plan(path: Path, identity: Identity, planned: ShardPlan) -> ShardPlan:
    """Return what a finished shard holds: as planned, or by its header while the plan is one of prompts.

    Raises:
        CacheError: the header is damaged, or has more than was planned.
    """
    if not identity.data.of_prompts:
        return planned
    try:
        with safe_open(path, "np") as file:
            rows = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, IndexError) as error:
        raise CacheError(f"{path} is damaged ({one_line(error)})") from None
    last = [number for name, number in rows.items() if name.partition(".")[0] == LAST_HIDDEN]
    held = replace(planned, tokens=rows.get("input_ids", 0), last_rows=last[0] if last else 0)
    if held.tokens > planned.tokens or held.last_rows > held.tokens:
        raise CacheError(f"{path} is damaged (it has more rows than its prompts can have)")
    return held
