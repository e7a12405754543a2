"""Rules of each inference engine that a DFlash draft of this project may break.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4, speculators 0.9.0, and llama.cpp as in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from train.draft.blocks.serving import BLOCK_TENSORS, block_keys
from train.draft.serving import (
    FULL_ATTENTION,
    LAYERS_OF_LLAMA_CPP,
    LAYERS_OF_SGLANG,
    LAYERS_OF_VLLM,
    MASK_TOKEN,
    UNSCALED,
    WHOLE_VOCABULARY,
    GgufLayout,
    Rule,
    rope_of_llama_cpp,
    scale_of,
)
from train.draft.targets import LLAMA_CPP, SGLANG_BLOCKS, VLLM

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


def _llama_cpp(*scaled: str) -> tuple[Rule, ...]:
    """Return the rules of llama.cpp (conversion/qwen.py, src/models/dflash.cpp).

    Args:
        scaled: scaled rotary embeddings that the writer of the file knows.
    """
    return (
        LAYERS_OF_LLAMA_CPP,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
        rope_of_llama_cpp(*scaled),
        *UNSCALED,
    )


GGUF = GgufLayout(
    architecture="dflash",
    rules=_llama_cpp("linear", "yarn", "llama3"),
    spec_type="draft-dflash",
    first=lambda _values: {},
    # The converter writes "causal" of dflash_config, which decides if is_causal is not there.
    last=lambda values: block_keys({**values, **values["dflash_config"]}) | {"attention.causal": False},
    mask_token=lambda values: values["dflash_config"]["mask_token_id"],
    tensors=BLOCK_TENSORS,
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
    "llama.cpp": _llama_cpp("linear", "yarn"),
    "tensorrt-llm": (  # tensorrt_llm/_torch/models/modeling_dflash.py
        FULL_ATTENTION,
        LAYERS_OF_SGLANG,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
        *_PLAIN,
    ),
    "speculators": (LAYERS_OF_VLLM, MASK_TOKEN, *UNSCALED),  # speculators/models/dflash
}
TARGETS = {"vllm": VLLM, "sglang": SGLANG_BLOCKS, "llama.cpp": LLAMA_CPP}
