"""Loss terms over supervised slots, written to be read: this is the definition.

DSpark paper, section 3.3. B rows, N anchors, K slots, V vocabulary, M supervised slots. Slot k weighs
w_k = exp(-k / gamma), and counts where it is supervised. Every term is sum(w * term) / sum(w). Where slots
have weights of their own, whose sum says something, the divisor is the number of blocks. The functions here
return the sums; the division happens once, after everything that belongs together was added up.

To add a term: write its function, put it in `TERMS` and `TITLES`, give it a weight `<name>_alpha` in the
`[loss]` class of a kind of draft, and test it against an independent reference. A term that needs the whole
vocabulary, as cross entropy does, also needs its gradient in `train.losses.plain` and `train.losses.kernels`,
and its name in `OF_THE_VOCABULARY`.

A draft may have a part of the target's vocabulary. q is the teacher's softmax over that part. A label outside
is -1. Where the target's probability of the part, the teacher's mass m, is given, L1 goes over the target's
whole vocabulary: sum |p - m q| + (1 - m), with p = 0 and the target's own probabilities outside. Without it
L1 is sum |p - q|. The soft cross entropy is with q in either case.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.features import at_least_fp32
from train.config import LossConfig


@dataclass(frozen=True)
class Supervised:
    """Which slots of a forward are supervised, as a mask and as numbers.

    The numbers are found once. A mask used as an index is expanded to them at each use, forward and backward,
    and each time the host waits for the GPU.
    """

    mask: Tensor
    """`[B, N, K]` bool."""
    numbers: Tensor
    """Where the mask, flattened, is True: `[M]` int64, ascending."""

    @classmethod
    def of(cls, mask: Tensor, count: int | None = None) -> Supervised:
        """Find the slots that a mask `[B, N, K]` names; `count` as in `places`."""
        return cls(mask, places(mask.flatten(), count))

    def take(self, values: Tensor) -> Tensor:
        """Return the values of the supervised slots: `[B, N, K, ..]` to `[M, ..]`."""
        return values.flatten(0, 2).index_select(0, self.numbers)

    def lay_out(self, values: Tensor) -> Tensor:
        """Lay values of the supervised slots, `[M]`, out as `[B, N, K]`, with zeros at the other slots."""
        laid_out = values.new_zeros(self.mask.numel()).index_copy(0, self.numbers, values)
        return laid_out.view(self.mask.shape)

    def weights(self, gamma: float | None) -> Tensor:
        """Return the weight of each supervised slot, `[M]`; `gamma` as in `slot_weights`."""
        slots = self.mask.shape[-1]
        return slot_weights(slots, gamma, self.mask.device).index_select(0, self.numbers % slots)


def places(mask: Tensor, count: int | None = None) -> Tensor:
    """Return where a mask `[n]` is True: `[M]` int64, ascending.

    Args:
        count: M, known on the host; None waits for the device to tell.
    """
    if count is None:
        return mask.nonzero().squeeze(1)
    torch._assert_async(mask.sum() == count, "the host counted another number of supervised slots")
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]


@dataclass
class SlotFigures:
    """The M supervised slots of a forward, in the order of their numbers."""

    supervised: Supervised
    ce: Tensor
    """Cross entropy with the data's token, `[M]`."""
    l1: Tensor | None
    """sum_v |p_draft - p_target|, `[M]`; None without a teacher."""
    confidence: Tensor | None
    """Confidence logits `[M]`; None for a draft without a confidence head."""
    matches: Tensor | None = None
    """True where draft and target have the same most likely token, `[M]` bool; None unless asked for."""
    anchor_positions: Tensor | None = None
    """Position of each block's anchor in its row, `[B, N]`."""
    soft_ce: Tensor | None = None
    """Cross entropy with the teacher, -sum_v q_v log p_v, `[M]`; None without a teacher, or not computed."""
    weights: Tensor | None = None
    """Weight of each slot, `[M]`, in place of the objective's decay. Terms are then means over blocks."""
    mass: Tensor | None = None
    """Share of the target's probability inside the draft's vocabulary, `[M]`; None unless measured."""
    accepted: Tensor | None = None
    """Acceptance by the target, `[M]`, of a draft that drafts from another distribution than `l1` is of."""
    selector: Tensor | None = None
    """Cross entropy of a choice among candidates, `[M]`; 0 where the label is none of them."""
    missed: Tensor | None = None
    """1 where the label is no candidate, `[M]`; None for a draft that doesn't choose among candidates."""


@dataclass(frozen=True)
class SlotLosses:
    """Losses over the vocabulary of M slots."""

    ce: Tensor
    """Cross entropy with the data's token, `[M]`; 0 for a label outside the draft's vocabulary."""
    l1: Tensor | None = None
    """sum_v |p - q|, `[M]`; None without a teacher."""
    soft_ce: Tensor | None = None
    """-sum_v q_v log p_v, `[M]`; None without a teacher, or not asked for."""


def acceptance(l1: Tensor) -> Tensor:
    """Return how likely the target accepts each slot: 1 - L1/2, detached."""
    return (1 - l1.detach() / 2).clamp(0, 1)


def accepted_of(slots: SlotFigures) -> Tensor | None:
    """Return how likely the target accepts each slot, `[M]`, detached; None without a teacher."""
    if slots.accepted is not None:
        return slots.accepted.detach()
    return None if slots.l1 is None else acceptance(slots.l1)


def cross_entropy(slots: SlotFigures) -> Tensor:
    """Return the cross entropy with the data's token, `[M]`."""
    return slots.ce


def l1_distance(slots: SlotFigures) -> Tensor | None:
    """Return sum_v |p_draft - p_target|, `[M]`, not halved: twice the total variation."""
    return slots.l1


def soft_cross_entropy(slots: SlotFigures) -> Tensor | None:
    """Return the cross entropy with the teacher, -sum_v q_v log p_v, `[M]`."""
    return slots.soft_ce


def confidence_error(slots: SlotFigures) -> Tensor | None:
    """Return the binary cross entropy of the confidence logit with the acceptance, `[M]`."""
    if slots.l1 is None or slots.confidence is None:
        return None
    logits = at_least_fp32(slots.confidence)
    return F.binary_cross_entropy_with_logits(logits, acceptance(slots.l1), reduction="none")


def lost_mass(slots: SlotFigures) -> Tensor | None:
    """Return the target's probability of tokens that the draft can't draft, `[M]`. Nothing trains it."""
    return None if slots.mass is None else 1 - slots.mass


def selector_error(slots: SlotFigures) -> Tensor | None:
    """Return the cross entropy of the choice among candidates, `[M]`."""
    return slots.selector


def missed(slots: SlotFigures) -> Tensor | None:
    """Return 1 for a label that is no candidate, else 0, `[M]`. Nothing trains it."""
    return slots.missed


TERMS: dict[str, Callable[[SlotFigures], Tensor | None]] = {
    "ce": cross_entropy,
    "l1": l1_distance,
    "soft_ce": soft_cross_entropy,
    "confidence": confidence_error,
    "lost_mass": lost_mass,
    "selector": selector_error,
    "missed": missed,
}
"""Each slot's loss `[M]` by the term's name; None where the forward lacks what the term needs."""

TITLES = {
    "ce": "cross entropy",
    "l1": "L1",
    "soft_ce": "soft cross entropy",
    "confidence": "confidence",
    "lost_mass": "outside the vocabulary",
    "selector": "selector",
    "missed": "not among the candidates",
}
"""Names of the terms for people."""

OF_THE_VOCABULARY = ("ce", "l1", "soft_ce")
"""Terms whose gradients the pass over the vocabulary computes. The others backpropagate from their sums."""


@dataclass(frozen=True)
class Objective:
    """Named loss terms with their weights."""

    weights: Mapping[str, float]
    """By the names in `TERMS`."""
    decay_gamma: float | None = None
    """Slot k weighs exp(-k / gamma); None weighs all alike."""

    @classmethod
    def of(cls, loss: LossConfig) -> Objective:
        """Read the weights of a run's `[loss]` table: the terms that it has, `<name>_alpha`."""
        weights = {name: getattr(loss, f"{name}_alpha", None) for name in TERMS}
        return cls({name: each for name, each in weights.items() if each is not None}, loss.slot_decay)

    def total(self, terms: Mapping[str, Any]) -> Any:
        """Add up the terms, each by its weight."""
        return sum(weight * terms[name] for name, weight in self.weights.items())


@dataclass
class LossSums:
    """Sums over supervised slots; add those of micro-batches or ranks, then divide."""

    weight: Tensor
    """sum of w; the number of blocks with a supervised slot, where slots have weights of their own."""
    terms: dict[str, Tensor]
    """sum of w * term, by name."""
    accepted: Tensor
    """sum of the acceptance a, by slot `[K]`; a is 1 - L1/2 of the distribution that is drafted from."""
    slots: Tensor
    """number of supervised slots, by slot `[K]`."""
    prefix: Tensor
    """sum over blocks of sum_k prod_{j<=k} a_j: drafted tokens expected to be accepted."""
    blocks: Tensor
    """number of blocks with a supervised slot."""

    def tensors(self) -> list[Tensor]:
        """Return the sums in a fixed order, for whatever adds up or stores tensors."""
        return [self.weight, *self.terms.values(), self.accepted, self.slots, self.prefix, self.blocks]

    @staticmethod
    def from_tensors(names: Sequence[str], tensors: Sequence[Tensor]) -> LossSums:
        """Undo `tensors`.

        Args:
            names: the terms', in their order.

        Raises:
            ValueError: there are more or fewer tensors than these sums have.
        """
        weight, *rest = tensors
        terms, others = rest[: len(names)], rest[len(names) :]
        if len(others) != 4:
            raise ValueError(f"expected {5 + len(names)} sums, got {len(tensors)}")
        return LossSums(weight, dict(zip(names, terms, strict=True)), *others)

    def __add__(self, other: LossSums) -> LossSums:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self.from_tensors(list(self.terms), [a + b for a, b in pairs])

    def detach(self) -> LossSums:
        """Return the same sums without their graph."""
        return self.from_tensors(list(self.terms), [value.detach() for value in self.tensors()])


@dataclass
class StepMetrics:
    """A step's loss, its terms, and how much the target would accept."""

    loss: Tensor
    terms: dict[str, Tensor]
    """By name, not weighted."""
    accept_rate: Tensor
    """Mean acceptance over supervised slots."""
    tau: Tensor
    """Expected tokens per round: 1 + the mean of `LossSums.prefix`."""
    accept_by_position: Tensor
    """Mean acceptance of each slot `[K]`, given its label's own prefix."""

    def values(self) -> dict[str, Tensor]:
        """Return the figures by the names that logs and results give them."""
        terms = {f"{name}_loss": value for name, value in self.terms.items()}
        own = {name: value for name, value in vars(self).items() if name not in ("loss", "terms")}
        return {"loss": self.loss, **terms, **own}


def to_numbers(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return figures as numbers, or as lists of them, in one copy from the device."""
    flat = torch.cat([value.detach().double().flatten() for value in figures.values()]).tolist()
    parts = iter(flat)
    return {
        name: next(parts) if value.ndim == 0 else list(itertools.islice(parts, value.numel()))
        for name, value in figures.items()
    }


def slot_weights(block_size: int, gamma: float | None, device: torch.device | None = None) -> Tensor:
    """Return w_k = exp(-k / gamma), k from 0: `[K]` fp32; all ones when gamma is None."""
    slots = torch.arange(block_size, dtype=torch.float32, device=device)
    return torch.ones_like(slots) if gamma is None else torch.exp(-slots / gamma)


def slot_losses(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    *,
    mass: Tensor | None = None,
    soft: bool = False,
) -> SlotLosses:
    """Compute each slot's losses from logits `[M, V]` of draft and teacher.

    Args:
        labels: `[M]`; -1 is outside the vocabulary.
        mass: the target's probability of the vocabulary, where that is a part of the target's, `[M]`.
        soft: compute the soft cross entropy too.
    """
    log_probs = at_least_fp32(logits).log_softmax(-1)
    ce = F.nll_loss(log_probs, labels, ignore_index=-1, reduction="none")
    if teacher is None:
        return SlotLosses(ce)
    probs = at_least_fp32(teacher.detach()).softmax(-1)
    soft_ce = -(probs * log_probs).sum(-1) if soft else None
    if mass is None:
        return SlotLosses(ce, (log_probs.exp() - probs).abs().sum(-1), soft_ce)
    inside = (log_probs.exp() - mass[:, None] * probs).abs().sum(-1)
    return SlotLosses(ce, inside + (1 - mass), soft_ce)


def sum_slots(slots: SlotFigures, objective: Objective) -> LossSums:
    """Add up the supervised slots. A term that the forward has no figures for is zero."""
    mask, zero = slots.supervised.mask, slots.ce.new_zeros(())
    weights = slots.supervised.weights(objective.decay_gamma) if slots.weights is None else slots.weights
    found = {name: TERMS[name](slots) for name in objective.weights}
    accepted = accepted_of(slots)
    if accepted is None:
        accepted = torch.zeros_like(slots.ce)
    accept = slots.supervised.lay_out(accepted)  # [B, N, K]
    blocks = mask[..., 0].sum()
    return LossSums(
        weight=weights.sum() if slots.weights is None else blocks.to(weights.dtype),
        terms={name: zero if each is None else (weights * each).sum() for name, each in found.items()},
        accepted=accept.sum(dim=(0, 1)),
        slots=mask.sum(dim=(0, 1)),
        prefix=accept.cumprod(dim=-1).sum(),  # zero after the supervised prefix
        blocks=blocks,
    )


def positive(weight: Tensor) -> Tensor:
    """Return a denominator that an empty batch can't make zero: its loss is 0, not NaN."""
    return weight.clamp(min=torch.finfo(torch.float32).tiny)


def divide(sums: LossSums, objective: Objective, denominator: Tensor | None = None) -> StepMetrics:
    """Turn sums into the loss and the figures beside it.

    Args:
        denominator: the sum of weights over the whole optimiser step (all micro-batches, all ranks)
            when `sums` is only a part of it.
    """
    total = positive(sums.weight if denominator is None else denominator)
    terms = {name: value / total for name, value in sums.terms.items()}
    return StepMetrics(
        loss=objective.total(terms),
        terms=terms,
        accept_rate=sums.accepted.sum() / sums.slots.sum().clamp(min=1),
        tau=1 + sums.prefix / sums.blocks.clamp(min=1),
        accept_by_position=sums.accepted / sums.slots.clamp(min=1),
    )
