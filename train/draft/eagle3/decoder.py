"""Drafting for decoding: a chain of tokens, with a key-value cache of the growing context.

It computes what the unroll of training computes for one anchor, but with the drafted tokens instead of the
true ones, and without computing the context again.

The row of a position needs the token after it. So the last position's row is completed by the next token:
by the anchor of a draft, and again by the first token of what the context is extended with. A draft's other
rows have drafted hidden states. They lie after the context's rows, and are overwritten by what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.draft.eagle3.model import Eagle3Model
from train.draft.kind import Drafted
from train.runtime.sampling import draw


class ChainDecoder:
    """Drafts for one sequence.

    Args:
        model: a draft in eval mode; the dtype of its weights is the compute dtype.
        capacity: rows allocated at first; the cache grows as needed.
    """

    has_confidence = False

    def __init__(self, model: Eagle3Model, capacity: int = 1024):
        self.model = model
        self.slots = model.slots
        self.rows = 0
        """Number of complete rows."""
        self.device = model.fc.weight.device
        config = model.config
        shape = (2, 1, config.num_key_value_heads, capacity, config.head_dim)
        self._cache = torch.empty(shape, dtype=model.fc.weight.dtype, device=self.device)
        self._last: Tensor | None = None
        """Hidden state of the last position, whose row lacks its token, `[1, 1, H]`."""

    def reset(self) -> None:
        """Forget the context."""
        self.rows, self._last = 0, None

    def _make_room(self, rows: int) -> None:
        if rows > self._cache.shape[-2]:
            grown = self._cache.new_empty(*self._cache.shape[:-2], 2 * rows, self._cache.shape[-1])
            grown[..., : self.rows, :] = self._cache[..., : self.rows, :]
            self._cache = grown

    def _rotary(self, states: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the T positions from `row` on, for `states` `[1, T, H]`."""
        positions = torch.arange(row, row + states.shape[1], device=self.device)
        return self.model.rotary_emb(states, positions[None])

    @torch.no_grad()
    def extend(self, features: Tensor, tokens: Tensor) -> None:
        """Append the next T positions to the context.

        Args:
            features: the target's context features there, `[T, L*H]`.
            tokens: ids of the tokens there, `[T]`.
        """
        model = self.model
        hidden = model.project(features.to(self.device, model.fc.weight.dtype))[None]
        tokens = tokens.to(self.device)[None]
        if self._last is None:
            tokens = tokens[:, 1:]
        else:
            hidden = torch.cat([self._last, hidden], dim=1)
        complete, self._last = hidden[:, :-1], hidden[:, -1:]
        if complete.shape[1]:
            end = self.rows + complete.shape[1]
            self._make_room(end + self.slots)
            embeds = model.embed(tokens)
            own = model.midlayer.context(embeds, complete, self._rotary(embeds, self.rows))
            for cached, states in zip(self._cache, own, strict=True):
                cached[:, :, self.rows : end] = states
            self.rows = end

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
        """Draft the tokens after an anchor, which follows the context directly.

        Args:
            anchor: token id.
            temperature: sampling temperature; 0 takes the most likely token.
            threshold: must be 0: this draft has no confidence head.
            confidence_temperatures: not looked at.
            generator: random generator on the draft's device.
        """
        assert self._last is not None, "a chain begins with the state of a context"
        model, hidden = self.model, self._last
        self._make_room(self.rows + self.slots)
        token = torch.as_tensor(anchor, device=self.device)
        tokens, probs = [], []
        for slot in range(self.slots):
            embeds, row = model.embed(token.view(1, 1)), self.rows + slot
            hidden = model.midlayer.decode(embeds, hidden, *self._cache, row, self._rotary(embeds, row))
            final, hidden = model.output(hidden)
            logits = model.draft_logits(final[0, 0])  # [Vd]
            if temperature > 0:
                probs.append(torch.softmax(logits / temperature, -1))
                number = draw(probs[-1], generator)
            else:
                number = logits.argmax()
            token = model.target_ids(number)
            tokens.append(token)
        return Drafted(
            tokens=torch.stack(tokens), probs=model.over_target(torch.stack(probs)) if probs else None
        )
