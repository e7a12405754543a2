"""Comparison of caches: the fields in which two identities differ, and where a cache comes from."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline import config
from pipeline.cache.engine import engine_words
from pipeline.cache.manifest import Identity
from pipeline.errors import CacheError
from pipeline.remote.address import Place

# Names of things, which may differ: the hashes beside them decide identity.
_LABELS = ("target.name", "data.sources")


def differing_fields(ours: Identity, theirs: Identity) -> list[str]:
    """Return the differing fields, each as `name: ours against theirs`; names of things are not compared."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}".strip(".")).items()
        }

    a, b = (flat(dataclasses.asdict(i) | {"engine": engine_words(i.engine)}) for i in (ours, theirs))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key) and key not in _LABELS]
    if ours.data.sha256 == theirs.data.sha256:  # the same samples, by any options
        keys = [key for key in keys if not key.startswith("data.")]
    return [f"{key}: {a.get(key)} against {b.get(key)}" for key in keys]


def refuse_another(cache: Place, found: Identity, asked: Identity, option: str = "--cache") -> None:
    """Refuse to continue a cache with another identity.

    Args:
        option: the command's word for the directory.

    Raises:
        CacheError: they differ; the message names the fields and both values of each.
    """
    differing = differing_fields(found, asked)
    if differing:
        raise CacheError(
            f"{cache} holds another capture (existing against requested: {'; '.join(differing)}): "
            f"choose another {option}, or remove that directory"
        )


def origin(history: tuple[dict[str, str], ...]) -> str:
    """Return a cache's origin for messages: captured, or converted from another cache."""
    return (
        f"converted from the cache {config.show(history[-1].get('from', '?')[:16])}"
        if history
        else "captured"
    )
