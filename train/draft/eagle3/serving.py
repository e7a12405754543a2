"""Rules of each inference engine that an EAGLE-3 draft of this project may break.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23. Both take any number of captured layers. Earlier
versions took three.
"""

from __future__ import annotations

from train.draft.serving import Rule, scale_of

_EMBEDDING = Rule(
    "embedding_scale",
    lambda c: scale_of(c, "embedding_scale") == 1,
    "it embeds the draft's tokens unscaled",
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/llama_eagle3.py
        Rule(
            "target_layer_ids",
            # Drafts learn the last layer's states after the final norm; vLLM passes those before it.
            lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it passes other states of the last layer than the draft was trained on",
            "draft.target_layer_ids within [-1, {last}]",
        ),
        _EMBEDDING,
        Rule(
            "final_logit_softcapping",
            lambda c: getattr(c, "final_logit_softcapping", None) is None,
            "it leaves a draft's logits uncapped",
        ),
    ),
    "sglang": (  # srt/models/llama_eagle3.py, srt/layers/logits_processor.py
        Rule(
            "target_layer_ids",
            lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it can capture neither the embeddings nor the last layer",
            "draft.target_layer_ids within [0, {last}]",
        ),
        _EMBEDDING,
        Rule(
            "logit_scale",
            lambda c: scale_of(c, "logit_scale") == 1,
            "it leaves a draft's logits unscaled",
        ),
    ),
}
