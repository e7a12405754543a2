"""One conversation as training reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
