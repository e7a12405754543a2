"""How well stored states reproduce their own: measured on a few rows, and summed up for the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.manifest import Identity
from pipeline.cache.statistics import StateCodec
from pipeline.features import head_logits

# What one shard's check measured: a value a checked row, by what was measured.
Measured = dict[str, tuple[float, ...]]

TEACHER_TV = "teacher_tv"
# Label rows of a shard whose stored states are decoded and compared with their own.
CHECKED_ROWS = 4
# Rows of the head that are turned to fp32 at a time.
VOCABULARY_CHUNK = 16384


def relative_error(state: str) -> str:
    """The name of a state's relative error, `|decoded - own| / |own|` of a row."""
    return f"relative_error.{state}"


def spread(rows: int) -> list[int]:
    """Some rows of a shard's, evenly spread."""
    count = min(CHECKED_ROWS, rows)
    return sorted({(2 * i + 1) * rows // (2 * count) for i in range(count)})


def measure_rows(
    state: str, codec: StateCodec, own: Tensor, parts: Mapping[str, Tensor], head: Tensor, identity: Identity
) -> dict[str, Tensor]:
    """What storing does to a few rows of a state.

    Args:
        own: the rows `[n, H]` as they were.
        parts: the same rows as the codec stores them.
        head: the target's `lm_head.weight` `[V, H]`.

    Returns:
        `[n]` each: the relative error, and of the last hidden state the teacher's total variation.
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
    """Total variation `[n]` between the next-token distributions of two sets of last hidden rows `[n, H]`."""
    cap, scale = identity.target.final_logit_softcapping, identity.target.logit_scale

    def distribution(rows: Tensor) -> Tensor:
        rows = rows.float().to(head.device)
        logits = [head_logits(rows, some.float(), cap, scale) for some in head.split(VOCABULARY_CHUNK)]
        return torch.cat(logits, dim=-1).softmax(-1)

    return (distribution(one) - distribution(other)).abs().sum(-1) / 2


def summarise(shards: Iterable[Measured]) -> dict[str, float]:
    """The manifest's figures: mean and 99th percentile of everything measured, and the number of rows."""
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
