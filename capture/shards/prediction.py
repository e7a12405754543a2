"""Measure how well the target predicts the supervised tokens, and judge whether it can be the right model.

A checkpoint that loads without an error may still be broken. Its states then agree with themselves, and only
what it predicts tells: the supervised tokens of the data against the same rows with their tokens shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from capture.data.conversations import TokenizedSample
from capture.engines.engine import CaptureEngine
from pipeline.cache import TargetIdentity
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.device import if_it_fits
from pipeline.features import head_logits

# Logits computed at once: 67 MB of them in fp32 for a vocabulary of 262,144 tokens.
_ROWS_AT_ONCE = 64
_SHUFFLE_SEED = 0
# Limits, between what healthy and broken copies of a small model showed: see "What capture proves" in
# docs/capture.md, and benchmarks/broken_targets.py.
FEW_TOKENS = 50  # fewer supervised tokens prove nothing
SUSPICIOUS_PERPLEXITY = 200
SUSPICIOUS_RATIO = 10  # of the shuffled text's perplexity to the text's own, a lower one is suspicious
NOISE_PERPLEXITY = 20  # text below it that is as easy when shuffled, such as digits, is noise by itself
IMPOSSIBLE_PERPLEXITIES = 10  # times the vocabulary, which is the perplexity of a uniform guess


@dataclass(frozen=True)
class Judgement:
    """Verdict on a target from its predictions."""

    verdict: Literal["good", "suspicious", "impossible"]
    line: str
    """The figures; unless they are good, also what was expected, and what to do."""


@dataclass(frozen=True)
class Prediction:
    """Predictions of the supervised tokens of a few rows."""

    tokens: int
    """Supervised tokens that have a token before them."""
    perplexity: float
    shuffled: float
    """Perplexity at the same positions after the tokens of each row were shuffled."""
    top1: float
    """Share of the supervised tokens that the target ranks first."""

    def figures(self) -> dict[str, float]:
        """Return the figures under the names of the manifest's `fidelity`."""
        figures = {
            "proof.perplexity": self.perplexity,
            "proof.shuffled_perplexity": self.shuffled,
            "proof.top1": self.top1,
            "proof.supervised_tokens": float(self.tokens),
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}


@torch.no_grad()
def measure_prediction(
    engine: CaptureEngine, facts: TargetIdentity, samples: Sequence[TokenizedSample]
) -> Prediction | None:
    """Measure the predictions of the supervised tokens, one row at a time; None if there are none.

    A row whose last hidden states are not finite, or do not fit, is left out: the shards deal with it.
    """
    generator = np.random.default_rng(_SHUFFLE_SEED)
    own, shuffled = [], []
    for sample in samples:
        mixed = generator.permutation(sample.input_ids)
        found = _losses(engine, facts, sample)
        if found is not None:
            own.append(found)
            mixed_sample = TokenizedSample(sample.source_row, mixed, sample.loss_mask)
            shuffled.append(_losses(engine, facts, mixed_sample) or found)
    if not own or not sum(len(losses) for losses, _ in own):
        return None
    losses, first = (torch.cat(parts) for parts in zip(*own, strict=True))
    return Prediction(
        tokens=len(losses),
        perplexity=_perplexity(losses),
        shuffled=_perplexity(torch.cat([part[0] for part in shuffled])),
        top1=first.double().mean().item(),
    )


def judge(prediction: Prediction, vocabulary: int) -> Judgement:
    """Judge whether predictions can be those of the right model on this data.

    Args:
        vocabulary: number of tokens that the target tells apart.
    """
    own, shuffled = prediction.perplexity, prediction.shuffled
    seen = (
        f"perplexity {own:,.4g} of {prediction.tokens:,} supervised tokens, {shuffled:,.4g} with the tokens "
        f"of each row shuffled, {prediction.top1:.0%} ranked first by the target"
    )
    if prediction.tokens < FEW_TOKENS:
        return Judgement("good", f"proof: {seen}")
    if not own <= IMPOSSIBLE_PERPLEXITIES * vocabulary:
        return Judgement(
            "impossible",
            f"the target predicts the data far worse than guessing among its {vocabulary:,} tokens would: "
            f"{seen}; its weights are broken (a tensor random, swapped or without its scale), its dtype "
            "overflows, or its tokenizer is another model's",
        )
    alike = own > NOISE_PERPLEXITY and not shuffled >= SUSPICIOUS_RATIO * own
    if not own <= SUSPICIOUS_PERPLEXITY or alike:
        return Judgement(
            "suspicious",
            f"the target predicts the data badly: {seen}; expected a perplexity below "
            f"{SUSPICIOUS_PERPLEXITY:,}, and one {SUSPICIOUS_RATIO} times higher when shuffled: check the "
            "weights, the tokenizer and the chat template (dspark preview), or the data may be noise",
        )
    return Judgement("good", f"proof: {seen}")


def _losses(
    engine: CaptureEngine, facts: TargetIdentity, sample: TokenizedSample
) -> tuple[Tensor, Tensor] | None:
    """Return the loss of each supervised token `[n]`, in fp64, and whether the target ranks it first.

    None if a state is not finite, or the row does not fit the memory.
    """
    positions = torch.from_numpy(np.flatnonzero(sample.loss_mask[1:]))  # of the state before the token
    head = engine.head
    states = if_it_fits(lambda: engine.states([sample]))
    if states is None or states.failed:
        return None
    hidden = states.take(LAST_HIDDEN)
    if not hidden.isfinite().all():
        return None
    hidden = hidden[positions.to(hidden.device)].to(head.device)
    tokens = torch.from_numpy(sample.input_ids.astype(np.int64))[positions + 1].to(head.device)
    losses, first = [], []
    for rows, wanted in zip(hidden.split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True):
        logits = head_logits(rows, head, facts.final_logit_softcapping, facts.logit_scale)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        first.append(logits.argmax(-1) == wanted)
    return torch.cat(losses).double().cpu(), torch.cat(first).cpu()


def _perplexity(losses: Tensor) -> float:
    """Return exp(mean loss), infinity where it overflows."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan
