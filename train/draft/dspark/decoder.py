"""Drafting for decoding: block after block, with a key-value cache of the growing context.

It computes what `Qwen3DSparkModel.forward` computes for one anchor, but with the drafted tokens instead of
the true ones, and without computing the context again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.features import at_least_fp32, head_logits
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.kind import Drafted
from train.runtime.sampling import draw


class DraftDecoder:
    """Drafts for one sequence.

    Args:
        model: a draft in eval mode; the dtype of its weights is the compute dtype.
        capacity: positions allocated at first; the cache grows as needed.
    """

    def __init__(self, model: Qwen3DSparkModel, capacity: int = 1024):
        self.model = model
        self.block_size = model.block_size
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
    def extend(self, features: Tensor) -> None:
        """Append the context features of the next positions, `[T, L*H]`."""
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
        """Return the states `[K, H]` of a block whose anchor token follows the context directly."""
        model = self.model
        self._make_room(self.length + model.block_size)
        self._ids[0, 0] = anchor
        block = model.embed_tokens(self._ids) * model.embedding_scale
        rotary = self._rotary(block)
        for layer, keys, values in zip(model.layers, *self._cache, strict=True):
            block = layer.decode(block, keys, values, self.length, rotary)
        return model.norm(block)[0]

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

        The confidence that decides whether a slot is drafted does not depend on the slot's own token. So
        drafting less does not change the distribution of the output (losslessness).

        Args:
            anchor: token id.
            temperature: sampling temperature; 0 takes the most likely token.
            threshold: stop before the first slot at which the product of the confidences, the slot's own
                included, is lower. 0 drafts all slots.
            confidence_temperatures: divisor of each slot's confidence logit, `[K]`.
            generator: random generator on the draft's device.
        """
        model, head = self.model, self.model.markov_head
        hidden = self.block_states(anchor)  # [K, H]
        logits = head_logits(hidden, model.lm_head.weight, model.softcap, model.logit_scale)  # [K, V]
        previous = torch.as_tensor(anchor, device=self.device)
        embedded = state = None
        reached = torch.ones((), device=self.device)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for slot in range(model.block_size):
            if head is not None:
                embedded = head.markov_w1(previous)
            if threshold > 0:
                scale = 1.0 if confidence_temperatures is None else confidence_temperatures[slot]
                reached = reached * self._confidence(hidden[slot], embedded, scale)
                if reached < threshold:
                    break
            scores = logits[slot]
            if head is not None:
                latent, state = head.step(embedded, hidden[slot], state)
                scores = scores + head(latent)
            if temperature > 0:
                probs.append(torch.softmax(scores / temperature, -1))
                previous = draw(probs[-1], generator)
            else:
                previous = scores.argmax()
            tokens.append(previous)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return Drafted(
            tokens=torch.stack(tokens) if tokens else none,
            probs=torch.stack(probs) if probs else None,
        )

    def _confidence(self, hidden: Tensor, embedded: Tensor | None, temperature: float) -> Tensor:
        """Return the probability that a slot is accepted if all slots before it are."""
        model = self.model
        assert model.confidence_head is not None
        with_markov = model.config.confidence_head_with_markov and embedded is not None
        states = torch.cat([hidden, embedded]) if with_markov else hidden
        return torch.sigmoid(at_least_fp32(model.confidence_head(states)) / temperature)
