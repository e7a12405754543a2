"""Decoding with the live target: plain, and speculative with a draft. One sequence, key-value caches in both.

A round: the draft proposes a block behind the anchor (the last token, whose states nobody knows yet); one
target forward over anchor and block gives the target's logits and, by hooks, the context features of both;
the accepted prefix and the target's next token are emitted; what was rejected leaves the target's cache,
the features of what was accepted enter the draft's.
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
    """A target with a key-value cache, and hooks for the layers that a draft reads.

    Use it in a `with` block; leaving it removes the hooks.

    Args:
        model: a Hugging Face causal LM in eval mode.
        layer_ids: in the convention of `pipeline.features`; none for plain decoding.

    Raises:
        TargetError: its state can't be taken back, as that of recurrent models.
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
            logits: how many of the last positions' logits are wanted.

        Returns:
            Logits `[logits, V]` fp32, and context features `[T, L*H]` where layers were asked for; both on
            the device that takes the ids, where a draft belongs.
        """
        few = {"logits_to_keep": logits} if self._few_logits else {}
        self._states.clear()
        ids = ids.to(self.device)[None]
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **few)
        wanted = at_least_fp32(output.logits[0, -logits:].to(self.device))  # of a target on several
        if not self.layer_ids:
            return wanted, None
        check_states(self.model, self._states, self.layer_ids, ids.shape)
        states = [self._states[layer_id][0] for layer_id in self.layer_ids]
        return wanted, torch.cat([state.to(self.device) for state in states], dim=-1)

    def take_back(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, and what a sliding window has left."""
        if tokens or hasattr(self._cache, "activate_past_recording"):
            self._cache.crop(-tokens)


def _empty_cache(model: nn.Module, *, take_back: bool) -> DynamicCache:
    """A cache of the model's own kind.

    Args:
        take_back: whether tokens are going to be: of sliding windows more has to be kept then.
    """
    cache = DynamicCache(config=model.config)
    kinds = {type(layer).__name__ for layer in cache.layers}
    if getattr(model, "_is_stateful", False) or any("Linear" in kind for kind in kinds):
        raise TargetError(
            f"{type(model).__name__} keeps a recurrent state, from which no token can be taken back: "
            "expected a target with attention only; serve it with vLLM or SGLang instead"
        )
    if not take_back:
        return cache
    if not hasattr(cache, "activate_past_recording"):  # before transformers 5.2x; masks hide what is outside
        return DynamicCache()
    cache.activate_past_recording()
    return cache


@dataclass
class Decoded:
    """What came out, and how. K is the draft's block size."""

    tokens: list[int]
    """Emitted, the one that ended it included."""
    seconds: float = 0.0
    """All but taking in the prompt."""
    rounds: int = 0
    emitted: int = 0
    """Tokens that the rounds gave, those beyond the last one asked for included."""
    verified: int = 0
    """Drafted tokens that the target looked at."""
    tried: list[int] = field(default_factory=list)
    """How often a slot was verified with all before it accepted, `[K]`."""
    accepted: list[int] = field(default_factory=list)
    """How often it was accepted then, `[K]`."""
    draft_seconds: float = 0.0
    """Drafting, and taking in the context features of what was accepted."""
    verify_seconds: float = 0.0
    """Target forwards, and the decision."""


def decode_plain(
    target: CachedTarget,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    stop: frozenset[int] = frozenset(),
    generator: torch.Generator | None = None,
) -> Decoded:
    """The target alone, a token a forward.

    Args:
        stop: token ids that end it.
        generator: on the target's device.
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
    """`CachedTarget.forward` of a prompt. Raises TargetError where nothing can be chosen from its logits."""
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
    """The target's own text, or at a temperature its own distribution, in fewer target forwards.

    Args:
        draft: on `target.device`.
        stop: token ids that end it.
        threshold: verify a slot only while the block is accepted up to it with this probability, by the
            confidence head; 0 verifies all.
        confidence_temperatures: of `dspark calibrate`, `[K]`.
        generator: on the device of both.
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
    del result.tokens[max_new_tokens:]  # whole blocks to the end: cut ones would count as bad ones
    return result


def _count(result: Decoded, verified: int, count: int, emitted: list[int], stop: frozenset[int]) -> None:
    """Add a round; what was drafted behind an end counts as neither tried nor accepted."""
    end = next((i + 1 for i, token in enumerate(emitted) if token in stop), len(emitted))
    result.rounds += 1
    result.verified += verified
    for slot in range(min(verified, end, count + 1)):
        result.tried[slot] += 1
        result.accepted[slot] += slot < count
    result.tokens += emitted[:end]
    result.emitted += end


def _now(tensor: Tensor) -> float:
    """The time when everything asked of the tensor's device so far is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
