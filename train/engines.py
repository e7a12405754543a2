"""What each inference engine asks of a draft, as far as a draft of this project can lack it.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23. To add one: a row in `RULES`, its command in the
model card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import Qwen3Config

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """Something that an engine asks of a draft."""

    field: str
    """Of the draft's config."""
    holds: Callable[[Qwen3Config], bool]
    reason: str
    """What the engine does instead."""
    remedy: str | None = None
    """The setting of a draft that it serves; `{last}` is the last layer but one."""


def scale_of(config: Qwen3Config, name: str) -> float:
    """A scale of the target's that a draft has as well; 1 where the config names none."""
    return getattr(config, name, None) or 1.0


_HEAD = Rule(
    "markov_rank",
    lambda c: c.markov_rank > 0,
    "it always builds a Markov head",
    "draft.markov_head = vanilla",
)
_MASK = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it has to be a row of the embedding",
    "draft.mask_token_id below the vocabulary's size",
)
_SOFTCAP = Rule(
    "final_logit_softcapping",
    lambda c: getattr(c, "final_logit_softcapping", None) is None,
    "it leaves a draft's logits uncapped",
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/qwen3_dspark.py
        _HEAD,
        Rule(
            "markov_head_type",
            lambda c: c.markov_rank == 0 or c.markov_head_type == "vanilla",
            "it has only the vanilla head",
            "draft.markov_head = vanilla",
        ),
        Rule(
            "target_layer_ids",
            # Of the last layer the draft learned from states behind the final norm; it gets those before it.
            lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "its states of the last layer are not those that the draft learned from",
            "draft.target_layer_ids within [-1, {last}]",
        ),
        _MASK,
        Rule(
            "embedding_scale",
            lambda c: scale_of(c, "embedding_scale") == 1,
            "it embeds the draft's tokens unscaled unless --with-embeddings brings a scaled copy",
        ),
        Rule(
            "logit_scale",
            lambda c: scale_of(c, "logit_scale") == 1,
            "it scales the Markov head's bias as well",
        ),
        _SOFTCAP,
    ),
    "sglang": (  # srt/models/dspark.py, srt/speculative/dspark_components
        _HEAD,
        Rule(
            "markov_head_type",
            lambda c: c.markov_rank == 0 or c.markov_head_type in ("vanilla", "gated", "rnn"),
            "it has the vanilla, the gated and the rnn head",
            "draft.markov_head = vanilla, gated or rnn",
        ),
        Rule(
            "enable_confidence_head",
            lambda c: c.enable_confidence_head,
            "it wants the confidence head's weights for all but its static mode",
            "draft.confidence_head = true",
        ),
        Rule(
            "target_layer_ids",
            lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it can capture neither the embeddings nor the last layer",
            "draft.target_layer_ids within [0, {last}]",
        ),
        _MASK,
        Rule(
            "embedding_scale",
            lambda c: scale_of(c, "embedding_scale") == 1,
            "it embeds the draft's tokens as the target's module does, for most targets unscaled",
        ),
        Rule(
            "logit_scale",
            lambda c: scale_of(c, "logit_scale") == 1,
            "it leaves a draft's logits unscaled",
        ),
        _SOFTCAP,
    ),
}


def broken_rules(config: Qwen3Config, engine: str, *, with_embeddings: bool = False) -> list[Rule]:
    """What an engine asks for and a draft does not have.

    Args:
        engine: one of `RULES`.
        with_embeddings: whether the draft brings an embedding of its own.
    """
    broken = [rule for rule in RULES[engine] if not rule.holds(config)]
    if engine == "vllm" and with_embeddings:  # it keeps a draft's copy that differs from the target's
        broken = [rule for rule in broken if rule.field != "embedding_scale"]
    return broken


def check_engine(config: Qwen3Config, engine: str, *, with_embeddings: bool = False) -> None:
    """Whether an engine can serve a draft.

    Raises:
        UsageError: it can't, with every reason and what to do.
    """
    broken = broken_rules(config, engine, with_embeddings=with_embeddings)
    if not broken:
        return
    last = config.num_target_layers - 2
    others = [name for name in RULES if not broken_rules(config, name, with_embeddings=with_embeddings)]
    remedies = dict.fromkeys(rule.remedy.format(last=last) for rule in broken if rule.remedy)
    train = f", or train with {' and '.join(remedies)}" if remedies else ""
    raise UsageError(
        f"{engine} can't serve this draft: {reasons(config, broken)}: "
        f"export --to {' or '.join(reversed(others))}{train}"
    )


def reasons(config: Qwen3Config, broken: list[Rule]) -> str:
    """What is wrong with a draft, field by field."""
    return "; ".join(f"{r.field} is {getattr(config, r.field, None)}, and {r.reason}" for r in broken)
