"""One conversation as training reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.cache.layout import LAST_HIDDEN, context_name

if TYPE_CHECKING:
    from pipeline.cache.reader import CacheReader


@dataclass(frozen=True)
class CachedSample:
    """One conversation, decoded for training: S tokens, M rows of last hidden states.

    `last_hidden[m]` is the post-norm state at position `last_positions[m]`, which predicts the token one
    position later: the supervised label, unless the reader reads every token's.
    """

    sample_id: str
    input_ids: Tensor  # [S] int32
    loss_mask: Tensor  # [S] uint8
    context: Tensor  # [S, L*H] bfloat16, layers concatenated in the order requested
    last_hidden: Tensor | None  # [M, H] bfloat16; None if the cache has none
    last_positions: Tensor  # [M] int64


def read_sample(reader: CacheReader, i: int, layers: Sequence[int]) -> CachedSample:
    """Read sample `i` with these layers. See `CacheReader.read`."""
    states = [*map(context_name, layers), *([LAST_HIDDEN] if reader.has_last_hidden else [])]
    reader.read_ahead(i, states)
    input_ids, loss_mask = reader.tokens(i)
    context = torch.empty(len(input_ids), len(layers) * reader.hidden_size, dtype=torch.bfloat16)
    reader.read_context(i, layers, context)
    last_hidden = None
    if reader.has_last_hidden:
        last_hidden = torch.empty(reader.num_last_rows(i), reader.hidden_size, dtype=torch.bfloat16)
        reader.read_last_hidden(i, last_hidden)
    return CachedSample(
        sample_id=reader.sample_id(i),
        input_ids=input_ids.clone(),
        loss_mask=loss_mask.clone(),
        context=context,
        last_hidden=last_hidden,
        last_positions=reader.last_positions(loss_mask),
    )
