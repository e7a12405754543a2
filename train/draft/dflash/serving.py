"""Rules of each inference engine that a DFlash draft of this project may break.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4 and speculators 0.9.0.
"""

from __future__ import annotations

from train.draft.serving import (
    FULL_ATTENTION,
    LAYERS_OF_SGLANG,
    LAYERS_OF_VLLM,
    MASK_TOKEN,
    UNSCALED,
    WHOLE_VOCABULARY,
    Rule,
    scale_of,
)
from train.draft.targets import SGLANG_BLOCKS, VLLM

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
        LAYERS_OF_VLLM,
        MASK_TOKEN,
        *_PLAIN,
    ),
    "sglang": (  # srt/models/dflash.py, srt/speculative/dflash_utils.py
        LAYERS_OF_SGLANG,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
        *_PLAIN,
    ),
    "tensorrt-llm": (  # tensorrt_llm/_torch/models/modeling_dflash.py
        FULL_ATTENTION,
        LAYERS_OF_SGLANG,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
        *_PLAIN,
    ),
    "speculators": (LAYERS_OF_VLLM, MASK_TOKEN, *UNSCALED),  # speculators/models/dflash
}
TARGETS = {"vllm": VLLM, "sglang": SGLANG_BLOCKS}
