"""Convolutions over the rows of a block, before and after attention and MLP of a layer.

With two taps a row reads itself and the row before it; the first row of a block has none before it. The
weight of a tap is a learned one per channel plus a correction per group of channels, a linear map of what
attention or MLP reads. The output's convolution has its corrections from there, too.

Shapes: B rows of a batch, N blocks, T rows of a block, H channels, G groups, J taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config

from train.draft.blocks.layers import BlockDecoderLayer
from train.draft.blocks.masks import Mask


class BlockConvolution(nn.Module):
    """Convolutions of the input and of the output of a layer's part; as made they change nothing."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        hidden, taps, self.group = config.hidden_size, config.conv_kernel_size, config.conv_group_size
        self.block_size = config.block_size
        self.base_kernel = nn.Parameter(torch.empty(2, taps, hidden))  # of input and output
        self.kernel_projection = nn.Linear(hidden, 2 * taps * (hidden // self.group), bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make both convolutions pass on what they are given."""
        self.base_kernel.zero_()[:, 0] = 1
        self.kernel_projection.weight.zero_()

    def before(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve the input of a part, `[B, N*T, H]`.

        Returns:
            The part's input `[B, N*T, H]`, and the output's corrections `[B, N*T, J, G]`, for `after`.
        """
        corrections = self.kernel_projection(states).unflatten(-1, (2, len(self.base_kernel[0]), -1))
        return self._convolve(states, corrections[..., 0, :, :], 0), corrections[..., 1, :, :]

    def after(self, states: Tensor, corrections: Tensor) -> Tensor:
        """Convolve the output of a part, `[B, N*T, H]`; `corrections` from `before`."""
        return self._convolve(states, corrections, 1)

    def _convolve(self, states: Tensor, corrections: Tensor, side: int) -> Tensor:
        blocks = states.unflatten(1, (-1, self.block_size))  # [B, N, T, H]
        weights = corrections.repeat_interleave(self.group, -1) + self.base_kernel[side]  # [B, N*T, J, H]
        weights = weights.unflatten(1, (-1, self.block_size))
        out = weights[..., 0, :] * blocks
        for tap in range(1, weights.shape[-2]):
            out = out + weights[..., tap, :] * F.pad(blocks[:, :, :-tap], (0, 0, tap, 0))
        return out.flatten(1, 2)


class ConvolvedDecoderLayer(BlockDecoderLayer):
    """A draft's decoder layer with convolutions around attention and MLP; arguments as in the base class."""

    def __init__(self, config: Qwen3Config, window: int | None = None):
        super().__init__(config, window)
        self.attention_conv = BlockConvolution(config)
        self.mlp_conv = BlockConvolution(config)

    def forward(self, block: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        states, corrections = self.attention_conv.before(self.input_layernorm(block))
        attended = self.self_attn(states, context, rotary, mask)
        return self._mlp(block + self.attention_conv.after(attended, corrections))

    def decode(
        self, block: Tensor, keys: Tensor, values: Tensor, length: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        states, corrections = self.attention_conv.before(self.input_layernorm(block))
        attended = self.self_attn.decode(states, keys, values, length, rotary)
        return self._mlp(block + self.attention_conv.after(attended, corrections))

    def _mlp(self, block: Tensor) -> Tensor:
        states, corrections = self.mlp_conv.before(self.post_attention_layernorm(block))
        return block + self.mlp_conv.after(self.mlp(states), corrections)
