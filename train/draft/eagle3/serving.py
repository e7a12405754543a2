"""Rules of each inference engine that an EAGLE-3 draft of this project may break.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4, speculators 0.9.0, and llama.cpp as in
llama-cpp-python 0.3.36. All but llama.cpp take any number of captured layers. Earlier versions of vLLM and
SGLang took three.
"""

from __future__ import annotations

from train.draft.eagle3.config import DECLARED, LAYER_IDS
from train.draft.serving import (
    LAYERS_OF_LLAMA_CPP,
    LAYERS_OF_SGLANG,
    LAYERS_OF_VLLM,
    LLAMA_TENSORS,
    UNSCALED,
    GgufLayout,
    Rule,
    rope_of_llama_cpp,
    scale_of,
)
from train.draft.targets import LLAMA_CPP, SGLANG_LAYERS, VLLM

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
    *UNSCALED,
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
TARGETS = {"vllm": VLLM, "sglang": SGLANG_LAYERS, "llama.cpp": LLAMA_CPP}
