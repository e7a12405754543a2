"""The frozen weights of a cache: the target's embedding and head."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache.manifest import FROZEN, TargetIdentity
from pipeline.errors import CacheError
from pipeline.text import one_line


def frozen_names(target: TargetIdentity) -> set[str]:
    """Return the names of the tensors of `target/frozen.safetensors`, each `[V, H]`."""
    return {"embed_tokens.weight"} | (set() if target.tied_embeddings else {"lm_head.weight"})


def read_frozen(cache: Path, target: TargetIdentity) -> dict[str, Tensor]:
    """Read the target's `embed_tokens.weight` and `lm_head.weight` `[V, H]`; one tensor if tied.

    Raises:
        CacheError: the file is damaged.
    """
    try:
        weights = load_file(cache / FROZEN)
    except Exception as error:  # the library's error type is not public
        raise CacheError(f"{cache / FROZEN} is damaged ({one_line(error)}): capture again") from None
    names, shape = frozen_names(target), (target.vocab_size, target.hidden_size)
    if weights.keys() != names or any(
        tuple(w.shape) != shape or not w.is_floating_point() for w in weights.values()
    ):
        raise CacheError(
            f"{cache / FROZEN} is damaged (expected {sorted(names)} of shape {list(shape)}): capture again"
        )
    weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    return weights
