"""Drafting for decoding, slot by slot: each sees the token drafted before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.features import at_least_fp32
from train.draft.blocks.decoder import BlockDecoder
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.kind import Drafted
from train.runtime.sampling import draw


class DraftDecoder(BlockDecoder):
    """Drafts for one sequence; arguments as of `BlockDecoder`."""

    model: Qwen3DSparkModel

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
        logits = model.draft_logits(hidden)  # [K, V]
        previous = torch.as_tensor(anchor, device=self.device)
        embedded = state = None
        reached = torch.ones((), device=self.device)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for slot in range(self.slots):
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
            previous = model.target_ids(previous)
            tokens.append(previous)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return Drafted(
            tokens=torch.stack(tokens) if tokens else none,
            probs=model.over_target(torch.stack(probs)) if probs else None,
        )

    def _confidence(self, hidden: Tensor, embedded: Tensor | None, temperature: float) -> Tensor:
        """Return the probability that a slot is accepted if all slots before it are."""
        model = self.model
        assert model.confidence_head is not None
        with_markov = model.config.confidence_head_with_markov and embedded is not None
        states = torch.cat([hidden, embedded]) if with_markov else hidden
        return torch.sigmoid(at_least_fp32(model.confidence_head(states)) / temperature)
