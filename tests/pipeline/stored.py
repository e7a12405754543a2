"""Small caches with any codecs, written by the project's own writer, and bent if wanted."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache import FeatureIdentity, Identity
from pipeline.cache.codecs import Statistics
from pipeline.cache.statistics import standardised_states, state_codecs
from tests.pipeline.written import MASKS, Writing, make_identity, make_sample

HIDDEN = 70  # no multiple of 8 or 64


def stored_identity(
    context: str, last: str, *, layers: Sequence[int] = (0, 2), hidden: int = HIDDEN
) -> Identity:
    identity = make_identity(layers, hidden=hidden)
    features = FeatureIdentity(layer_ids=tuple(layers), context_codec=context, last_codec=last)
    return dataclasses.replace(identity, features=features)


def some_statistics(identity: Identity, shift: float = 0.0) -> dict[str, Statistics]:
    """What a measurement could give."""
    width = identity.target.hidden_size
    return {
        state: Statistics(torch.linspace(-1, 1, width) + shift, torch.linspace(0.5, 2, width))
        for state in standardised_states(identity)
    }


class Stored(Writing):
    """A capture whose states are stored by codecs."""

    def __init__(self, context: str, last: str, bend: Callable[[dict[str, Tensor]], None] | None = None):
        identity = stored_identity(context, last)
        samples = [make_sample(mask, (0, 2), HIDDEN, seed=i) for i, mask in enumerate(MASKS)]
        digest = hashlib.sha256(b"".join(sample.name for sample in samples)).hexdigest()
        data = dataclasses.replace(identity.data, sha256=digest)
        super().__init__(samples, dataclasses.replace(identity, data=data))
        self.statistics = some_statistics(identity)
        self.bend = bend

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """Of the last shard, bent."""
        tensors = super().tensors(shard)
        for state, bound in state_codecs(self.identity, self.statistics).items():
            for suffix, part in bound.encode(tensors.pop(state)).items():
                tensors[f"{state}.{suffix}" if suffix else state] = part
        if self.bend and shard == len(self.shards) - 1:
            self.bend(tensors)
        return tensors

    def write(self, path: Path) -> Path:
        writer = self.open(path)
        self.statistics = writer.statistics(lambda: self.statistics)
        self.finish(writer)
        return path


def stored_cache(
    path: Path, context: str, last: str, bend: Callable[[dict[str, Tensor]], None] | None = None
) -> Path:
    """A complete cache of a few samples of width 70 in several shards."""
    return Stored(context, last, bend).write(path)
