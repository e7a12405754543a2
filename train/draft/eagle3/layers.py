"""EAGLE-3's decoder layer: Llama's, on a token's embedding beside a hidden state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from train.draft.blocks.attention import rotate

Rotary = tuple[Tensor, Tensor]
"""cos and sin of a row's positions, `[B, T, D]`."""


class Eagle3Attention(nn.Module):
    """Llama's projections, without biases and head norms, of an input twice as wide as the output."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        wide, hidden = 2 * config.hidden_size, config.hidden_size
        self.q_proj = nn.Linear(wide, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(wide, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(wide, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)

    def _heads(self, states: Tensor) -> Tensor:
        """`[B, T, heads*D]` to `[B, heads, T, D]`."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def query(self, states: Tensor, rotary: Rotary) -> Tensor:
        """Return the queries `[B, heads, T, D]` of normed states `[B, T, 2*H]`."""
        cos, sin = (part[:, None] for part in rotary)
        return rotate(self._heads(self.q_proj(states)), cos, sin)

    def keys_values(self, states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[B, kv heads, T, D]` of normed states `[B, T, 2*H]`."""
        cos, sin = (part[:, None] for part in rotary)
        values = self._heads(self.v_proj(states))
        return rotate(self._heads(self.k_proj(states)), cos, sin).to(values.dtype), values


class Eagle3Layer(nn.Module):
    """One layer. The residual is the hidden state before its norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Eagle3Attention(config)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def joined(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Return the attention's input `[B, T, 2*H]`: embeddings and states `[B, T, H]`, both normed."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def context(self, embeds: Tensor, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[B, kv heads, T, D]` of rows."""
        return self.self_attn.keys_values(self.joined(embeds, hidden), rotary)

    def residual(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output: attended values `[B, heads, T, D]` and the MLP added to `hidden`."""
        hidden = hidden + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def decode(
        self, embeds: Tensor, hidden: Tensor, keys: Tensor, values: Tensor, row: int, rotary: Rotary
    ) -> Tensor:
        """Compute one row of one sequence, which sees the rows before it and itself.

        Args:
            embeds: `[1, 1, H]`.
            hidden: `[1, 1, H]`.
            keys: cached keys `[1, kv heads, > row, D]`; the row's are written.
            values: as `keys`.
            row: number of the row.
            rotary: cos and sin of its position, `[1, 1, D]`.

        Returns:
            `[1, 1, H]`.
        """
        states = self.joined(embeds, hidden)
        query = self.self_attn.query(states, rotary)
        own = slice(row, row + 1)
        keys[:, :, own], values[:, :, own] = self.self_attn.keys_values(states, rotary)
        seen = (each[:, :, : row + 1] for each in (keys, values))
        attended = F.scaled_dot_product_attention(query.to(values.dtype), *seen, enable_gqa=True)
        return self.residual(hidden, attended)
