"""A naive float64 reference of the losses over a vocabulary that is a part of the target's.

Written from the terms' definitions, one slot at a time and over the target's whole vocabulary, where the
draft gives nothing to the tokens that it lacks. So no formula with a mass is needed, and none can be wrong.

Shapes: M slots, U positions, H hidden size, V the target's vocabulary, Vd the draft's, R rank of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import log_softmax


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Operands of M slots' losses, in float64."""

    hidden: Tensor  # [M, H]
    head: Tensor  # the draft's, [Vd, H]
    latent: Tensor | None  # [M, R], or [U, R] with by_position
    weight: Tensor | None  # [Vd, R]
    by_position: bool
    target_head: Tensor  # [V, H]
    kept: list[int]  # the target's token of each of the draft's
    whole: bool  # L1 and matches over the target's whole vocabulary; else the teacher has the draft's alone
    teacher_hidden: Tensor  # [U, H]
    positions: list[int]  # each slot's, of U
    labels: list[int]  # -1 outside
    softcap: float | None
    scale: float


def capped(x: Inputs, logits: Tensor) -> Tensor:
    """The target's factor and soft cap."""
    logits = logits * x.scale
    return logits if x.softcap is None else x.softcap * torch.tanh(logits / x.softcap)


def slot(x: Inputs, number: int) -> dict[str, Tensor]:
    """Cross entropy, L1, soft cross entropy and match of one slot."""
    position = x.positions[number]
    draft = capped(x, x.head @ x.hidden[number])
    if x.weight is not None and x.latent is not None:
        draft = draft + x.weight @ x.latent[position if x.by_position else number]
    log_p = log_softmax(draft)
    target = capped(x, x.target_head @ x.teacher_hidden[position]).detach()
    q = log_softmax(torch.stack([target[token] for token in x.kept])).exp()
    label = x.labels[number]
    top = x.kept[int(draft.argmax())]
    if x.whole:
        of_all = log_softmax(target).exp()
        wide = torch.zeros(len(target), dtype=torch.float64).index_put((torch.tensor(x.kept),), log_p.exp())
        l1, match = (wide - of_all).abs().sum(), top == int(target.argmax())
    else:
        l1, match = (log_p.exp() - q).abs().sum(), top == x.kept[int(q.argmax())]
    return {
        "ce": 0 * draft.sum() if label < 0 else -log_p[label],
        "l1": l1,
        "soft_ce": sum((-q[v] * log_p[v] for v in range(len(q))), torch.zeros(())),
        "matches": torch.tensor(match),
    }


def slots(x: Inputs) -> dict[str, Tensor]:
    """The same of all, `[M]`."""
    found = [slot(x, number) for number in range(len(x.hidden))]
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def reach(x: Inputs) -> tuple[list[float], list[bool]]:
    """Of each position, the target's probability of the tokens kept, and whether its likeliest is kept."""
    mass, reachable = [], []
    for hidden in x.teacher_hidden:
        target = capped(x, x.target_head @ hidden)
        probabilities = log_softmax(target).exp().tolist()
        mass.append(sum(probabilities[token] for token in x.kept))
        reachable.append(int(target.argmax()) in x.kept)
    return mass, reachable
