"""Rules of each inference engine that a DFlash draft of this project may break.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23.
"""

from __future__ import annotations

from train.draft.serving import WHOLE_VOCABULARY, Rule, scale_of

_MASK = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it must be a row of the embedding",
    "draft.mask_token_id below the vocabulary's size",
)
_PLAIN = (
    Rule(
        "embedding_scale",
        lambda c: scale_of(c, "embedding_scale") == 1,
        "it is not known to scale the embeddings of this kind of draft",
    ),
    Rule(
        "logit_scale",
        lambda c: scale_of(c, "logit_scale") == 1,
        "it is not known to scale the logits of this kind of draft",
    ),
    Rule(
        "final_logit_softcapping",
        lambda c: getattr(c, "final_logit_softcapping", None) is None,
        "it is not known to cap the logits of this kind of draft",
    ),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/qwen3_dflash.py
        Rule(
            "target_layer_ids",
            # Drafts learn the last layer's states after the final norm; vLLM passes those before it.
            lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it passes other states of the last layer than the draft was trained on",
            "draft.target_layer_ids within [-1, {last}]",
        ),
        _MASK,
        *_PLAIN,
    ),
    "sglang": (  # srt/models/dflash.py, srt/speculative/dflash_utils.py
        Rule(
            "target_layer_ids",
            lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it can capture neither the embeddings nor the last layer",
            "draft.target_layer_ids within [0, {last}]",
        ),
        WHOLE_VOCABULARY,
        _MASK,
        *_PLAIN,
    ),
}
