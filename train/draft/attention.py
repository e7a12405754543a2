"""Attention from a block to its context and itself, and the rotary embedding it uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, rotate_half


class DSparkRotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding whose frequencies stay fp32 when the model is cast.

    In bf16 they are off by up to 0.4%, which at position 4,000 is several radians.
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


class DSparkAttention(nn.Module):
    """Queries from the block; keys and values from `[context ; block]`. Qwen3's projections and norms."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
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

    def forward(self, block: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Attend.

        Args:
            block: normed block states `[B, N*K, H]`.
            context: normed context states `[B, S, H]`, the same for every layer.
            rotary: cos and sin `[B, S + N*K, D]`, context positions first.
            mask: `[B, 1, N*K, S + N*K]` bool.

        Returns:
            `[B, N*K, H]`.
        """
        seq_len = context.shape[1]
        cos, sin = (part[:, None] for part in rotary)  # [B, 1, S + N*K, D]
        query = self.q_norm(self._heads(self.q_proj(block))).transpose(1, 2)  # [B, heads, N*K, D]
        query = rotate(query, cos[:, :, seq_len:], sin[:, :, seq_len:])
        # Projected apart: the context is what is long, and joining it to the block first would copy it.
        keys = torch.cat([self.k_proj(context), self.k_proj(block)], dim=1)
        values = torch.cat([self.v_proj(context), self.v_proj(block)], dim=1)
        keys = rotate(self.k_norm(self._heads(keys)).transpose(1, 2), cos, sin)  # [B, kv heads, S + N*K, D]
        values = self._heads(values).transpose(1, 2)
        # Repeated by hand: with enable_gqa and a mask, CUDA is left with the kernel that holds all scores.
        repeats = query.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.o_proj(attended.transpose(1, 2).flatten(2))
