"""Attention from a block to its context and itself, with its rotary embedding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, rotate_half

from pipeline.errors import ConfigError
from pipeline.features import at_least_fp32
from pipeline.text import one_line
from train.draft.blocks.flops import hidden_flops
from train.draft.blocks.masks import BlockGroup, GroupedMask, Mask, decoding_mask, flex_block_mask
from train.runtime.compiled import compiled

# Bytes of shared memory that a block of threads may have on the smallest GPU that the compiler's own tiles
# of flex_attention fit, an A100. GeForce and L40 cards have 101,376.
SMALL_GPU = 166_912


class BlockRotaryEmbedding(Qwen3RotaryEmbedding):
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


def flex_options(dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, bool | int]:
    """Return what flex_attention's kernels are told, so that they compile and run on the device.

    Args:
        dim: D, the width of an attention head.
        dtype: of queries, keys and values.
    """
    # Below 128 queries the compiler would take its decoding kernel, which has no tile for grouped heads.
    options: dict[str, bool | int] = {"FORCE_USE_FLEX_ATTENTION": True}
    memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALL_GPU)
    if memory < SMALL_GPU:  # the compiler's own tiles are an A100's
        row = dim * dtype.itemsize
        options |= {
            "fwd_BLOCK_M": 64 if row <= 256 else 32,
            "fwd_BLOCK_N": 32 if row <= 512 else 16,
            "fwd_num_stages": 2 if row <= 256 else 1,
            "bwd_num_stages": 1,
        }
        if row > 256:
            options |= dict.fromkeys(
                ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32 if row <= 512 else 16
            )
    return options


def resolve_attention(
    name: str,
    config: Qwen3Config,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 4096,
) -> Literal["sdpa", "flex"]:
    """Return the attention kernel to use: `auto` is flex if it runs on the device, else sdpa.

    For `auto` on CUDA, a forward and backward with the draft's dimensions are tried: flex needs a compiler,
    and its kernels don't fit every GPU's shared memory. A warning says what sdpa costs instead.

    Args:
        name: value of `draft.attention`.
        config: the draft's config.
        device: where the draft runs.
        dtype: of queries, keys and values.
        tokens: of a pack, for the warning.

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
    count, size = 64, 256
    queries = count * config.block_size
    try:
        anchors = torch.arange(1, count + 1, device=device)[None]
        mask = flex_block_mask(anchors, size, config.block_size)
        shapes = ((heads, queries), (kv_heads, size + queries), (kv_heads, size + queries))
        states = [torch.randn(1, h, n, dim, device=device, dtype=dtype) for h, n in shapes]
        options = flex_options(dim, dtype, device)
        attend(*(state.requires_grad_(True) for state in states), mask, options).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # compilers and drivers raise anything
        reason = one_line(error)
        more = hidden_flops(config, tokens) / 1e12
        warnings.warn(
            f"flex_attention does not run here ({reason}): using sdpa, which is slower. It computes about "
            f"{more:.2g} TFLOP a micro-batch of {tokens} tokens that flex_attention would skip",
            stacklevel=2,
        )
        return "sdpa"
    return "flex"


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Mask,
    options: Mapping[str, bool | int] | None = None,
) -> Tensor:
    """Compute attention with the kernel that the mask belongs to.

    Args:
        query: `[B, heads, N*K, D]`.
        keys: `[B, kv heads, S + N*K, D]`; heads are a multiple of kv heads.
        values: as `keys`.
        mask: from `masks`: a BlockMask selects flex_attention, the others scaled_dot_product_attention.
        options: of flex_attention's kernels, from `flex_options`.

    Returns:
        `[B, heads, N*K, D]`.
    """
    # RMSNorm's fp32 weights promote query and keys under autocast.
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    if isinstance(mask, BlockMask):
        # Uncompiled flex_attention holds all scores in memory, which is acceptable only in CPU tests.
        alone = query.is_cuda and not torch.compiler.is_compiling()
        flex = compiled(flex_attention) if alone else flex_attention
        return flex(query, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)
    if isinstance(mask, GroupedMask):
        return _in_groups(query, keys, values, mask)
    return _sdpa(query, keys, values, mask)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    # Repeat by hand: with enable_gqa and a mask, CUDA falls back to the kernel that holds all scores.
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(repeats, dim=1) for states in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@torch.compiler.disable  # groups have other shapes in every pack: a graph would be compiled for each
def _in_groups(query: Tensor, keys: Tensor, values: Tensor, mask: GroupedMask) -> Tensor:
    return _GroupedAttention.apply(query, keys, values, mask)


class _GroupedAttention(torch.autograd.Function):
    """sdpa, a group of blocks at a time.

    The backward computes each group again. Autograd would keep the keys, values and mask of every group: as
    many as there are groups, each as long as the context, so their memory would grow with its square.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, keys: Tensor, values: Tensor, mask: GroupedMask) -> Tensor:
        ctx.save_for_backward(query, keys, values)
        ctx.mask = mask
        out = torch.empty_like(query)
        for group in mask.groups:
            parts = _parts(query, keys, values, mask, group)
            out[group.row, :, mask.queries(group)] = _sdpa(*parts, mask.of(group))[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        mask, states = ctx.mask, ctx.saved_tensors
        # The context's gradients are sums over groups: in fp32, as a kernel over all of them would add.
        sums = [torch.zeros_like(each, dtype=at_least_fp32(each[..., :0]).dtype) for each in states]
        for group in mask.groups:
            parts = [part.requires_grad_() for part in _parts(*states, mask, group)]
            own = gradient[group.row : group.row + 1, :, mask.queries(group)]
            with torch.enable_grad():
                found = torch.autograd.grad(_sdpa(*parts, mask.of(group)), parts, own)
            sums[0][group.row, :, mask.queries(group)] = found[0][0].to(sums[0].dtype)
            context = group.context.stop - group.context.start
            slots = _slots(mask, group)
            for total, part in zip(sums[1:], found[1:], strict=True):
                total[group.row, :, group.context] += part[0, :, :context]
                total[group.row, :, slots] = part[0, :, context:].to(total.dtype)
        query, keys, values = (total.to(each.dtype) for total, each in zip(sums, states, strict=True))
        return query, keys, values, None


def _slots(mask: GroupedMask, group: BlockGroup) -> slice:
    """Return the keys of the group's own blocks, which follow the context."""
    queries = mask.queries(group)
    return slice(mask.seq_len + queries.start, mask.seq_len + queries.stop)


def _parts(
    query: Tensor, keys: Tensor, values: Tensor, mask: GroupedMask, group: BlockGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the group's queries `[1, heads, n*K, D]`, and the keys and values that it may see."""
    row, slots = slice(group.row, group.row + 1), _slots(mask, group)
    seen = (torch.cat([each[row, :, group.context], each[row, :, slots]], dim=2) for each in (keys, values))
    return (query[row, :, mask.queries(group)].detach(), *(each.detach() for each in seen))


class BlockAttention(nn.Module):
    """Queries from the block; keys and values from `[context ; block]`. Qwen3's projections and norms.

    Args:
        window: positions that a slot sees while decoding, its own included; None for all. In `forward` the
            mask decides it.
    """

    def __init__(self, config: Qwen3Config, window: int | None = None):
        super().__init__()
        self.window = window
        self.flex_options: dict[str, bool | int] | None = None
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

    def forward(self, block: Tensor, context: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """Attend from all blocks to their context and themselves.

        Args:
            block: normed block states `[B, N*K, H]`.
            context: normed context states `[B, S, H]`, the same for every layer.
            rotary: cos and sin `[B, S + N*K, D]`, context positions first.
            mask: positions of `[context ; block]` that a slot sees, from `train.draft.blocks.masks`.

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
        attended = attend(query, keys, values, mask, self.flex_options)
        return self.o_proj(attended.transpose(1, 2).flatten(2))
