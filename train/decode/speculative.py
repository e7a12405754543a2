"""Decode one sequence with the live target, alone or speculatively with a draft. Both use key-value caches.

A round of speculative decoding:

1. The draft proposes a block after the anchor, the last emitted token, which the target has not seen yet.
2. One target forward over anchor and block gives the target's logits and, by hooks, the context features.
3. The accepted prefix and the target's next token are emitted.
4. Rejected tokens are removed from the target's cache. Features of anchor and accepted tokens are added to
   the draft's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.errors import TargetError
from train.decode.rejection import accept, choose
from train.decode.target import CachedTarget
from train.draft.kind import Decoder


@dataclass
class Decoded:
    """Emitted tokens of a decoding, with counts and times. K is the draft's block size."""

    tokens: list[int]
    """Emitted tokens, including the one that ended the text."""
    seconds: float = 0.0
    """Seconds of decoding, without processing the prompt."""
    rounds: int = 0
    emitted: int = 0
    """Tokens emitted by the rounds, including those past `max_new_tokens`."""
    verified: int = 0
    """Drafted tokens that the target verified."""
    tried: list[int] = field(default_factory=list)
    """Times that a slot was verified with all slots before it accepted, `[K]`."""
    accepted: list[int] = field(default_factory=list)
    """Times that the slot was then accepted, `[K]`."""
    draft_seconds: float = 0.0
    """Seconds of drafting, and of adding context features to the draft's cache."""
    verify_seconds: float = 0.0
    """Seconds of target forwards and of accepting tokens."""


class Laps:
    """Time of consecutive parts of a decoding. A GPU's is taken from its events, without waiting for it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.end("")

    def end(self, part: str) -> None:
        """End a part: what came after the part before it."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the sum of each part, 0 for one that never came. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sums: dict[str, float] = defaultdict(float)
        for (_, begun), (part, ended) in pairwise(self._marks):
            if isinstance(ended, float):
                sums[part] += ended - begun
            else:
                sums[part] += begun.elapsed_time(ended) / 1000
        return sums


def decode_plain(
    target: CachedTarget,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    stop: frozenset[int] = frozenset(),
    generator: torch.Generator | None = None,
) -> Decoded:
    """Decode with the target alone, one token per forward.

    Args:
        stop: token ids that end the text.
        generator: random generator on the target's device.

    Raises:
        TargetError: the logits of the prompt are not finite.
    """
    target.reset()
    logits = _first_logits(target, prompt)[0]
    result, laps = Decoded([]), Laps(logits.device)
    while True:
        token = choose(logits[0], temperature, generator)
        result.tokens.append(token.item())
        if result.tokens[-1] in stop or len(result.tokens) >= max_new_tokens:
            break
        logits, _ = target.forward(token[None], 1)
    laps.end("decoding")
    result.seconds = sum(laps.seconds().values())
    return result


def _first_logits(target: CachedTarget, prompt: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Run the target on a prompt. Raise TargetError if the logits of its last position are not finite."""
    logits, features = target.forward(torch.tensor(prompt), 1)
    if not torch.isfinite(logits).all():
        raise TargetError(
            f"{type(target.model).__name__} gives logits that are not finite: its weights are damaged, or "
            "its dtype can't hold its states; try --dtype float32"
        )
    return logits, features


def decode_speculative(
    target: CachedTarget,
    draft: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    stop: frozenset[int] = frozenset(),
    threshold: float = 0.0,
    confidence_temperatures: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Decode with a draft. The text (at a temperature, its distribution) is the target's own.

    Args:
        draft: a decoder on `target.device`.
        stop: token ids that end the text.
        threshold: verify a slot only if the block is accepted up to it with at least this probability, by
            the confidence head; 0 verifies all.
        confidence_temperatures: temperatures from `dspark calibrate`, `[K]`.
        generator: random generator on the device of both.

    Raises:
        TargetError: the logits of the prompt are not finite.
    """
    target.reset()
    draft.reset()
    logits, features = _first_logits(target, prompt)
    slots = draft.slots
    result = Decoded([], tried=[0] * slots, accepted=[0] * slots)
    assert features is not None
    draft.extend(features, torch.tensor(prompt, device=features.device))
    laps = Laps(logits.device)
    anchor = choose(logits[0], temperature, generator)
    result.tokens.append(anchor.item())
    while result.tokens[-1] not in stop and len(result.tokens) < max_new_tokens:
        drafted = draft.draft(
            anchor,
            temperature,
            threshold=threshold,
            confidence_temperatures=confidence_temperatures,
            generator=generator,
        )
        ids = torch.cat([anchor[None], drafted.tokens])
        laps.end("drafting")
        logits, features = target.forward(ids, len(ids))
        count, anchor = accept(drafted.tokens, drafted.probs, logits, temperature, generator)
        emitted = torch.cat([drafted.tokens[:count], anchor[None]]).tolist()
        target.take_back(len(drafted.tokens) - count)
        laps.end("verifying")
        draft.extend(features[: count + 1], ids[: count + 1])
        laps.end("drafting")
        _count(result, len(drafted.tokens), count, emitted, stop)
    laps.end("the end")
    seconds = laps.seconds()
    result.seconds = sum(seconds.values())
    result.draft_seconds, result.verify_seconds = seconds["drafting"], seconds["verifying"]
    del result.tokens[max_new_tokens:]  # cut only here: counts of a cut last block would be too low
    return result


def _count(result: Decoded, verified: int, count: int, emitted: list[int], stop: frozenset[int]) -> None:
    """Count a round. Slots after a stop token count as neither tried nor accepted."""
    end = next((i + 1 for i, token in enumerate(emitted) if token in stop), len(emitted))
    result.rounds += 1
    result.verified += verified
    for slot in range(min(verified, end, count + 1)):
        result.tried[slot] += 1
        result.accepted[slot] += slot < count
    result.tokens += emitted[:end]
    result.emitted += end
