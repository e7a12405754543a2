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
