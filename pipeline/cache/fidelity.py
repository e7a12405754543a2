"""Errors of stored states, measured on a few rows per shard and summarised for the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.features import ALL_TOKENS, FeatureIdentity
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.manifest import Identity
from pipeline.cache.statistics import StateCodec
from pipeline.features import head_logits

# Figures of one shard: a value per checked row, by the name of the quantity.
Measured = dict[str, tuple[float, ...]]

TEACHER_TV = "teacher_tv"
# Label rows per shard whose stored states are decoded and compared with the original ones.
CHECKED_ROWS = 4
# Rows of the head that are converted to fp32 at a time.
VOCABULARY_CHUNK = 16384


def relative_error(state: str) -> str:
    """Return the name of a state's relative error, `|decoded - own| / |own|` of a row."""
    return f"relative_error.{state}"


def spread(rows: int) -> list[int]:
    """Return up to `CHECKED_ROWS` of a shard's row numbers, evenly spread."""
    count = min(CHECKED_ROWS, rows)
    return sorted({(2 * i + 1) * rows // (2 * count) for i in range(count)})


def checked_rows(rows: Sequence[int], features: FeatureIdentity) -> list[int]:
    """Return up to `CHECKED_ROWS` of a shard's rows of `last_hidden`, evenly spread.

    Where every token has a row, a sample's last one is not chosen: no forward may have read that token.

    Args:
        rows: those of each sample.
    """
    chosen = spread(sum(rows))
    if features.hidden == ALL_TOKENS:
        ends = set((np.cumsum(rows) - 1).tolist())
        chosen = sorted({row - (row in ends) for row in chosen})
    return chosen


def measure_rows(
    state: str, codec: StateCodec, own: Tensor, parts: Mapping[str, Tensor], head: Tensor, identity: Identity
) -> dict[str, Tensor]:
    """Measure the error of some stored rows of a state.

    Args:
        own: the rows `[n, H]` before encoding.
        parts: the same rows as stored.
        head: the target's `lm_head.weight` `[V, H]`.

    Returns:
        `[n]` each: the relative error, and for the last hidden state the teacher's total variation.
    """
    own = own.float()
    decoded = torch.empty(own.shape, dtype=torch.bfloat16, device=own.device)
    codec.decode(dict(parts), decoded)
    floor = torch.finfo(torch.float32).tiny
    error = (decoded.float() - own).norm(dim=1) / own.norm(dim=1).clamp_min(floor)
    values = {relative_error(state): error}
    if state == LAST_HIDDEN:
        values[TEACHER_TV] = teacher_variation(head, identity, decoded, own)
    return values


def teacher_variation(head: Tensor, identity: Identity, one: Tensor, other: Tensor) -> Tensor:
    """Return the total variation `[n]` between the next-token distributions of last hidden rows `[n, H]`."""
    cap, scale = identity.target.final_logit_softcapping, identity.target.logit_scale

    def distribution(rows: Tensor) -> Tensor:
        rows = rows.float().to(head.device)
        logits = [head_logits(rows, some.float(), cap, scale) for some in head.split(VOCABULARY_CHUNK)]
        return torch.cat(logits, dim=-1).softmax(-1)

    return (distribution(one) - distribution(other)).abs().sum(-1) / 2


def summarise(shards: Iterable[Measured]) -> dict[str, float]:
    """Return the manifest's figures: mean and 99th percentile per quantity, and the teacher's row count."""
    values: dict[str, list[float]] = {}
    for measured in shards:
        for name, rows in measured.items():
            values.setdefault(name, []).extend(rows)
    figures = {}
    for name, rows in sorted(values.items()):
        if rows:
            with np.errstate(all="ignore"):  # infinity in, infinity or NaN out
                figures[f"{name}_mean"] = float(np.mean(rows))
                figures[f"{name}_p99"] = float(np.percentile(rows, 99))
    if values.get(TEACHER_TV):
        figures[f"{TEACHER_TV}_rows"] = float(len(values[TEACHER_TV]))
    return figures
