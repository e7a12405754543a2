"""Rules of each inference engine that an EAGLE-3 draft of this project may break.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23. Both take any number of captured layers. Earlier
versions took three.
"""

from __future__ import annotations

from train.draft.serving import LAYERS_OF_SGLANG, LAYERS_OF_VLLM, Rule, scale_of

_EMBEDDING = Rule(
    "embedding_scale",
    lambda c: scale_of(c, "embedding_scale") == 1,
    "it embeds the draft's tokens unscaled",
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/llama_eagle3.py
        LAYERS_OF_VLLM,
        _EMBEDDING,
        Rule(
            "final_logit_softcapping",
            lambda c: getattr(c, "final_logit_softcapping", None) is None,
            "it leaves a draft's logits uncapped",
        ),
    ),
    "sglang": (  # srt/models/llama_eagle3.py, srt/layers/logits_processor.py
        LAYERS_OF_SGLANG,
        _EMBEDDING,
        Rule(
            "logit_scale",
            lambda c: scale_of(c, "logit_scale") == 1,
            "it leaves a draft's logits unscaled",
        ),
    ),
}
