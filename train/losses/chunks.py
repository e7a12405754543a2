"""The pass over the vocabulary, cut into chunks of slots whose logits are held together.

Shapes: M supervised slots, U distinct positions, H hidden size, R rank of the bias, V vocabulary, C rows of
a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline.features import product
from train.losses.operands import SlotOperands

# Logits held at a time on a CPU. Fewer rows make narrow, slow matrix products.
CHUNK_ELEMENTS = 2**24
# On a GPU as many as its free memory allows, within these bounds: the products read the whole head for each
# chunk, and are as fast as the arithmetic units only with a thousand rows and more.
LEAST_ON_CUDA, MOST_ON_CUDA = 2**26, 2**28
# Free memory for each of them: with the teacher's logits and copies a chunk takes up to 18 bytes a logit.
FREE_BYTES = 64
# Rows of a tile of a GPU's matrix product. A chunk of whole tiles leaves none half empty.
TILE_ROWS = 128
# Earlier versions refuse to add a product of bf16 to fp32.
ADDS_IN_FP32 = torch.__version__ >= (2, 9)


@dataclass(frozen=True)
class Chunk:
    """Slots whose logits are held together, in the order of their positions."""

    slots: Tensor
    """Numbers of the slots, `[C]`."""
    positions: slice
    """The distinct positions that they have."""
    rows: Tensor
    """Each slot's position, counted from the first of these, `[C]`."""


class VocabularyPass(ABC):
    """One pass over the vocabulary: losses of all slots, and the gradients of their weighted sum.

    Args:
        operands: what the losses are computed from.
        dtype: of the products with the vocabulary.
        matches: as in `train.losses.fused.vocabulary_loss`.
        needed: which of `operands.differentiable()` need a gradient.
    """

    def __init__(
        self, operands: SlotOperands, dtype: torch.dtype, matches: Tensor | None, needed: tuple[bool, ...]
    ):
        hidden = operands.hidden
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self.operands, self.dtype, self.matches = operands, dtype, matches
        self.gradients = [
            torch.zeros(tensor.shape, dtype=exact, device=hidden.device) if need else None
            for tensor, need in zip(operands.differentiable(), needed, strict=True)
        ]
        """Of `operands.differentiable()`; None where none is needed."""
        self.outside = operands.labels < 0
        self.labels = operands.labels.clamp(min=0)  # any token will do where the weight is 0
        taught = operands.teacher_hidden is not None
        weights = [operands.ce_weights.masked_fill(self.outside, 0), operands.l1_weights]
        if taught and operands.soft_weights is not None:
            weights.append(operands.soft_weights)
        self.weights = torch.stack([each.to(exact) for each in weights])
        """Of cross entropy, L1 and, where it is asked for, soft cross entropy: `[2, M]` or `[3, M]`."""
        self.losses = torch.zeros_like(self.weights)
        """Likewise."""
        self.soft = len(weights) == 3
        mass = operands.teacher_mass if taught else None
        self.mass = None if mass is None else mass.to(exact)
        own = operands.teacher_head
        self.head = operands.head.to(dtype)
        self.teacher_head = self.head if own is None else own.to(dtype)

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        """Compute the losses of a chunk's slots, and add their gradients."""

    def run(self) -> None:
        """Compute the losses of all slots, and the gradients."""
        for chunk in self.chunks():
            self.add(chunk)
        self.losses[0].masked_fill_(self.outside, 0)
        positions, reachable = self.operands.positions, self.operands.reachable
        if self.mass is not None:
            self.losses[1] += 1 - self.mass[positions]  # what the target gives to tokens outside
        if self.matches is not None and reachable is not None:
            self.matches &= reachable[positions]

    def total(self) -> Tensor:
        """Return the weighted sum of all slots' losses."""
        terms = zip(self.weights, self.losses, strict=True)
        return sum(((weights * losses).sum() for weights, losses in terms), self.losses.new_zeros(()))

    def chunks(self) -> Iterator[Chunk]:
        """Cut the slots into chunks."""
        return chunks_of(self.operands)


def chunks_of(operands: SlotOperands) -> Iterator[Chunk]:
    """Cut slots, sorted by position, so that those of a chunk share its few positions."""
    positions, order = operands.positions.sort(stable=True)
    rows = chunk_rows(len(order), len(operands.head), order.device)
    known = operands.ordered
    spans = _spans(positions, rows) if known is None else _known_spans(known, rows)
    for number, (first, end) in enumerate(spans):
        some = slice(number * rows, (number + 1) * rows)
        yield Chunk(order[some], slice(first, end), positions[some] - first)


def chunk_rows(slots: int, vocabulary: int, device: torch.device) -> int:
    """Return the rows of a chunk: as few equal chunks as the memory allows; on CUDA a multiple of 128."""
    if device.type == "cuda":
        elements, multiple = _cuda_elements(device), TILE_ROWS
    else:
        elements, multiple = CHUNK_ELEMENTS, 1
    most = _up(max(16, elements // vocabulary), multiple)
    chunks = max(1, -(-slots // most))
    return _up(max(1, -(-slots // chunks)), multiple)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@cache
def _cuda_elements(device: torch.device) -> int:
    """Return how many logits to hold at a time on a GPU; looks at its free memory once."""
    free, _ = torch.cuda.mem_get_info(device)
    fit = 1 << max(0, (free // FREE_BYTES).bit_length() - 1)  # a power of two: a little memory more or less
    return min(MOST_ON_CUDA, max(LEAST_ON_CUDA, fit))  # does not change a run's sums


def _spans(positions: Tensor, rows: int) -> list[tuple[int, int]]:
    """Return the first position, and the one after the last, of each `rows` ascending positions.

    The host waits for the device here, and nowhere else in the pass.
    """
    if not len(positions):
        return []
    firsts = positions[::rows]
    lasts = torch.cat([positions[rows - 1 :: rows], positions[-1:]])[: -(-len(positions) // rows)]
    return [(first, last + 1) for first, last in torch.stack([firsts, lasts], dim=1).tolist()]


def _known_spans(positions: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Return the same from positions on the host."""
    starts = range(0, len(positions), rows)
    return [(int(positions[i]), int(positions[i : i + rows][-1]) + 1) for i in starts]


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute `out += left @ right`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif _sums_in_fp32(left) and ADDS_IN_FP32:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out += product(left, right)


def _sums_in_fp32(operand: Tensor) -> bool:
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)
