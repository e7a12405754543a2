"""A live target with a key-value cache, and hooks for the layers that a draft reads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pipeline.errors import TargetError
from pipeline.features import at_least_fp32
from pipeline.hooks import check_states, input_device, tap_states
from pipeline.rope import rope_lengths


class CachedTarget:
    """A target with a key-value cache and hooks for the layers that a draft reads.

    Where a sequence grows beyond the length at which longrope changes, all of it is computed again, as
    transformers' `generate` does, and every position has the frequencies that it has token by token.

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
        ropes = rope_lengths(model.config, model).ropes
        self._limits = sorted(rope.limit for rope in ropes if not rope.each)
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
        self._ids = torch.empty(0, dtype=torch.long, device=self.device)
        self._passed = 0
        """Number of the limits that the cached states lie beyond."""

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
        ids = ids.to(self.device)
        start, end = len(self._ids), len(self._ids) + len(ids)
        cuts = [limit - start for limit in self._limits if 0 < start < limit < end]
        parts, left, found = torch.tensor_split(ids, cuts), len(ids), []
        for part in parts:
            left -= len(part)
            found.append(self._run(part, min(max(logits - left, 0), len(part))))
        wanted = torch.cat([few for few, _ in found])
        return wanted, torch.cat([states for _, states in found]) if self.layer_ids else None

    def _run(self, ids: Tensor, logits: int) -> tuple[Tensor, Tensor]:
        """Run the next tokens, all on one side of every limit. Without `layer_ids`, the states are empty."""
        self._ids = torch.cat([self._ids, ids])
        passed = sum(len(self._ids) > limit for limit in self._limits)
        new = len(ids)
        if passed != self._passed:
            self._cache = _empty_cache(self.model, take_back=bool(self.layer_ids))
            self._passed, ids = passed, self._ids
        few = {"logits_to_keep": max(logits, 1)} if self._few_logits else {}  # 0 would be all
        self._states.clear()
        output = self.model(input_ids=ids[None], past_key_values=self._cache, use_cache=True, **few)
        rows = output.logits[0]
        wanted = at_least_fp32(rows[len(rows) - logits :].to(self.device))  # a target may span devices
        if not self.layer_ids:
            return wanted, wanted.new_empty(0)
        check_states(self.model, self._states, self.layer_ids, ids[None].shape)
        states = [self._states[layer_id][0, -new:] for layer_id in self.layer_ids]
        return wanted, torch.cat([state.to(self.device) for state in states], dim=-1)

    def take_back(self, tokens: int) -> None:
        """Remove the last `tokens` tokens from the cache, and states that have left a sliding window."""
        self._ids = self._ids[: len(self._ids) - tokens]
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
