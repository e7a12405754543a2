"""Attention from a block to its context and itself, with its rotary embedding."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, rotate_half

from pipeline.errors import ConfigError
from pipeline.text import one_line
from train.draft.dspark.masks import decoding_mask, flex_block_mask
from train.runtime.compiled import compiled


class DSparkRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding with frequencies that stay fp32 when the model is cast.

    Rounding to bf16 changes them by up to 0.4%, which is several radians at position 4,000.
    """

    def _apply(self, fn, recurse=True):
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if not (exact.is_meta or self.inv_freq.is_meta):
            self.inv_freq = exact.to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
        return self


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to `[B, heads, T, D]`; cos and sin `[B, 1, T, D]`."""
    return states * cos + rotate_half(states) * sin


def resolve_attention(name: str, config: Qwen3Config, device: torch.device) -> Literal["sdpa", "flex"]:
    """Return the attention kernel to use: `auto` is flex if it runs on the device, else sdpa.

    For `auto` on CUDA, a forward and backward with the draft's dimensions are tried: flex needs a compiler,
    and its kernels don't fit every GPU's shared memory.

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
    anchors = torch.arange(1, 65, device=device)[None]
    queries, size = anchors.shape[1] * config.block_size, 256
    try:
        mask = flex_block_mask(anchors, size, config.block_size)
        shapes = ((heads, queries), (kv_heads, size + queries), (kv_heads, size + queries))
        states = [torch.randn(1, h, n, dim, device=device, dtype=torch.bfloat16) for h, n in shapes]
        attend(*(state.requires_grad_(True) for state in states), mask).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # compilers and drivers raise anything
        reason = one_line(error)
        warnings.warn(f"flex_attention does not run here ({reason}): using sdpa", stacklevel=2)
        return "sdpa"
    return "flex"


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Compute attention with the kernel that the mask belongs to.

    Args:
        query: `[B, heads, N*K, D]`.
        keys: `[B, kv heads, S + N*K, D]`; heads are a multiple of kv heads.
        values: as `keys`.
        mask: from `masks`: a tensor selects scaled_dot_product_attention, a BlockMask flex_attention.

    Returns:
        `[B, heads, N*K, D]`.
    """
    # RMSNorm's fp32 weights promote query and keys under autocast.
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    if isinstance(mask, BlockMask):
        # Uncompiled flex_attention holds all scores in memory, which is acceptable only in CPU tests.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        flex = compiled(flex_attention) if alone else flex_attention
        return flex(query, keys, values, block_mask=mask, enable_gqa=True)
    # Repeat by hand: with enable_gqa and a mask, CUDA falls back to the kernel that holds all scores.
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


class DSparkAttention(nn.Module):
    """Queries from the block; keys and values from `[context ; block]`. Qwen3's projections and norms.

    Args:
        window: positions that a slot sees while decoding, its own included; None for all. In `forward` the
            mask decides it.
    """

    def __init__(self, config: Qwen3Config, window: int | None = None):
        super().__init__()
        self.window = window
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, query_width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, hidden, bias=False)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, states: Tensor) -> Tensor:
        """`[B, T, heads*D]` to `[B, T, heads, D]`."""
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[B, kv heads, T, D]` of states `[B, T, H]`, for a key-value cache."""
        cos, sin = (part[:, None] for part in rotary)
        keys = rotate(self.k_norm(self._heads(self.k_proj(states))).transpose(1, 2), cos, sin)
        return keys, self._heads(self.v_proj(states)).transpose(1, 2)

    def decode(
        self, block: Tensor, keys: Tensor, values: Tensor, length: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attend from one block that follows its whole context, as `forward` would.

        Args:
            block: normed block states `[B, K, H]`.
            keys: cached keys of the context `[B, kv heads, >= length + K, D]`; the block's are written after
                them.
            values: as `keys`.
            length: S, the number of cached context positions.
            rotary: cos and sin of the block, `[B, K, D]`.

        Returns:
            `[B, K, H]`.
        """
        cos, sin = (part[:, None] for part in rotary)
        query = rotate(self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2), cos, sin)
        slots = block.shape[1]
        end = length + slots
        keys[:, :, length:end], values[:, :, length:end] = self.keys_values(block, rotary)
        start, mask = 0, None
        if self.window is not None and end > self.window:
            start = max(0, length - self.window + 1)  # the first position that slot 0 sees
            mask = decoding_mask(slots, length, start, self.window, block.device)
        attended = F.scaled_dot_product_attention(
            query, keys[:, :, start:end], values[:, :, start:end], attn_mask=mask, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def forward(
        self, block: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | BlockMask
    ) -> Tensor:
        """Attend from all blocks to their context and themselves.

        Args:
            block: normed block states `[B, N*K, H]`.
            context: normed context states `[B, S, H]`, the same for every layer.
            rotary: cos and sin `[B, S + N*K, D]`, context positions first.
            mask: positions of `[context ; block]` that a slot sees, from `train.draft.dspark.masks`.

        Returns:
            `[B, N*K, H]`.
        """
        seq_len = context.shape[1]
        cos, sin = (part[:, None] for part in rotary)  # [B, 1, S + N*K, D]
        query = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)  # [B, heads, N*K, D]
        query = rotate(query, cos[:, :, seq_len:], sin[:, :, seq_len:])
        # Project separately: joining first would copy the context, which is long.
        keys = torch.cat([self.k_proj(context), self.k_proj(block)], dim=1)
        values = torch.cat([self.v_proj(context), self.v_proj(block)], dim=1)
        keys = rotate(self.k_norm(self._heads(keys)).transpose(1, 2), cos, sin)  # [B, kv heads, S + N*K, D]
        values = self._heads(values).transpose(1, 2)
        attended = attend(query, keys, values, mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))
