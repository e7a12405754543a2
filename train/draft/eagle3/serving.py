"""Rules of each inference engine that an EAGLE-3 draft of this project may break.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4 and speculators 0.9.0. They take any
number of captured layers. Earlier versions of vLLM and SGLang took three.
"""

from __future__ import annotations

from train.draft.serving import LAYERS_OF_SGLANG, LAYERS_OF_VLLM, UNSCALED, Rule, scale_of
from train.draft.targets import SGLANG_LAYERS, VLLM

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
    "tensorrt-llm": (  # tensorrt_llm/_torch/models/modeling_speculative.py
        LAYERS_OF_SGLANG,
        *(
            Rule(
                name,
                lambda c, name=name: not getattr(c, name),
                "only its later sources are known to have EAGLE 3.1's norms",
                f"draft.{name} = false",
            )
            for name in ("fc_norm", "norm_output")
        ),
        *UNSCALED,
    ),
    "speculators": (LAYERS_OF_VLLM, *UNSCALED),  # speculators/models/eagle3
}
TARGETS = {"vllm": VLLM, "sglang": SGLANG_LAYERS}
