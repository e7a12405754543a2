"""Tiny targets whose RoPE depends on the length of a forward."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny import make_target

LIMIT = 64  # tokens; longer rows have other frequencies
LONGROPE, DYNAMIC = "longrope", "dynamic"
ROPES = (LONGROPE, DYNAMIC)


def rope_target(folder: Path, kind: str) -> Path:
    """Save a Phi-3 with longrope, or a Llama with dynamic NTK, that switches after `LIMIT` tokens."""
    if kind == DYNAMIC:
        scaling = {"rope_type": "dynamic", "factor": 4.0}
        values = {"rope_scaling": scaling, "max_position_embeddings": LIMIT}
        return make_target(folder, "llama", dtype=torch.float32, **values)
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]}
    values = {"rope_scaling": scaling, "max_position_embeddings": 4 * LIMIT}
    return make_target(folder, "phi3", dtype=torch.float32, original_max_position_embeddings=LIMIT, **values)
