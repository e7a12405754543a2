"""Targets that pass their hidden states to a draft, by class name in transformers and by engine.

From the engines' sources, vLLM 0.33.0, SGLang 0.5.23 and llama.cpp as in llama-cpp-python 0.3.36. In vLLM and
llama.cpp the same targets serve every kind of draft. In vLLM: those of a class with SupportsEagle3
(model_executor/models/registry.py, including its Transformers backend). In llama.cpp: those whose graph sets
t_layer_inp (src/models), by the classes that its converter takes. SGLang asks for another method by kind of
draft (srt/model_executor/model_runner_components/attention_backend_setup.py), so each kind says in
`draft/<kind>/serving.py` which list is its own. Names are those that transformers has, or whose targets bring
their own code. Drafts that SGLang serves by a class of
their own are no targets.
"""

from __future__ import annotations

_EVERY = frozenset(
    {
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Glm5NextForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "GptOssForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MellumForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
    }
)
VLLM = _EVERY | frozenset(
    {
        "AfmoeForCausalLM",
        "ApertusForCausalLM",
        "ArceeForCausalLM",
        "BeamForCausalLM",
        "Cohere2MoeForCausalLM",
        "CohereCompassForConditionalGeneration",
        "CwmForCausalLM",
        "DeepseekV4ForCausalLM",
        "Emu3ForConditionalGeneration",
        "Ernie4_5ForCausalLM",
        "Exaone4_5_ForConditionalGeneration",
        "FlexOlmoForCausalLM",
        "GPTBigCodeForCausalLM",
        "GPTNeoXForCausalLM",
        "GlmForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteSWAForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanVLForConditionalGeneration",
        "Jais2ForCausalLM",
        "KimiLinearForCausalLM",
        "Kolibri1ForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "MiMoV2FlashForCausalLM",
        "MiniCPM3ForCausalLM",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronH_Omni_Reasoning_V3",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoForCausalLM",
        "PhiForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "Starcoder2ForCausalLM",
        "VaultGemmaForCausalLM",
    }
)
"""Targets of vLLM, for drafts of every kind."""
_SGLANG = _EVERY | {"Glm4MoeLiteForCausalLM"}
SGLANG_BLOCKS = _SGLANG | frozenset(
    {
        "BeamForCausalLM",
        "InklingForConditionalGeneration",
        "LagunaForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Lfm2VlForConditionalGeneration",
        "MiMoV2FlashForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronH_Omni_Reasoning_V3",
    }
)
"""Targets of SGLang with set_dflash_layers_to_capture, for drafts of blocks."""
SGLANG_LAYERS = _SGLANG | frozenset(
    {
        "ApertusForCausalLM",
        "ExaoneMoeForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "Llama4ForConditionalGeneration",
        "LongcatFlashForCausalLM",
        "MiniMaxM2ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
    }
)
"""Targets of SGLang with set_eagle3_layers_to_capture, for drafts that take one token after another."""
LLAMA_CPP = frozenset(
    {
        "BailingMoeV3ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "GptOssForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanVLForConditionalGeneration",
        "InternLM3ForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "LlamaForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniMaxM1ForCausalLM",
        "MiniMaxM2ForCausalLM",
        "MiniMaxText01ForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "NanbeigeForCausalLM",
        "NemotronHForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
    }
)
"""Targets of llama.cpp, for drafts of every kind."""
