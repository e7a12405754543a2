"""The tensors of a shard, as FORMAT.md lists them. Writer and reader both follow `shard_specs`."""

from __future__ import annotations

import torch

from pipeline.cache.codecs import TensorSpec, get_codec
from pipeline.cache.manifest import Identity, ShardPlan
from pipeline.cache.rows import last_hidden_columns

LAST_HIDDEN = "last_hidden"


def context_name(layer_id: int) -> str:
    """Return the state name of a layer's context features."""
    return f"context.{layer_id}"


def part_name(state: str, suffix: str) -> str:
    """Return the tensor name of one part of an encoded state."""
    return f"{state}.{suffix}" if suffix else state


def state_of(tensor: str) -> str:
    """Return the state that a tensor is a part of: `context.9` of `context.9.scale`."""
    kind, _, rest = tensor.partition(".")
    return context_name(int(rest.partition(".")[0])) if kind == "context" else kind


def shard_specs(identity: Identity, plan: ShardPlan) -> dict[str, TensorSpec]:
    """Return the dtype and shape of every tensor of a shard, by name."""
    features, width = identity.features, identity.target.hidden_size
    specs: dict[str, TensorSpec] = {
        "input_ids": (torch.int32, (plan.tokens,)),
        "loss_mask": (torch.uint8, (plan.tokens,)),
    }
    context = get_codec(features.context_codec)
    for layer_id in features.layer_ids:
        for suffix, spec in context.specs(plan.context_rows, width).items():
            specs[part_name(context_name(layer_id), suffix)] = spec
    if features.has_last_hidden:
        rows = getattr(plan, last_hidden_columns(features).total)
        for suffix, spec in get_codec(features.last_codec).specs(rows, width).items():
            specs[part_name(LAST_HIDDEN, suffix)] = spec
    return specs
