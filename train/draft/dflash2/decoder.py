"""Drafting for decoding: a walk through the candidates of a block, each chosen by the one before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.draft.blocks.decoder import BlockDecoder
from train.draft.dflash2.model import Qwen3DFlash2Model
from train.draft.kind import Drafted
from train.runtime.sampling import draw


class SelectingDecoder(BlockDecoder):
    """Drafts for one sequence; arguments as of `BlockDecoder`."""

    model: Qwen3DFlash2Model

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

        Arguments are as of `BlockDecoder.draft`. A token that is no candidate has probability 0.
        """
        model, selector = self.model, self.model.candidate_selector
        hidden = self.block_states(anchor)  # [K, H]
        logits = model.draft_logits(hidden)  # [K, V]
        best, candidates = logits.topk(selector.top_k)  # [K, C]
        previous = torch.as_tensor(anchor, device=self.device)
        tokens: list[Tensor] = []
        probs = torch.zeros_like(logits)
        for slot in range(self.slots):
            scores = best[slot] + selector(hidden[slot], previous, candidates[slot])  # [C]
            if temperature > 0:
                own = torch.softmax(scores / temperature, -1)
                probs[slot, candidates[slot]] = own
                choice = draw(own, generator)
            else:
                choice = scores.argmax()
            previous = candidates[slot, choice]
            tokens.append(previous)
        return Drafted(tokens=torch.stack(tokens), probs=probs if temperature > 0 else None)
