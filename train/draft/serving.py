"""Rule of an inference engine for drafts. Each kind has its rules in `draft/<kind>/serving.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rule:
    """A requirement of an engine on a draft."""

    field: str
    """Field of the draft's config that breaks the rule."""
    holds: Callable[[PretrainedConfig], bool]
    reason: str
    """Reason why the engine can't serve other values."""
    remedy: str | None = None
    """Setting of a draft that the engine serves; `{last}` stands for the last layer but one."""


def scale_of(config: PretrainedConfig, name: str) -> float:
    """Return a scale that a draft shares with its target; 1 if the config has none."""
    return getattr(config, name, None) or 1.0


LAYERS_OF_VLLM = Rule(
    "target_layer_ids",
    # Drafts learn the last layer's states after the final norm; vLLM passes those before it.
    lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
    "it passes other states of the last layer than the draft was trained on",
    "draft.target_layer_ids within [-1, {last}]",
)
LAYERS_OF_SGLANG = Rule(
    "target_layer_ids",
    lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
    "it can capture neither the embeddings nor the last layer",
    "draft.target_layer_ids within [0, {last}]",
)
FULL_ATTENTION = Rule(
    "layer_types",
    lambda c: "sliding_attention" not in (getattr(c, "layer_types", None) or ()),
    "it has no window in which the slots of a block see each other",
    "draft.sliding_window not set",
)
UNSCALED = (
    *(
        Rule(name, lambda c, name=name: scale_of(c, name) == 1, "it has no such factor in a draft")
        for name in ("embedding_scale", "logit_scale")
    ),
    Rule(
        "final_logit_softcapping",
        lambda c: getattr(c, "final_logit_softcapping", None) is None,
        "it leaves a draft's logits uncapped",
    ),
)
MASK_TOKEN = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it must be a row of the embedding",
    "draft.mask_token_id below the vocabulary's size",
)
WHOLE_VOCABULARY = Rule(
    "draft_vocab_size",
    lambda c: (getattr(c, "draft_vocab_size", None) or c.vocab_size) == c.vocab_size,
    "its drafts of blocks draft all of the target's tokens",
    "draft.draft_vocab_size not set",
)
