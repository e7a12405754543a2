"""What the pass over the vocabulary is given: the supervised slots, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LowRankBias:
    """A bias on each slot's logits: `weight @ latent`."""

    latent: Tensor
    """`[M, R]`, or `[U, R]` where it depends on the position alone."""
    weight: Tensor
    """`[V, R]`."""
    by_position: bool
    """`latent` has a row per position, not per slot."""


@dataclass(frozen=True, kw_only=True)
class SlotOperands:
    """Everything that the losses of M slots are computed from."""

    hidden: Tensor
    """Block states `[M, H]`."""
    head: Tensor
    """The output head's weight `[V, H]`."""
    labels: Tensor
    """`[M]`; -1 is outside the draft's vocabulary, and has no cross entropy."""
    positions: Tensor
    """Number of the distinct position of each slot's label, `[M]` in `[0, U)`."""
    ordered: np.ndarray | None = None
    """`positions`, ascending, where the host knows them."""
    ce_weights: Tensor
    """`[M]`; each slot's cross entropy counts so much in the sum."""
    l1_weights: Tensor
    """`[M]`; likewise for L1."""
    soft_weights: Tensor | None = None
    """`[M]`; likewise for the cross entropy with the teacher; None doesn't compute it."""
    teacher_hidden: Tensor | None = None
    """The target's post-norm states at the distinct positions `[U, H]`; None for no teacher."""
    teacher_head: Tensor | None = None
    """The head of these states `[V, H]`, without a gradient; None for the draft's own, `head`."""
    teacher_mass: Tensor | None = None
    """The target's probability of the draft's vocabulary, from `train.losses.reach`, `[U]`: L1 counts what
    lies outside too. None takes the teacher's softmax over the draft's vocabulary as it is."""
    reachable: Tensor | None = None
    """The target's most likely token is in the draft's vocabulary, `[U]` bool; None for all."""
    bias: LowRankBias | None = None
    softcap: float | None = None
    """The target's tanh soft-cap on its logits."""
    logit_scale: float = 1.0
    """The target multiplies its logits by this before the soft-cap."""

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Return what a gradient may flow into: hidden, head, the bias's latent and weight."""
        bias = self.bias
        return self.hidden, self.head, None if bias is None else bias.latent, bias and bias.weight

    def replaced(
        self, hidden: Tensor, head: Tensor, latent: Tensor | None, weight: Tensor | None
    ) -> SlotOperands:
        """Return the same operands with other tensors for `differentiable`."""
        bias = None if self.bias is None else replace(self.bias, latent=latent, weight=weight)
        return replace(self, hidden=hidden, head=head, bias=bias)
