"""Rules of each inference engine that a DSpark draft of this project may break.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23.
"""

from __future__ import annotations

from train.draft.serving import WHOLE_VOCABULARY, Rule, scale_of

_HEAD = Rule(
    "markov_rank",
    lambda c: c.markov_rank > 0,
    "it always builds a Markov head",
    "draft.markov_head = vanilla",
)
_MASK = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it must be a row of the embedding",
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
            # Drafts learn the last layer's states after the final norm; vLLM passes those before it.
            lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it passes other states of the last layer than the draft was trained on",
            "draft.target_layer_ids within [-1, {last}]",
        ),
        _MASK,
        Rule(
            "embedding_scale",
            # vLLM would load a scaled copy, but targets that scale embeddings also cap or scale logits.
            lambda c: scale_of(c, "embedding_scale") == 1,
            "it embeds the draft's tokens unscaled",
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
            "it needs the confidence head's weights in all modes but static",
            "draft.confidence_head = true",
        ),
        Rule(
            "target_layer_ids",
            lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it can capture neither the embeddings nor the last layer",
            "draft.target_layer_ids within [0, {last}]",
        ),
        WHOLE_VOCABULARY,
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
