"""Simulation of an engine that decodes many requests at once, from held-out figures: `dspark schedule`.

Requests walk over held-out answers. In each step all of them draft a block where they stand, a policy chooses
how many tokens of each are verified, and each moves on by its accepted tokens and one of the target's. An
acceptance is drawn with its true probability, 1 minus the total variation of draft and target. An answer that
ends makes room for another, drawn at random. A step takes as long as the engine's table says.

Left out: prefill, requests that come and go, memory, and what a longer context costs. Sampling is at
temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from pipeline.text import table
from train.decode.scheduler import schedule, schedule_globally
from train.decode.sps import StepTable

LAG = 2
"""Steps between TensorRT-LLM's confidences and the blocks that it schedules by them."""
LEAST_GAIN = 0.04
"""Gain below which TensorRT-LLM 1.4 verifies everything (`confidence_min_predicted_gain`)."""


@dataclass(frozen=True)
class Drafts:
    """The block at each position of some answers, n blocks of K slots."""

    accept: np.ndarray
    """Probability that each slot is accepted if all before it are, `[n, K]`; 0 beyond the answer's end."""
    slots: np.ndarray
    """Slots up to the answer's end, `[n]`."""
    left: np.ndarray
    """Tokens up to the answer's end, `[n]`. The block that follows i accepted tokens is i + 1 further."""
    starts: np.ndarray
    """First block of each answer, `[m]`."""
    confidence: np.ndarray | None
    """The same as `accept`, as the confidence head says it; None without one."""


@dataclass(frozen=True)
class Batch:
    """Blocks of R requests in a step, of which a policy chooses how much to verify."""

    slots: np.ndarray
    """Slots of each block, `[R]`."""
    confidence: np.ndarray | None
    """Confidences of the blocks, `[R, K]`; None without a confidence head."""
    earlier: np.ndarray | None
    """Confidences of the same requests' blocks `LAG` steps before, `[R, K]`; 1 for a younger request."""


Policy = Callable[[Batch], np.ndarray]
"""Chooses the number of drafted tokens to verify of each request, `[R]`."""


@dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """Yield of a policy."""

    policy: Literal["none", "fixed", "algorithm 1", "global"]
    """`none` decodes without a draft, `global` is TensorRT-LLM's."""
    length: int | None
    """Drafted tokens that are verified, of a fixed length."""
    tokens_per_second: float
    """Of all requests together."""
    tokens_per_round: float
    """Of a request in a step, the target's own included."""
    verified_per_round: float
    """Drafted tokens of a request that are verified in a step."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A simulation."""

    step: int
    """Optimiser step of the checkpoint."""
    samples: int
    """Held-out samples."""
    blocks: int
    """Positions in them."""
    requests: int
    """Requests at a time."""
    steps: int
    """Steps of the engine that were simulated, with each policy."""
    seed: int
    """Seed of what is drawn."""
    table: str
    """Form of the table of steps per second."""
    draft_ms: float
    """Milliseconds of drafting that were added to a step."""
    calibrated: bool | None
    """True if the confidences are calibrated; None without a confidence head."""
    policies: tuple[PolicyFigures, ...]
    """No speculation, each fixed length, and the schedulers if there are confidences."""
    num_speculative_tokens: int
    """The fixed length of most tokens per second; 0 if none is faster than no speculation."""


def fixed(length: int) -> Policy:
    """Verify as many tokens of each block."""
    return lambda batch: np.minimum(batch.slots, length)


def algorithm_1(steps_per_second: Callable[[int], float]) -> Policy:
    """Schedule by the paper's Algorithm 1."""

    def choose(batch: Batch) -> np.ndarray:
        assert batch.confidence is not None
        rows = zip(batch.confidence.tolist(), batch.slots.tolist(), strict=True)
        return np.array(schedule([row[:slots] for row, slots in rows], steps_per_second))

    return choose


def tensorrt_llm(steps_per_second: Callable[[int], float]) -> Policy:
    """Schedule as TensorRT-LLM does: the best of all totals, by confidences of `LAG` steps before."""

    def choose(batch: Batch) -> np.ndarray:
        assert batch.earlier is not None
        lengths = schedule_globally(batch.earlier.tolist(), steps_per_second, least_gain=LEAST_GAIN)
        return np.minimum(lengths, batch.slots)

    return choose


def simulate(
    drafts: Drafts,
    policy: Policy,
    steps_per_second: Callable[[int], float],
    *,
    requests: int,
    steps: int,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Run steps of an engine. Every policy meets the same draws.

    Args:
        steps_per_second: of a step with so many tokens.
        requests: R.

    Returns:
        Tokens per second, and per request and step tokens and verified tokens.
    """
    generator = np.random.default_rng(seed)
    k = drafts.accept.shape[1]
    at = generator.choice(drafts.starts, requests)
    past = np.ones((LAG, requests, k))  # the oldest first
    tokens, verified, seconds = 0, 0, 0.0
    for _ in range(steps):
        drawn, another = generator.random((requests, k)), generator.choice(drafts.starts, requests)
        now = None if drafts.confidence is None else drafts.confidence[at]
        slots = drafts.slots[at]
        lengths = policy(Batch(slots, now, None if now is None else past[0]))
        kept = (drawn < drafts.accept[at]) & (np.arange(k) < lengths[:, None])
        accepted = np.cumprod(kept, axis=1).sum(1)
        emitted = np.minimum(accepted + 1, drafts.left[at])
        ended = emitted == drafts.left[at]
        at = np.where(ended, another, at + emitted)
        if now is not None:
            past = np.concatenate([past[1:], now[None]])
            past[:, ended] = 1.0
        count = int(lengths.sum())
        tokens, verified = tokens + int(emitted.sum()), verified + count
        seconds += 1 / steps_per_second(requests + count)
    rounds = requests * steps
    return tokens / seconds, tokens / rounds, verified / rounds


def simulate_all(
    drafts: Drafts,
    steps: StepTable,
    *,
    requests: int,
    num_steps: int,
    draft_seconds: float = 0.0,
    seed: int = 0,
) -> tuple[PolicyFigures, ...]:
    """Simulate no speculation, each fixed length, and the schedulers if there are confidences.

    Args:
        draft_seconds: added to each step of those that draft, for the schedulers to reckon with too.
    """
    k = drafts.accept.shape[1]
    times = [1 / steps.rate(requests, batch) for batch in range(requests * (k + 1) + 1)]
    plain, drafting = ([1 / (time + extra) for time in times] for extra in (0.0, draft_seconds))
    rate = drafting.__getitem__
    policies: list[tuple[str, int | None, Policy]] = [("none", None, fixed(0))]
    policies += [("fixed", length, fixed(length)) for length in range(1, k + 1)]
    if drafts.confidence is not None:
        policies += [("algorithm 1", None, algorithm_1(rate)), ("global", None, tensorrt_llm(rate))]
    run = partial(simulate, drafts, requests=requests, steps=num_steps, seed=seed)
    rows = []
    for name, length, policy in policies:
        found = run(policy, plain.__getitem__ if name == "none" else rate)
        names = ("tokens_per_second", "tokens_per_round", "verified_per_round")
        rows.append(PolicyFigures(policy=name, length=length, **dict(zip(names, found, strict=True))))
    return tuple(rows)


def best_length(policies: Sequence[PolicyFigures]) -> int:
    """Return the fixed length of most tokens per second, the shortest of equals; 0 for no speculation."""
    able = [row for row in policies if row.policy in ("none", "fixed")]
    return max(able, key=lambda row: (row.tokens_per_second, -(row.length or 0))).length or 0


def format_schedule(result: Schedule) -> str:
    """Lay the figures out for a terminal."""
    names = {"none": "no speculation", "algorithm 1": "the paper's Algorithm 1", "global": "TensorRT-LLM's"}
    plain = result.policies[0].tokens_per_second
    rows = [["policy", "tokens/s", "of none", "tokens per round", "verified"]]
    for row in result.policies:
        name = names.get(row.policy) or f"{row.length} drafted token{'s' if row.length != 1 else ''} each"
        times = row.tokens_per_second / plain
        rows.append(
            [
                name,
                f"{row.tokens_per_second:,.1f}",
                f"{times:.3f}",
                f"{row.tokens_per_round:.3f}",
                f"{row.verified_per_round:.3f}",
            ]
        )
    drafting = f" and {result.draft_ms:g} ms of drafting" if result.draft_ms else ""
    length = result.num_speculative_tokens
    state = {True: "calibrated confidences", False: "confidences as trained", None: "no confidences"}
    lines = [
        f"step {result.step}: {result.requests:,} requests at a time over {result.samples:,} held-out "
        f"samples ({result.blocks:,} positions), {result.steps:,} steps of an engine; "
        f"{state[result.calibrated]}; step times from a table of {result.table}{drafting}",
        *(f"  {line}" for line in table(rows)),
    ]
    if result.calibrated is None:
        lines.append("  The draft has no confidence head, so fixed lengths are all that there is to choose.")
    lines.append(
        f"  Of fixed lengths, {length} is the fastest: num_speculative_tokens {length}"
        if length
        else "  No fixed length is faster than no speculation: serve without the draft."
    )
    return "\n".join(lines)
