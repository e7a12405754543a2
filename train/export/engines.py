"""Drafts and targets that each engine serves.

From the engines' sources, vLLM 0.33.0, SGLang 0.5.23 and llama.cpp as in llama-cpp-python 0.3.36. To add an
engine: add a row to `TARGETS` and `VERSIONS`, its command to the model card, and its rules to
`draft/<kind>/serving.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from pipeline.errors import UsageError
from train.draft.serving import Rule

Rules = Mapping[str, tuple[Rule, ...]]
"""Rules of a kind of draft, by engine."""

VERSIONS = {
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36",
}
# Dtypes that an engine would convert on loading (SGLang: srt/configs/model_config.py).
DTYPES_REFUSED = {("sglang", "float32"): "it rounds float32 to float16"}

# Engines that misread copies of the target's embedding and head beside a draft of all tokens: llama.cpp's
# converter drops the head beside a Markov head, and the server then takes the embedding for it.
EMBEDDINGS_REFUSED = {"llama.cpp": "it has the target's, and may take a copy of the embedding for the head"}

# Targets that pass their hidden states to a draft, by class name in transformers. In vLLM: those served by a
# class with SupportsEagle3 (model_executor/models/registry.py, including its Transformers backend). In
# SGLang: those with set_dspark_layers_to_capture or set_dflash_layers_to_capture (srt/models). In llama.cpp:
# those whose graph sets t_layer_inp (src/models), by the classes that its converter takes.
_BOTH = frozenset(
    {
        "BeamForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV4ForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Glm5NextForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "GptOssForCausalLM",
        "KimiLinearForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronH_Omni_Reasoning_V3",
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
TARGETS: dict[str, frozenset[str]] = {
    "vllm": _BOTH
    | {
        "AfmoeForCausalLM",
        "ApertusForCausalLM",
        "ArceeForCausalLM",
        "Cohere2MoeForCausalLM",
        "CohereCompassForConditionalGeneration",
        "CwmForCausalLM",
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
        "Kolibri1ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "MiniCPM3ForCausalLM",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "MiniMaxM2ForCausalLM",
        "Mistral3ForConditionalGeneration",
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
    },
    "sglang": _BOTH
    | {
        "Glm4MoeLiteForCausalLM",
        "InklingForConditionalGeneration",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Lfm2VlForConditionalGeneration",
    },
    "llama.cpp": frozenset(
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
    ),
}


def broken_rules(rules: Rules, config: PretrainedConfig, engine: str) -> list[Rule]:
    """Return the rules of an engine that a draft breaks."""
    return [rule for rule in rules[engine] if not rule.holds(config)]


def check_engine(
    rules: Rules, config: PretrainedConfig, engine: str, dtype: str, *, embeddings: bool = False
) -> None:
    """Check that an engine can serve a draft.

    Args:
        rules: rules of the draft's kind.
        dtype: dtype of the exported weights.
        embeddings: whether the target's embedding and whole head come along.

    Raises:
        UsageError: the engine can't serve the draft; the message has every reason and the remedies.
    """
    broken = broken_rules(rules, config, engine)
    if broken:
        last = config.num_target_layers - 2
        others = [name for name in rules if not broken_rules(rules, config, name)]
        remedies = dict.fromkeys(rule.remedy.format(last=last) for rule in broken if rule.remedy)
        train = f", or train with {' and '.join(remedies)}" if remedies else ""
        raise UsageError(
            f"{engine} can't serve this draft: {_reasons(config, broken)}: "
            f"export --to {' or '.join(reversed(others))}{train}"
        )
    if (engine, dtype) in DTYPES_REFUSED:
        raise UsageError(
            f"{engine} can't serve this draft in {dtype}: {DTYPES_REFUSED[engine, dtype]}: "
            "export --dtype bfloat16"
        )
    if embeddings and engine in EMBEDDINGS_REFUSED:
        raise UsageError(
            f"{engine} can't serve this draft with the target's embedding and head beside it: "
            f"{EMBEDDINGS_REFUSED[engine]}: leave out --with-embeddings"
        )


def obstacle(
    rules: Rules, config: PretrainedConfig, engine: str, dtype: str, *, embeddings: bool = False
) -> str:
    """Return the reasons why an engine can't serve a draft; an empty string if it can.

    Arguments are as of `check_engine`.
    """
    refused = DTYPES_REFUSED.get((engine, dtype))
    found = [
        _reasons(config, broken_rules(rules, config, engine)),
        f"dtype is {dtype}, and {refused}" if refused else "",
        f"the target's head comes along, and {EMBEDDINGS_REFUSED[engine]}"
        if embeddings and engine in EMBEDDINGS_REFUSED
        else "",
    ]
    return "; ".join(filter(None, found))


def unknown_target(architecture: str, engine: str) -> str | None:
    """Return a warning if an engine's known version serves no draft for a target; None if it does.

    Args:
        architecture: name of the target's class.
    """
    if engine not in TARGETS or architecture in TARGETS[engine]:
        return None
    return f"{VERSIONS[engine]} serves no draft for a {architecture} target; a newer version may"


def _reasons(config: PretrainedConfig, broken: list[Rule]) -> str:
    """Return the broken rules of a draft as text, field by field."""
    return "; ".join(f"{r.field} is {getattr(config, r.field, None)}, and {r.reason}" for r in broken)
