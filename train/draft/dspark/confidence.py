"""Confidence head: predicts the probability that the target accepts a slot's token."""

from __future__ import annotations

from torch import Tensor, nn


class AcceptRatePredictor(nn.Module):
    """One linear map to a logit (DSpark paper, section 3.2).

    Args:
        input_dim: H, or H + R when the previous token's Markov embedding is appended.
    """

    def __init__(self, input_dim: int):
        super().__init__()
        self.proj = nn.Linear(input_dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[.., input_dim]` to logits `[..]`."""
        return self.proj(features).squeeze(-1)
