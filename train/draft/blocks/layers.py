"""Draft decoder layer: Qwen3's layer, whose attention also reads the context."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from train.draft.blocks.attention import BlockAttention
from train.draft.blocks.masks import Mask


class BlockDecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU on the block. The context, already normed, is only read.

    Args:
        window: as in `BlockAttention`.
    """

    def __init__(self, config: Qwen3Config, window: int | None = None):
        super().__init__()
        self.self_attn = BlockAttention(config, window)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, block: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """Return `[B, N*K, H]`; arguments as in `BlockAttention.forward`, with `block` not normed."""
        block = block + self.self_attn(self.input_layernorm(block), context, rotary, mask)
        return block + self.mlp(self.post_attention_layernorm(block))

    def decode(
        self, block: Tensor, keys: Tensor, values: Tensor, length: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return `[B, K, H]`; arguments as in `BlockAttention.decode`, with `block` not normed."""
        block = block + self.self_attn.decode(self.input_layernorm(block), keys, values, length, rotary)
        return block + self.mlp(self.post_attention_layernorm(block))
