"""Markov heads: add a low-rank bias to each slot's logits, by the token before it.

DSpark paper, section 3.1. Shapes: R rank, V vocabulary, Vd the draft's, H hidden size. To add a head:
subclass `MarkovHead`, put it in `MARKOV_HEADS`, and name it in `train.draft.dspark.settings.DSparkConfig`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pipeline.features import vocabulary_logits
from train.draft.blocks.regression import product, regular_root


class MarkovHead(nn.Module, ABC):
    """Base of all heads: W1 embeds the previous token x, `latent` transforms it, W2 maps to the vocabulary.

    Args:
        vocab_size: V.
        hidden_size: H.
        rank: R.
        outputs: Vd, tokens that get a bias; None for V.
    """

    fresh_gate: float | None = None
    """Factor of W1[x] in a fresh head's latent; None where it is no multiple of W1[x]."""
    by_position: bool
    """True if the bias depends on the previous token alone. It is then computed once per position."""

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, outputs: int | None = None):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, outputs or vocab_size, bias=False)

    @staticmethod
    @abstractmethod
    def multiply_adds(hidden_size: int, rank: int) -> int:
        """Return the multiply-adds of `latent` per slot."""

    @abstractmethod
    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return the input of W2 `[.., K, R]`, from W1[x] `[.., K, R]` and the states `[.., K, H]`."""

    @torch.no_grad()
    def begin(
        self,
        embedding: Tensor,
        mean: Tensor,
        head: Tensor,
        of_tokens: Tensor,
        tokens: Tensor,
        root: Tensor,
    ) -> None:
        """Set W1 and W2 to the best factors of bias = head @ of_tokens^T @ (embedding[x] - mean).

        The best of all of rank R has the least mean square error of the logits over tokens x.

        Args:
            embedding: `[V, H]`.
            mean: of the embeddings of the x that occur, `[H]`.
            head: `[Vd, H]`.
            of_tokens: `[H, H]`.
            tokens: covariance of the embeddings of the x that occur, `[H, H]`.
            root: root of the logits' covariance by states, `[H, H]`, lower triangular.
        """
        inner = regular_root(tokens)
        left, sizes, right = torch.linalg.svd(inner.T @ of_tokens @ root)
        rank = min(self.markov_w1.embedding_dim, len(sizes))
        left = torch.linalg.solve_triangular(inner.T, left[:, :rank], upper=True)  # [H, rank]
        right = torch.linalg.solve_triangular(root.T, right[:rank].T, upper=True)
        left = left * sizes[:rank]
        first = product(embedding, left) - mean @ left
        second = product(head, right) / (self.fresh_gate or 1.0)
        # Equal sizes learn at equal rates.
        balance = (second.square().mean() / first.square().mean().clamp(min=1e-12)).sqrt().sqrt()
        # Beyond H, W1 stays random: with both factors zero neither would ever get a gradient.
        self.markov_w1.weight[:, :rank] = first * balance
        self.markov_w2.weight.zero_()[:, :rank] = second / balance

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute `latent` for one slot, for drafting token by token.

        Args:
            embedded: W1[x] `[.., R]`.
            hidden: the slot's state `[.., H]`.
            state: state returned for the slot before; None for the first slot.

        Returns:
            The input of W2 `[.., R]`, and the state for the next slot.
        """
        return self.latent(embedded, hidden), None

    def forward(self, latent: Tensor) -> Tensor:
        """Return the logits' bias `[.., Vd]` in fp32, from the input of W2 for some slots, `[.., R]`."""
        return vocabulary_logits(latent, self.markov_w2.weight)


class VanillaMarkovHead(MarkovHead):
    """bias = W2 W1[x], for the previous token x."""

    fresh_gate = 1.0
    by_position = True

    @staticmethod
    def multiply_adds(hidden_size: int, rank: int) -> int:
        return 0

    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return embedded


class GatedMarkovHead(MarkovHead):
    """bias = W2 (sigmoid(G [h; W1[x]]) * W1[x])."""

    fresh_gate = 0.5
    by_position = False

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, outputs: int | None = None):
        super().__init__(vocab_size, hidden_size, rank, outputs)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    @staticmethod
    def multiply_adds(hidden_size: int, rank: int) -> int:
        return (hidden_size + rank) * rank

    @torch.no_grad()
    def begin(self, *factors: Tensor) -> None:
        super().begin(*factors)
        for parameter in self.gate_proj.parameters():
            parameter.zero_()  # so that every gate is the half that the factors count on

    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1))) * embedded


class RNNMarkovHead(MarkovHead):
    """Recurrent head with a state s over the block's slots, s0 = 0.

    z = [s; W1[x]; h], [g, c, o] = J z, s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), bias = W2 tanh(o).
    """

    by_position = False

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, outputs: int | None = None):
        super().__init__(vocab_size, hidden_size, rank, outputs)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    @staticmethod
    def multiply_adds(hidden_size: int, rank: int) -> int:
        return (2 * rank + hidden_size) * 3 * rank

    def latent(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        state, outputs = None, []
        for slot in range(embedded.shape[-2]):
            output, state = self.step(embedded[..., slot, :], hidden[..., slot, :], state)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        state = torch.zeros_like(embedded) if state is None else state
        joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": VanillaMarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RNNMarkovHead,
}
