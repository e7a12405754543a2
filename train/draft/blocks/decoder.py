"""Drafting for decoding: block after block, with a key-value cache of the growing context.

It computes what a training forward computes for one anchor, but with the drafted tokens instead of
the true ones, and without computing the context again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.draft.blocks.model import BlockDraftModel
from train.draft.kind import Drafted
from train.runtime.sampling import draw


class BlockDecoder:
    """Drafts for one sequence, all slots of a block at once.

    Args:
        model: a draft in eval mode; the dtype of its weights is the compute dtype.
        capacity: positions allocated at first; the cache grows as needed.
    """

    def __init__(self, model: BlockDraftModel, capacity: int = 1024):
        self.model = model
        self.slots = model.slots
        self.has_confidence = model.confidence_head is not None
        self.length = 0
        """Number of cached context positions."""
        self.device = model.fc.weight.device
        config = model.config
        ids = [config.mask_token_id] * model.block_size
        self._ids = torch.tensor([ids], device=self.device)
        shape = (2, config.num_hidden_layers, 1, config.num_key_value_heads, capacity, config.head_dim)
        self._cache = torch.empty(shape, dtype=model.fc.weight.dtype, device=self.device)

    def reset(self) -> None:
        """Forget the context."""
        self.length = 0

    def _make_room(self, positions: int) -> None:
        if positions > self._cache.shape[-2]:
            grown = self._cache.new_empty(*self._cache.shape[:-2], 2 * positions, self._cache.shape[-1])
            grown[..., : self.length, :] = self._cache[..., : self.length, :]
            self._cache = grown

    def _rotary(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the T positions from `length` on, for `states` `[1, T, H]`."""
        positions = torch.arange(self.length, self.length + states.shape[1], device=self.device)
        return self.model.rotary_emb(states, positions[None])

    @torch.no_grad()
    def extend(self, features: Tensor, tokens: Tensor | None = None) -> None:
        """Append the context features of the next positions, `[T, L*H]`. Their tokens are not looked at."""
        model = self.model
        context = model.hidden_norm(model.fc(features.to(self.device, model.fc.weight.dtype)))[None]
        rotary, end = self._rotary(context), self.length + len(features)
        self._make_room(end + model.block_size)
        for layer, keys, values in zip(model.layers, *self._cache, strict=True):
            rows = slice(self.length, end)
            keys[:, :, rows], values[:, :, rows] = layer.self_attn.keys_values(context, rotary)
        self.length = end

    @torch.no_grad()
    def block_states(self, anchor: int | Tensor) -> Tensor:
        """Return the states `[slots, H]` of a block whose anchor token follows the context directly."""
        model = self.model
        self._make_room(self.length + model.block_size)
        self._ids[0, 0] = anchor
        block = model.embed_tokens(self._ids) * model.embedding_scale
        rotary = self._rotary(block)
        for layer, keys, values in zip(model.layers, *self._cache, strict=True):
            block = layer.decode(block, keys, values, self.length, rotary)
        return model.norm(block)[0, model.first_slot :][: self.slots]

    @torch.no_grad()
    def draft(
        self,
        anchor: int | Tensor,
        temperature: float = 0.0,
        *,
        threshold: float = 0.0,
        confidence_temperatures: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> Drafted:
        """Draft the tokens after an anchor, which follows the context directly, each by itself.

        Args:
            anchor: token id.
            temperature: sampling temperature; 0 takes the most likely token.
            threshold: must be 0: this draft has no confidence head.
            confidence_temperatures: not looked at.
            generator: random generator on the draft's device.
        """
        logits = self.model.draft_logits(self.block_states(anchor))  # [K, Vd]
        if temperature == 0:
            return Drafted(tokens=self.model.target_ids(logits.argmax(-1)), probs=None)
        probs = torch.softmax(logits / temperature, -1)
        tokens = torch.stack([draw(row, generator) for row in probs])
        return Drafted(tokens=self.model.target_ids(tokens), probs=self.model.over_target(probs))
