"""The number of drafted tokens to serve one request with: `dspark speculate --measure`.

Drafting k tokens a round is expected to speed decoding up by

    (tokens of such a round) / ((draft_ms(k) + verify_ms(k)) / plain_ms)

Times are of real decoding on the device at hand: a target step over one token, and for each k the drafting
and the target step over k + 1 tokens. Tokens of a round are 1 plus the products of the acceptances, each
given the tokens before it, up to k of them. It assumes one request at a time, and an engine whose steps take
times in the same ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from pipeline.text import figure_table
from train.decode.speculative import decode_plain, decode_speculative
from train.decode.target import CachedTarget
from train.draft.kind import Decoder
from train.runs.figures import LengthRow, Lengths, Rounds, SpeculationRun

_REPEATS = 5
"""Decodings of each length, of which the median counts."""
_ROUNDS = 4
"""Fewest rounds of each of them, if the limit of a text allows."""


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one request's steps."""

    plain_ms: float
    """Of a target step over one token."""
    draft_ms: tuple[float, ...]
    """Of drafting 1 to K tokens, `[K]`."""
    verify_ms: tuple[float, ...]
    """Of a target step over them and the token before them, `[K]`."""


def measure_steps(
    alone: CachedTarget,
    watched: CachedTarget,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
) -> StepTimes:
    """Time the steps of real decodings, which take turns so that a busy moment is no length's alone.

    Args:
        alone: the target without hooks.
        watched: the target with hooks for the layers that the draft reads.
        decoder: of K slots; it is left as it was.
        prompts: token ids, taken in turn.
        max_new_tokens: limit of a text, at least 2.
        temperature: sampling temperature; 0 is greedy.
    """
    k = decoder.slots
    limit = min(max_new_tokens, 1 + _ROUNDS * (k + 1))
    plain: list[float] = []
    drafting: list[list[float]] = [[] for _ in range(k)]
    verifying: list[list[float]] = [[] for _ in range(k)]
    try:
        for turn in range(1 + _REPEATS):
            prompt = prompts[turn % len(prompts)]
            generator = torch.Generator(alone.device).manual_seed(turn)
            options = {"temperature": temperature, "generator": generator}
            own = decode_plain(alone, prompt, limit, **options)
            plain.append(1000 * own.seconds / (len(own.tokens) - 1))
            for length in range(1, k + 1):
                decoder.slots = length
                with watched:
                    found = decode_speculative(watched, decoder, prompt, limit, **options)
                drafting[length - 1].append(1000 * found.draft_seconds / found.rounds)
                verifying[length - 1].append(1000 * found.verify_seconds / found.rounds)
    finally:
        decoder.slots = k

    def typical(times: list[float]) -> float:
        return median(times[1:])  # the first forwards of a shape are slow

    return StepTimes(typical(plain), tuple(map(typical, drafting)), tuple(map(typical, verifying)))


def recommend(times: StepTimes, live: SpeculationRun, offline: Rounds | None) -> Lengths:
    """Compute the expected speed-up of each length, and choose the highest, the shortest of equals.

    Args:
        live: decoding of some prompts.
        offline: expectation from held-out texts, which are more; taken where it is known.
    """
    accepts = (offline or live).accept_given_prefix
    rows = []
    steps = zip(times.draft_ms, times.verify_ms, expected_tokens(accepts), strict=True)
    for length, (draft_ms, verify_ms, tokens) in enumerate(steps, start=1):
        speedup = None if tokens is None else tokens / ((draft_ms + verify_ms) / times.plain_ms)
        rows.append(
            LengthRow(
                length=length,
                draft_ms=draft_ms,
                verify_ms=verify_ms,
                tokens_per_round=tokens,
                speedup=speedup,
            )
        )
    able = [row for row in rows if row.speedup is not None and row.speedup > 1]
    best = max(able, key=lambda row: (row.speedup, -row.length), default=None)
    return Lengths(
        plain_ms=times.plain_ms,
        acceptance="live" if offline is None else "held out",
        rows=tuple(rows),
        num_speculative_tokens=0 if best is None else best.length,
    )


def expected_tokens(accepts: Sequence[float | None]) -> Iterator[float | None]:
    """Yield the tokens of a round of 1 to K drafted tokens, None from the first unknown acceptance on.

    Args:
        accepts: acceptance of each slot if all before it are accepted, `[K]`.
    """
    tokens: float | None = 1.0
    reached = 1.0
    for accept in accepts:
        if tokens is not None and reached > 0:  # what nothing reaches needs no acceptance
            reached *= accept or 0.0
            tokens = None if accept is None else tokens + reached
        yield tokens


def format_lengths(found: Lengths, device: str) -> Iterator[str]:
    """Yield lines for a terminal."""
    rows = found.rows
    yield (
        f"  one request on this {device}: a step of the target alone takes {found.plain_ms:.1f} ms; by "
        f"drafted tokens a round ({found.acceptance} acceptance)"
    )
    yield from figure_table(
        [
            ("drafted tokens", [str(row.length) for row in rows]),
            ("drafting, ms", [row.draft_ms for row in rows]),
            ("verifying, ms", [row.verify_ms for row in rows]),
            ("expected tokens per round", [row.tokens_per_round for row in rows]),
            ("expected speed-up", [row.speedup for row in rows]),
        ]
    )
    best = found.num_speculative_tokens
    yield (
        f"  recommended: num_speculative_tokens {best}, expected {rows[best - 1].speedup:.2f} times as fast"
        if best
        else "  recommended: no speculation; no number of drafted tokens is expected to be faster"
    )
