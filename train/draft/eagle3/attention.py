"""Attention of EAGLE-3's chains: to the context, and to the earlier steps of the own chain.

The context's part comes from a kernel that also returns the log of its softmax's denominator. The few keys of
the own chain are joined to it by that, without a mask over all keys of all steps.

Shapes: B rows of a batch, S context rows, N chains, D head width; heads are a multiple of kv heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import PretrainedConfig

from pipeline.errors import ConfigError
from pipeline.features import at_least_fp32
from pipeline.text import one_line
from train.draft.blocks.attention import flex_options
from train.draft.blocks.masks import TILE
from train.runtime.compiled import compiled

# Chains whose scores are held together.
GROUP = 256
# Argument that makes flex_attention return the logarithms too, and how the second result has them.
_AUX = getattr(flex_module, "AuxRequest", None)  # torch 2.8 has none
_WITH_LSE: dict[str, Any] = {"return_lse": True} if _AUX is None else {"return_aux": _AUX(lse=True)}


@dataclass(frozen=True)
class ChainGroup:
    """Consecutive chains of one row that attend together, to a part of the row's context."""

    row: int
    chains: slice
    """Numbers of the chains."""
    context: slice
    """Context rows from the first to the last that any of them sees."""


@dataclass(frozen=True)
class GroupedView:
    """Context rows that each chain sees, a group of chains at a time."""

    groups: tuple[ChainGroup, ...]
    first: Tensor
    """First context row that each chain sees, `[B, N]`."""
    end: Tensor
    """The one after the last, `[B, N]`."""

    def hidden(self, group: ChainGroup) -> Tensor:
        """Return what the group's chains must not see of the group's context, `[n, C]` bool."""
        rows = torch.arange(group.context.start, group.context.stop, device=self.first.device)
        first, end = (each[group.row, group.chains, None] for each in (self.first, self.end))
        return (rows < first) | (rows >= end)


View = GroupedView | BlockMask
"""Context rows that each chain sees; its class decides the kernel."""


def grouped_view(first: Tensor, end: Tensor, spans: np.ndarray | None = None) -> GroupedView:
    """Return the view for the kernel that holds a group's scores.

    Args:
        first: first context row that each chain sees, `[B, N]`.
        end: the one after the last, `[B, N]`; above `first`.
        spans: both on the host, `[B, N, 2]`. Without it, a GPU is waited for.
    """
    known = torch.stack([first, end], dim=-1).cpu().numpy() if spans is None else spans
    groups = []
    for row, own in enumerate(known):
        for start in range(0, len(own), GROUP):
            some = own[start : start + GROUP]
            context = slice(int(some[:, 0].min()), int(some[:, 1].max()))
            groups.append(ChainGroup(row, slice(start, start + len(some)), context))
    return GroupedView(tuple(groups), first, end)


def flex_view(first: Tensor, end: Tensor, seq_len: int) -> BlockMask:
    """Return the view for flex_attention, which skips hidden tiles; arguments as in `grouped_view`."""
    first, end = (each.to(torch.int32).contiguous() for each in (first, end))

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[row, query]) & (key < end[row, query])

    starts = torch.arange(0, seq_len, TILE, dtype=torch.int32, device=first.device)
    seen = (end[..., None].minimum(starts + TILE) - first[..., None].maximum(starts)).clamp(min=0)
    seen = F.pad(seen, (0, 0, 0, -first.shape[1] % TILE)).unflatten(1, (-1, TILE)).sum(2)[:, None]
    return BlockMask.from_kv_blocks(
        *_ordered((seen > 0) & (seen < TILE * TILE)),
        *_ordered(seen == TILE * TILE),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(first.shape[1], seq_len),
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of True in the last dimension, and all places there with those of True first."""
    places = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), places.to(torch.int32)


def attend_context(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    view: View,
    options: Mapping[str, bool | int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each chain to the context rows that it sees.

    Args:
        query: `[B, heads, N, D]`.
        keys: `[B, kv heads, S, D]`.
        values: as `keys`.
        options: of flex_attention's kernels.

    Returns:
        Attended values `[B, heads, N, D]`, and the natural logarithm of the sum of exp(score) `[B, heads, N]`
        in at least fp32.
    """
    # RMSNorm's fp32 weights promote query and keys under autocast.
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    if isinstance(view, GroupedView):
        return _in_groups(query, keys, values, view)
    # Uncompiled flex_attention holds all scores in memory, which is acceptable only in CPU tests.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    flex = compiled(flex_attention) if alone else flex_attention
    attended, extra = flex(
        query,
        keys,
        values,
        block_mask=view,
        enable_gqa=True,
        kernel_options=options,
        **_WITH_LSE,
    )
    return attended, extra if _AUX is None else extra.lse


@torch.compiler.disable  # groups have other shapes in every pack: a graph would be compiled for each
def _in_groups(query: Tensor, keys: Tensor, values: Tensor, view: GroupedView) -> tuple[Tensor, Tensor]:
    return _ChainAttention.apply(query, keys, values, view)


class _ChainAttention(torch.autograd.Function):
    """Attention a group of chains at a time, in at least fp32.

    The backward computes the scores again: kept, they would take memory of the context's length squared, in
    every step of the unroll. With S the scores, P = exp(S - lse), O = P V and their gradients named by d:

        dV = P^T dO        dS = P * (dO V^T - <dO, O> + dlse)
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, view: GroupedView
    ) -> tuple[Tensor, Tensor]:
        exact = at_least_fp32(query[..., :0]).dtype
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:-1], dtype=exact, device=query.device)
        for group in view.groups:
            part, scores = _scores(query, keys, view, group)
            sums = scores.logsumexp(-1)
            lse[group.row, :, group.chains] = sums.flatten(0, 1)
            probs = (scores - sums[..., None]).exp()
            own = at_least_fp32(values[group.row, :, group.context])
            attended = probs.flatten(1, 2) @ own  # [kv heads, heads / kv heads * n, D]
            out[group.row, :, group.chains] = attended.view_as(part).flatten(0, 1).to(out.dtype)
        ctx.save_for_backward(query, keys, values, out, lse)
        ctx.view = view
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, keys, values, out, lse = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        sums = [torch.zeros_like(each, dtype=lse.dtype) for each in (query, keys, values)]
        for group in ctx.view.groups:
            part, scores = _scores(query, keys, ctx.view, group)

            def own(each: Tensor, group: ChainGroup = group, part: Tensor = part) -> Tensor:
                return each[group.row, :, group.chains].to(lse.dtype).unflatten(0, part.shape[:2])

            seen_keys, seen_values = (at_least_fp32(e[group.row, :, group.context]) for e in (keys, values))
            probs = (scores - own(lse)[..., None]).exp().flatten(1, 2)  # [kv heads, heads / kv heads * n, C]
            gradient = own(d_out)
            inner = (gradient * own(out)).sum(-1) - own(d_lse)
            gradient = gradient.flatten(1, 2)
            d_scores = probs * (gradient @ seen_values.mT - inner.flatten(1, 2)[..., None]) * scale
            sums[0][group.row, :, group.chains] = (d_scores @ seen_keys).view_as(part).flatten(0, 1)
            sums[1][group.row, :, group.context] += d_scores.mT @ part.flatten(1, 2)
            sums[2][group.row, :, group.context] += probs.mT @ gradient
        d_query, d_keys, d_values = (
            total.to(each.dtype) for total, each in zip(sums, (query, keys, values), strict=True)
        )
        return d_query, d_keys, d_values, None


def _scores(query: Tensor, keys: Tensor, view: GroupedView, group: ChainGroup) -> tuple[Tensor, Tensor]:
    """Return a group's queries `[kv heads, heads / kv heads, n, D]`, and scores `[.., n, C]`."""
    part = at_least_fp32(query[group.row, :, group.chains]).unflatten(0, (keys.shape[1], -1))
    seen = at_least_fp32(keys[group.row, :, group.context])
    scores = (part.flatten(1, 2) @ seen.mT * query.shape[-1] ** -0.5).view(*part.shape[:-1], -1)
    return part, scores.masked_fill(view.hidden(group), float("-inf"))


def join_own(
    query: Tensor,
    attended: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """Add the keys of the own chain to the attention to the context.

    Args:
        query: `[B, heads, N, D]`.
        attended: of the context, `[B, heads, N, D]`.
        lse: of the context, `[B, heads, N]`.
        keys: of each later step of the chain, the present one included, `[B, kv heads, N, D]`.
        values: as `keys`.

    Returns:
        `[B, heads, N, D]` in the dtype of `attended`.
    """
    if not keys:
        return attended
    grouped = (keys[0].shape[1], -1)
    own = at_least_fp32(query).unflatten(1, grouped)  # [B, kv heads, heads / kv heads, N, D]
    scale = query.shape[-1] ** -0.5
    scores = [(own * at_least_fp32(key)[:, :, None]).sum(-1) * scale for key in keys]
    shares = torch.stack([lse.unflatten(1, grouped), *scores]).softmax(0)[..., None]
    joined = shares[0] * at_least_fp32(attended).unflatten(1, grouped)
    for share, value in zip(shares[1:], values, strict=True):
        joined = joined + share * at_least_fp32(value)[:, :, None]
    return joined.flatten(1, 2).to(attended.dtype)


def resolve_attention(
    name: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Literal["sdpa", "flex"]:
    """Return the attention kernel to use: `auto` is flex if it runs on the device, else sdpa.

    For `auto` on CUDA, a forward and backward with the draft's dimensions are tried.

    Args:
        name: value of `draft.attention`.
        dtype: of queries, keys and values.

    Raises:
        ConfigError: `name` is flex and the device is not CUDA, where flex has no backward.
    """
    if name == "flex" and device.type != "cuda":
        raise ConfigError(f'draft.attention = "flex" needs CUDA, got device {device}: set it to "auto"')
    if name != "auto":
        return name
    if device.type != "cuda":
        return "sdpa"
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    chains, size = 64, 256
    try:
        shapes = ((heads, chains), (kv_heads, size), (kv_heads, size))
        states = [
            torch.randn(1, h, n, dim, device=device, dtype=dtype, requires_grad=True) for h, n in shapes
        ]
        end = torch.arange(1, chains + 1, device=device)[None]
        view = flex_view(torch.zeros_like(end), end, size)
        attended, lse = attend_context(*states, view, flex_options(dim, dtype, device))
        (attended.sum() + lse.sum()).backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # compilers and drivers raise anything
        warnings.warn(
            f"flex_attention does not run here ({one_line(error)}): using matrix products in fp32, which are "
            "slower",
            stacklevel=2,
        )
        return "sdpa"
    return "flex"
