"""Our drafts beside an engine's, after the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import RunError
from pipeline.text import figure_table
from train.decode.benchmark import Pair
from train.decode.target import CachedTarget
from train.prove.engine import Answer


@dataclass(frozen=True)
class Round:
    """A round of an engine that decodes greedily."""

    anchor: int
    """Index in the new tokens of the token that was drafted after."""
    drafted: list[int]


@dataclass(frozen=True)
class TextDifference:
    """First token at which an engine's text with the draft is not its text without."""

    prompt: int
    """Number of the prompt, from 0."""
    token: int
    """Index in the new tokens."""


@dataclass(frozen=True)
class DraftDifference:
    """First round in which an engine drafted other tokens than we do."""

    prompt: int
    """Number of the prompt, from 0."""
    anchor: int
    """Index in the new tokens of the token that was drafted after."""
    engine: list[int]
    ours: list[int]


@dataclass(frozen=True)
class Proof:
    """An engine's work on an export, beside ours."""

    engine: str
    """Name and version."""
    target: str
    draft: str
    step: int
    """Optimiser step of the draft."""
    dtype: str
    prompts: int
    max_new_tokens: int
    tokens: int
    """New tokens of all prompts, with the draft."""
    agreeing: int
    """Of these, tokens that are the most likely ones of our target too."""
    same_texts: int
    """Texts with the draft that are the engine's own without it."""
    text_difference: TextDifference | None
    rounds: int
    """Rounds whose drafted tokens are known."""
    drafted: int
    """Tokens drafted in them."""
    same: int
    """Drafted tokens that are ours."""
    draft_difference: DraftDifference | None
    tried: list[int]
    """Times that a slot was verified with all slots before it accepted, `[K]`."""
    accepted: list[int]
    """Times that the slot was then accepted, `[K]`."""
    tokens_per_round: float | None
    plain_ms: float
    """Milliseconds per token without the draft."""
    draft_ms: float
    """Milliseconds per token with it."""
    promised: float | None
    """Tokens per round that `dspark evaluate` expects of greedy decoding."""
    speculated: float | None
    """Tokens per round of `dspark speculate` at temperature 0."""

    @property
    def holds(self) -> bool:
        """Every text and every drafted token is what it has to be."""
        parted = self.text_difference is not None or self.draft_difference is not None
        return self.drafted > 0 and not parted


def follow(text: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[Round]:
    """Return the rounds of a text: each begins at the token that the round before ended with.

    Args:
        drafts: drafted tokens of each round. Rounds that begin after the text's end are left out.
    """
    rounds, anchor = [], 0
    for drafted in drafts:
        if anchor >= len(text):
            break
        rounds.append(Round(anchor, list(drafted)))
        anchor += accepted(rounds[-1], text) + 1
    return rounds


def accepted(one: Round, text: Sequence[int]) -> int:
    """Return how many of a round's drafted tokens are the text's."""
    following = text[one.anchor + 1 :]
    pairs = zip(one.drafted, following, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.drafted), len(following)))


def redraft(
    pair: Pair, prompt: Sequence[int], text: Sequence[int], rounds: Sequence[Round]
) -> tuple[list[list[int]], int]:
    """Return what our decoder drafts in the same rounds, and how many of the text's tokens our target chose.

    Args:
        text: the engine's new tokens.
        rounds: in the order of their anchors.
    """
    tokens = torch.tensor([*prompt, *text])
    decoder, start = pair.decoder, len(prompt)
    decoder.reset()
    with CachedTarget(pair.model, pair.draft.config.target_layer_ids) as target:
        first, before = target.forward(tokens[:start], 1)
        later, after = target.forward(tokens[start:], len(text))
    chosen = torch.cat([first, later[:-1]]).argmax(-1)
    features = torch.cat([before, after])
    tokens = tokens.to(features.device)
    known, drafts = 0, []
    for one in rounds:
        anchor = start + one.anchor
        decoder.extend(features[known:anchor], tokens[known:anchor])
        drafts.append(decoder.draft(tokens[anchor]).tokens.tolist())
        known = anchor
    return drafts, int((chosen.to(tokens.device) == tokens[start:]).sum())


def compare(
    pair: Pair, prompts: Sequence[Sequence[int]], plain: Answer, answer: Answer, **facts: object
) -> Proof:
    """Compare an engine's texts with each other, and its drafted tokens with ours.

    Args:
        plain: the engine's answer without the draft.
        answer: its answer with it.
        facts: fields of `Proof` that are known already.

    Raises:
        RunError: the engine's answers do not fit the prompts.
    """
    if not len(plain.texts) == len(answer.texts) == len(answer.drafts) == len(prompts):
        raise RunError(f"{answer.version} answered another number of prompts: report it, with its version")
    slots = pair.decoder.slots
    tried, taken = [0] * slots, [0] * slots
    rounds = verified = emitted = drafted = same = agreeing = 0
    text_difference: TextDifference | None = None
    draft_difference: DraftDifference | None = None
    for number, (prompt, own, text, drafts) in enumerate(
        zip(prompts, plain.texts, answer.texts, answer.drafts, strict=True)
    ):
        if own != text and text_difference is None:
            text_difference = TextDifference(number, _parting(own, text))
        if not text:
            continue
        theirs = follow(text, drafts)
        ours, chosen = redraft(pair, prompt, text, theirs)
        agreeing += chosen
        for one, other in zip(theirs, ours, strict=True):
            rounds += 1
            drafted += len(one.drafted)
            same += sum(a == b for a, b in zip(one.drafted, other, strict=False))
            left = len(text) - 1 - one.anchor
            short = len(one.drafted) < min(slots, left)  # near the end an engine may draft fewer
            if (short or one.drafted != other[: len(one.drafted)]) and draft_difference is None:
                draft_difference = DraftDifference(number, one.anchor, one.drafted, other)
            if left > 0:
                count = accepted(one, text)
                verified, emitted = verified + 1, emitted + min(count + 1, left)
                for slot in range(min(len(one.drafted), left, count + 1, slots)):
                    tried[slot] += 1
                    taken[slot] += slot < count
    return Proof(
        engine=answer.version,
        prompts=len(prompts),
        tokens=sum(map(len, answer.texts)),
        agreeing=agreeing,
        same_texts=sum(a == b for a, b in zip(plain.texts, answer.texts, strict=True)),
        text_difference=text_difference,
        rounds=rounds,
        drafted=drafted,
        same=same,
        draft_difference=draft_difference,
        tried=tried,
        accepted=taken,
        tokens_per_round=emitted / verified if verified else None,
        plain_ms=plain.token_ms,
        draft_ms=answer.token_ms,
        **facts,  # type: ignore[arg-type]
    )


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def format_proof(proof: Proof) -> str:
    """Lay a proof out for a terminal."""
    rates = [a / t if t else None for a, t in zip(proof.accepted, proof.tried, strict=True)]
    lines = [
        f"{proof.engine} with step {proof.step} of {proof.draft} beside {proof.target} ({proof.dtype}): "
        f"{proof.prompts} prompts, up to {proof.max_new_tokens} new tokens, greedy",
        f"  texts: {proof.same_texts} of {proof.prompts} are the engine's own without the draft; "
        f"{proof.agreeing:,} of {proof.tokens:,} tokens are our target's choice too",
        f"  drafted tokens: {proof.same:,} of {proof.drafted:,} in {proof.rounds:,} rounds are ours",
    ]
    rows: list[tuple[str, list[float | str | None]]] = [
        ("tokens per round", ["engine", "evaluate", "speculate"]),
        ("", [proof.tokens_per_round, proof.promised, proof.speculated]),
    ]
    lines += figure_table(rows)
    lines.append("  accepted by slot, given the slots before it: " + " ".join(map(_rate, rates)))
    lines.append(
        f"  {proof.draft_ms:.1f} ms per token with the draft, {proof.plain_ms:.1f} ms without: "
        f"{proof.plain_ms / proof.draft_ms:.2f} times as fast"
    )
    return "\n".join(lines)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def check(proof: Proof) -> None:
    """Check that a proof holds. Outside float32 rounding may choose other tokens, so nothing is checked.

    Raises:
        RunError: a text or a drafted token differs, or nothing was drafted; the message names the first.
    """
    if proof.drafted == 0:
        raise RunError(
            f"{proof.engine} drafted nothing: it does not use the draft, or this version does not show it"
        )
    if proof.dtype != "float32":
        return
    first = proof.draft_difference
    if first is not None:
        raise RunError(
            f"{proof.engine} drafts other tokens than we do, or fewer ({proof.same:,} of {proof.drafted:,} "
            f"are ours), first in prompt {first.prompt + 1} after token {first.anchor + 1}: "
            f"{first.engine} there, {first.ours} here. It reads the export's config.json or weights otherwise"
        )
    if proof.text_difference is not None:
        parting = proof.text_difference
        raise RunError(
            f"{proof.engine} says another greedy text with the draft than without, first in prompt "
            f"{parting.prompt + 1} at token {parting.token + 1}: its verification is not lossless"
        )
