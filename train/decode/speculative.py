"""Decode one sequence with the live target, alone or speculatively with a draft. Both use key-value caches.

A round of speculative decoding:

1. The draft proposes a block after the anchor, the last emitted token, which the target has not seen yet.
2. One target forward over anchor and block gives the target's logits and, by hooks, the context features.
3. The accepted prefix and the target's next token are emitted.
4. Rejected tokens are removed from the target's cache. Features of anchor and accepted tokens are added to
   the draft's.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pipeline.errors import TargetError
from pipeline.features import at_least_fp32
from pipeline.hooks import check_states, input_device, tap_states
from train.decode.rejection import accept, choose
from train.draft.kind import Decoder


class CachedTarget:
    """A target with a key-value cache and hooks for the layers that a draft reads.

    Use it in a `with` block, which removes the hooks at the end.

    Args:
        model: a Hugging Face causal LM in eval mode.
        layer_ids: layers in the convention of `pipeline.features`; empty for decoding without a draft.

    Raises:
        TargetError: the target keeps a recurrent state, from which tokens can't be removed.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]):
        self.model, self.layer_ids = model, list(layer_ids)
        self.device = input_device(model)
        self._held = ExitStack()
        self._states: dict[int | str, Tensor] = {}
        self._few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.reset()

    def __enter__(self) -> CachedTarget:
        if self.layer_ids:
            tapped = tap_states(self.model, self.layer_ids, last_hidden=False)
            self._states = self._held.enter_context(tapped)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache = _empty_cache(self.model, take_back=bool(self.layer_ids))

    @torch.no_grad()
    def forward(self, ids: Tensor, logits: int) -> tuple[Tensor, Tensor | None]:
        """Run the next tokens.

        Args:
            ids: `[T]`.
            logits: number of last positions whose logits are returned.

        Returns:
            Logits `[logits, V]` in at least fp32, and context features `[T, L*H]`, None without `layer_ids`.
            Both are on the device that takes the ids, where the draft must be.
        """
        few = {"logits_to_keep": logits} if self._few_logits else {}
        self._states.clear()
        ids = ids.to(self.device)[None]
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **few)
        wanted = at_least_fp32(output.logits[0, -logits:].to(self.device))  # a target may span devices
        if not self.layer_ids:
            return wanted, None
        check_states(self.model, self._states, self.layer_ids, ids.shape)
        states = [self._states[layer_id][0] for layer_id in self.layer_ids]
        return wanted, torch.cat([state.to(self.device) for state in states], dim=-1)

    def take_back(self, tokens: int) -> None:
        """Remove the last `tokens` tokens from the cache, and states that have left a sliding window."""
        if tokens or hasattr(self._cache, "activate_past_recording"):
            self._cache.crop(-tokens)


def _empty_cache(model: nn.Module, *, take_back: bool) -> DynamicCache:
    """Return an empty cache that fits the model.

    Args:
        take_back: tokens will be removed again, so sliding windows must keep more.

    Raises:
        TargetError: the model keeps a recurrent state.
    """
    cache = DynamicCache(config=model.config)
    kinds = {type(layer).__name__ for layer in cache.layers}
    if getattr(model, "_is_stateful", False) or any("Linear" in kind for kind in kinds):
        raise TargetError(
            f"{type(model).__name__} keeps a recurrent state, from which no token can be removed: expected "
            "a target with attention only; serve it with vLLM or SGLang instead"
        )
    if not take_back:
        return cache
    if not hasattr(cache, "activate_past_recording"):  # older transformers: keep all, masks hide the rest
        return DynamicCache()
    cache.activate_past_recording()
    return cache


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
    result, started = Decoded([]), _now(logits)
    while True:
        token = choose(logits[0], temperature, generator)
        result.tokens.append(token.item())
        if result.tokens[-1] in stop or len(result.tokens) >= max_new_tokens:
            break
        logits, _ = target.forward(token[None], 1)
    result.seconds = _now(logits) - started
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
    slots = draft.block_size
    result = Decoded([], tried=[0] * slots, accepted=[0] * slots)
    assert features is not None
    draft.extend(features)
    clock = started = _now(logits)
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
        clock, before = _now(ids), clock
        result.draft_seconds += clock - before
        logits, features = target.forward(ids, len(ids))
        count, anchor = accept(drafted.tokens, drafted.probs, logits, temperature, generator)
        emitted = [*drafted.tokens[:count].tolist(), anchor.item()]
        target.take_back(len(drafted.tokens) - count)
        clock, before = _now(logits), clock
        result.verify_seconds += clock - before
        draft.extend(features[: count + 1])
        clock, before = _now(logits), clock
        result.draft_seconds += clock - before
        _count(result, len(drafted.tokens), count, emitted, stop)
    result.seconds = _now(logits) - started
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


def _now(tensor: Tensor) -> float:
    """Return the time after all pending work on the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
