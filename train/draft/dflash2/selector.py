"""Selector: scores the candidates of a slot by the token before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from pipeline.features import at_least_fp32


class CandidateSelector(nn.Module):
    """Score of candidate b after token a at state h: <A[a] * P h, B[b]>, added to the logit of b.

    As made it scores every candidate 0.
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        shape = (config.vocab_size, config.selector_rank)
        self.top_k = config.selector_top_k
        self.deviation = config.initializer_range
        self.predecessor_codebook = nn.Parameter(torch.empty(shape))
        self.successor_codebook = nn.Parameter(torch.empty(shape))
        self.hidden_projection = nn.Linear(config.hidden_size, config.selector_rank, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Make the scores 0: B is, and has a gradient all the same, as A and P are not."""
        self.predecessor_codebook.normal_(std=self.deviation)
        self.successor_codebook.zero_()

    def forward(self, hidden: Tensor, previous: Tensor, candidates: Tensor) -> Tensor:
        """Score candidates.

        Args:
            hidden: states of slots `[.., H]`.
            previous: token before each slot's, `[..]`.
            candidates: token ids, `[.., C]`.

        Returns:
            `[.., C]`, at least fp32.
        """
        gate = self.predecessor_codebook[previous] * self.hidden_projection(hidden)
        products = gate.unsqueeze(-2) * self.successor_codebook[candidates]
        return at_least_fp32(products).sum(-1)
