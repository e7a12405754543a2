"""Refuse what a cache does not hold."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cache.features import LABELS, FeatureIdentity
from pipeline.errors import CacheError
from pipeline.remote.address import Place


def check_rows(place: Place, features: FeatureIdentity, hidden: str) -> None:
    """Check that a cache of `features` has the last hidden states of `hidden`. Raises CacheError."""
    if hidden not in (LABELS, features.hidden):
        kind = "those of label rows" if features.has_last_hidden else "none"
        raise CacheError(
            f"{place}: last hidden states of {hidden} are asked for, the cache has {kind}: capture "
            "it again with --hidden all-tokens"
        )


def check_layers(place: Place, features: FeatureIdentity, layer_ids: Sequence[int]) -> None:
    """Check that a cache of `features` has these layers. Raises CacheError, naming a missing one."""
    missing = [layer_id for layer_id in layer_ids if layer_id not in features.layer_ids]
    if missing:
        raise CacheError(
            f"cache {place} holds layers {list(features.layer_ids)}, the config asks for {missing[0]}: "
            "capture again with --layers, or drop it from draft.target_layer_ids"
        )


def check_last_hidden(place: Place, features: FeatureIdentity, user: str) -> None:
    """Check that a cache of `features` has last hidden states. Raises CacheError.

    Args:
        user: what needs them, for the message.
    """
    if not features.has_last_hidden:
        raise CacheError(
            f"{user} needs the target's last hidden states, and cache {place} was made without "
            "them: make it again without --last-hidden none"
        )
