"""Rules of each inference engine that a DFlash2 draft of this project may break.

From the sources of vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM 1.4.0rc4, speculators 0.9.0, and llama.cpp as in
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import dataclasses

from train.draft.dflash import serving as dflash
from train.draft.serving import LAYERS_OF_SGLANG, LAYERS_OF_VLLM, MASK_TOKEN, UNSCALED, Rule, scale_of
from train.draft.targets import SGLANG_BLOCKS, VLLM

_UNKNOWN = Rule(
    "architectures",
    lambda _config: False,
    "it knows neither the convolutions nor the selector of this kind of draft",
)
# A converter that does not know the kind writes no file, and neither does the export.
GGUF = dataclasses.replace(dflash.GGUF, rules=(_UNKNOWN,))
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (LAYERS_OF_VLLM, MASK_TOKEN),  # model_executor/models/qwen3_dflash2.py
    "sglang": (  # srt/models/dflash.py, srt/speculative/dflash_worker_v2.py
        LAYERS_OF_SGLANG,
        MASK_TOKEN,
        Rule(
            "embedding_scale",
            lambda c: scale_of(c, "embedding_scale") == 1,
            "it embeds the draft's tokens as the target's module does, for most targets unscaled",
        ),
    ),
    "llama.cpp": (_UNKNOWN,),
    "tensorrt-llm": (_UNKNOWN,),
    "speculators": (LAYERS_OF_VLLM, MASK_TOKEN, *UNSCALED),  # speculators/models/dflash2
}
TARGETS = {"vllm": VLLM, "sglang": SGLANG_BLOCKS}
