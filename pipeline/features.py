"""The layer-id convention.

Layer id `i` is the output of decoder layer `i`, which Hugging Face returns as
`output_hidden_states[i + 1]`. `-1` is the embedding output (`output_hidden_states[0]`). The last id,
`num_layers - 1`, is the state after the final norm, as in Hugging Face.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor

from pipeline.errors import LayerIdError, LayerIdWarning

EMBEDDING_LAYER_ID = -1


def validate_target_layer_ids(layer_ids: Iterable[int], num_target_layers: int) -> list[int]:
    """Check layer ids against a target and return them as a list of ints.

    They must be integers, strictly increasing, inside `[-1, num_target_layers - 1]`. Ids outside
    `[0, num_target_layers - 2]` give a LayerIdWarning, because SGLang can't serve them.

    Raises:
        LayerIdError: (a ValueError) the ids break these rules.
    """
    ids = []
    for layer_id in layer_ids:
        if isinstance(layer_id, bool) or not hasattr(layer_id, "__index__"):
            raise LayerIdError(f"target layer ids must be integers, got {layer_id!r}: write them as 1,9,17")
        ids.append(index(layer_id))
    if not ids:
        raise LayerIdError("expected at least one target layer id, got none: name some, such as 1,9,17")
    outside = [i for i in ids if not -1 <= i < num_target_layers]
    if outside:
        raise LayerIdError(
            f"target layer id {outside[0]} is out of range: the target has {num_target_layers} layers, "
            f"so ids run from -1 (embedding output) to {num_target_layers - 1} (after the final norm)"
        )
    if any(b <= a for a, b in pairwise(ids)):
        raise LayerIdError(f"target layer ids must be strictly increasing, got {ids}: sort them, each once")
    unserved = [i for i in ids if not 0 <= i <= num_target_layers - 2]
    if unserved:
        warnings.warn(
            f"target layer ids {unserved} lie outside [0, {num_target_layers - 2}]: "
            "a draft that reads them can't be served by SGLang",
            LayerIdWarning,
            stacklevel=2,
        )
    return ids


def default_layer_ids(num_target_layers: int, count: int = 5) -> list[int]:
    """Return `count` layers spread evenly over `[1, num_target_layers - 3]`, fewer if some coincide.

    Qwen3-4B's 36 layers give 1, 9, 17, 25, 33.
    """
    low = min(1, max(0, num_target_layers - 2))
    high = max(low, num_target_layers - 3)
    steps = max(count - 1, 1)
    return sorted({round(low + i * (high - low) / steps) for i in range(count)})


def extract_context_feature(hidden_states: Sequence[Tensor], layer_ids: Sequence[int]) -> Tensor:
    """Concatenate the states of `layer_ids` along the feature dimension.

    Args:
        hidden_states: Hugging Face's `output_hidden_states`: `num_layers + 1` tensors `[.., H]`.
        layer_ids: ids in this module's convention, in the order of the result.

    Returns:
        Context features `[.., L*H]`.
    """
    return torch.cat([hidden_states[layer_id + 1] for layer_id in layer_ids], dim=-1)


def at_least_fp32(values: Tensor) -> Tensor:
    """Convert half-precision values to float32; leave float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in at least fp32, whatever autocast says. Both operands have one dtype.

    Half-precision operands are summed up in fp32 on CUDA. Other devices round the sums to the operands'
    dtype first.

    Args:
        left: `[.., I]`.
        right: `[I, J]`.

    Returns:
        `[.., J]` float32, or float64 for float64 operands.
    """
    with torch.autocast(left.device.type, enabled=False):
        if not left.is_cuda or left.dtype not in (torch.bfloat16, torch.float16):
            return at_least_fp32(left @ right)
        if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
            return left.float() @ right.float()  # the product below has no derivative in torch
        sums = torch.mm(left.reshape(-1, left.shape[-1]), right, out_dtype=torch.float32)
        return sums.view(*left.shape[:-1], right.shape[-1])


def vocabulary_logits(states: Tensor, weight: Tensor) -> Tensor:
    """Return `states @ weight.T` in at least fp32. Autocast rounds the operands, never the logits.

    Args:
        states: `[.., I]`.
        weight: `[V, I]`.

    Returns:
        `[.., V]` float32, or float64 for float64 weights.
    """
    device, dtype = states.device.type, weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return product(states.to(dtype), weight.to(dtype).T)


def head_logits(hidden: Tensor, head: Tensor, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    """Compute vocabulary logits of post-norm hidden states in fp32, otherwise as the target does.

    Args:
        hidden: `[.., H]`.
        head: the `lm_head` weight `[V, H]`.
        softcap: the target's tanh soft-cap on its logits, if it has one.
        scale: the target's factor on its logits, before the soft-cap.

    Returns:
        `[.., V]` float32, or float64 for float64 weights.
    """
    logits = vocabulary_logits(hidden, head)
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
