"""Rules of each inference engine that an EAGLE-3 draft of this project may break.

From the engines' sources, vLLM 0.33.0, SGLang 0.5.23 and llama.cpp as in llama-cpp-python 0.3.36. vLLM and
SGLang take any number of captured layers. Earlier versions took three.
"""

from __future__ import annotations

from train.draft.eagle3.config import DECLARED, LAYER_IDS
from train.draft.serving import (
    LAYERS_OF_LLAMA_CPP,
    LAYERS_OF_SGLANG,
    LAYERS_OF_VLLM,
    LLAMA_TENSORS,
    UNSCALED_IN_LLAMA_CPP,
    GgufLayout,
    Rule,
    rope_of_llama_cpp,
    scale_of,
)

_EMBEDDING = Rule(
    "embedding_scale",
    lambda c: scale_of(c, "embedding_scale") == 1,
    "it embeds the draft's tokens unscaled",
)
_LLAMA_CPP = (  # conversion/llama.py, src/models/eagle3.cpp
    LAYERS_OF_LLAMA_CPP,
    Rule(
        "target_layer_ids",
        lambda c: len(c.target_layer_ids) == 3,
        "it takes exactly three layers",
        "three draft.target_layer_ids",
    ),
    Rule(
        "fc_norm",
        lambda c: not c.fc_norm,
        "it has no norm for each captured layer",
        "draft.fc_norm = false",
    ),
    Rule(
        "norm_output",
        lambda c: not c.norm_output,
        "it feeds back the states before the final norm",
        "draft.norm_output = false",
    ),
    rope_of_llama_cpp("linear", "yarn", "llama3"),
    *UNSCALED_IN_LLAMA_CPP,
)
GGUF = GgufLayout(
    architecture="eagle3",
    rules=_LLAMA_CPP,
    spec_type="draft-eagle3",
    first=lambda values: {
        "target_layers": values[LAYER_IDS],
        "target_hidden_size": values["target_hidden_size"],
        **{name: values[name] for name in DECLARED},
    },
    last=lambda values: {
        "vocab_size": values["vocab_size"],
        "rope.dimension_count": values["head_dim"],
    },
    mask_token=lambda _values: None,
    tensors={**LLAMA_TENSORS, "hidden_norm": "attn_norm_2"},
    only_layer="midlayer.",
    neighbours=True,
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
    "llama.cpp": _LLAMA_CPP,
}
