"""Rules of each engine that a DSpark draft of this project may break, and what is known of serving it.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4, speculators 0.9.0, and llama.cpp as in
llama-cpp-python 0.3.36. vLLM also has a Gemma4DSparkModel, which scales embeddings and caps logits. Its
layers are Gemma 4's: values are the keys without a weight of their own, attention is not scaled, and outputs
are normed before they are added. A run's draft has Qwen 3's layers, so its weights can't be written for that
class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.draft.blocks.serving import BLOCK_TENSORS, block_keys
from train.draft.serving import (
    FULL_ATTENTION,
    LAYERS_OF_LLAMA_CPP,
    LAYERS_OF_SGLANG,
    LAYERS_OF_VLLM,
    MASK_TOKEN,
    PROVED,
    UNSCALED,
    WHOLE_VOCABULARY,
    GgufLayout,
    Rule,
    rope_of_llama_cpp,
    scale_of,
)
from train.draft.targets import LLAMA_CPP, SGLANG_BLOCKS, VLLM

_HEAD = Rule(
    "markov_rank",
    lambda c: c.markov_rank > 0,
    "it always builds a Markov head",
    "draft.markov_head = vanilla",
)
_VANILLA = Rule(
    "markov_head_type",
    lambda c: c.markov_rank == 0 or c.markov_head_type == "vanilla",
    "it has only the vanilla head",
    "draft.markov_head = vanilla",
)
_SOFTCAP = Rule(
    "final_logit_softcapping",
    lambda c: getattr(c, "final_logit_softcapping", None) is None,
    "it leaves a draft's logits uncapped",
)


def _llama_cpp(*scaled: str) -> tuple[Rule, ...]:
    """Return the rules of llama.cpp (conversion/qwen.py, src/models/dflash.cpp).

    Args:
        scaled: scaled rotary embeddings that the writer of the file knows.
    """
    return (
        # Without a Markov head it takes the draft for DFlash's, whose anchor drafts nothing.
        _HEAD,
        _VANILLA,
        Rule(
            "confidence_head_with_markov",
            lambda c: not c.enable_confidence_head or c.confidence_head_with_markov,
            "its confidence head reads the Markov embedding",
            "draft.confidence_with_markov = true",
        ),
        LAYERS_OF_LLAMA_CPP,
        MASK_TOKEN,
        rope_of_llama_cpp(*scaled),
        *UNSCALED,
    )


def _keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **block_keys(values),
        "sample_from_anchor": values["sample_from_anchor"],
        "has_confidence_head": values["enable_confidence_head"],
    }


GGUF = GgufLayout(
    architecture="dflash",
    rules=_llama_cpp("linear", "yarn", "llama3"),
    spec_type="draft-dspark",
    first=lambda _values: {},
    last=_keys,
    mask_token=lambda values: values["mask_token_id"],
    tensors={
        **BLOCK_TENSORS,
        "markov_head.markov_w1": "markov_w1",
        "markov_head.markov_w2": "markov_w2",
        "confidence_head.proj": "conf_proj",
    },
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/qwen3_dspark.py
        _HEAD,
        _VANILLA,
        LAYERS_OF_VLLM,
        MASK_TOKEN,
        Rule(
            "embedding_scale",
            # vLLM would load a scaled copy, but targets that scale embeddings also cap or scale logits.
            lambda c: scale_of(c, "embedding_scale") == 1,
            "of its classes Gemma4DSparkModel has other layers, and Qwen3DSparkModel embeds tokens unscaled",
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
        LAYERS_OF_SGLANG,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
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
    "llama.cpp": _llama_cpp("linear", "yarn"),
    "tensorrt-llm": (  # tensorrt_llm/_torch/models/modeling_dspark_qwen3.py
        Rule(
            "rope_parameters",
            lambda c: c.rope_parameters.get("rope_type", "default") == "default",
            "it rotates positions by rope_theta alone",
        ),
        FULL_ATTENTION,
        LAYERS_OF_SGLANG,
        WHOLE_VOCABULARY,
        MASK_TOKEN,
        *UNSCALED,
    ),
    "speculators": (LAYERS_OF_VLLM, MASK_TOKEN, *UNSCALED),  # speculators/models/dspark
}
# SGLang falls back on the other method where a target lacks set_dspark_layers_to_capture.
TARGETS = {
    "vllm": VLLM,
    "sglang": SGLANG_BLOCKS | {"DeepseekV4ForCausalLM", "KimiLinearForCausalLM"},
    "llama.cpp": LLAMA_CPP,
}
NOTES = {
    **PROVED,
    "sglang": (  # seen by hand: see docs/serving.md
        "SGLang 0.5.23, patched by hand to run on a CPU, has served a draft of this kind in fp32. Every "
        "token that it drafted was the one that this project's decoder drafts.",
    ),
    "tensorrt-llm": (
        "It keeps the last 2,048 positions of the context for the draft, or as many as the variable "
        "`TRTLLM_DSPARK_QWEN3_CTX_WINDOW` says. The draft was trained to see all of them.",
    ),
}
