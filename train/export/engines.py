"""What each inference engine asks of a draft, as far as a draft of this project can lack it.

From the engines' sources, vLLM 0.33.0 and SGLang 0.5.23. To add one: a row in `RULES`, `TARGETS` and
`VERSIONS`, its command in the model card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import Qwen3Config

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """Something that an engine asks of a draft."""

    field: str
    """Of the draft's config."""
    holds: Callable[[Qwen3Config], bool]
    reason: str
    """What the engine does instead."""
    remedy: str | None = None
    """The setting of a draft that it serves; `{last}` is the last layer but one."""


def scale_of(config: Qwen3Config, name: str) -> float:
    """A scale of the target's that a draft has as well; 1 where the config names none."""
    return getattr(config, name, None) or 1.0


_HEAD = Rule(
    "markov_rank",
    lambda c: c.markov_rank > 0,
    "it always builds a Markov head",
    "draft.markov_head = vanilla",
)
_MASK = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it has to be a row of the embedding",
    "draft.mask_token_id below the vocabulary's size",
)
_SOFTCAP = Rule(
    "final_logit_softcapping",
    lambda c: getattr(c, "final_logit_softcapping", None) is None,
    "it leaves a draft's logits uncapped",
)
RULES: dict[str, tuple[Rule, ...]] = {
    "hf": (),
    "vllm": (  # model_executor/models/qwen3_dspark.py
        _HEAD,
        Rule(
            "markov_head_type",
            lambda c: c.markov_rank == 0 or c.markov_head_type == "vanilla",
            "it has only the vanilla head",
            "draft.markov_head = vanilla",
        ),
        Rule(
            "target_layer_ids",
            # Of the last layer the draft learned from states behind the final norm; it gets those before it.
            lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "its states of the last layer are not those that the draft learned from",
            "draft.target_layer_ids within [-1, {last}]",
        ),
        _MASK,
        Rule(
            "embedding_scale",
            # It would load a scaled copy, but targets that scale embeddings cap or scale logits as well.
            lambda c: scale_of(c, "embedding_scale") == 1,
            "it embeds the draft's tokens unscaled",
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
            "it wants the confidence head's weights for all but its static mode",
            "draft.confidence_head = true",
        ),
        Rule(
            "target_layer_ids",
            lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
            "it can capture neither the embeddings nor the last layer",
            "draft.target_layer_ids within [0, {last}]",
        ),
        _MASK,
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
}


VERSIONS = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
# Weights that an engine would load as something else (SGLang: srt/configs/model_config.py).
DTYPES_REFUSED = {("sglang", "float32"): "it rounds float32 to float16"}

# Which targets hand their hidden states to a draft, by the names of their classes in transformers: in vLLM
# those that it serves by a class with SupportsEagle3 (model_executor/models/registry.py, its Transformers
# backend included), in SGLang those with set_dspark_layers_to_capture or set_dflash_layers_to_capture
# (srt/models).
_BOTH = frozenset(
    {
        *("BeamForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
        *("DeepseekV4ForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        *("Gemma4UnifiedForConditionalGeneration", "Glm5NextForConditionalGeneration"),
        *("GlmMoeDsaForCausalLM", "GptOssForCausalLM", "KimiLinearForCausalLM", "LagunaForCausalLM"),
        *("Llama4ForCausalLM", "LlamaForCausalLM", "MellumForCausalLM", "MiMoV2FlashForCausalLM"),
        *("MiniMaxM3SparseForConditionalGeneration", "Ministral3ForCausalLM", "MistralForCausalLM"),
        *("MuseGlimmerForConditionalGeneration", "MuseSparkForConditionalGeneration"),
        *("NemotronHForCausalLM", "NemotronH_Omni_Reasoning_V3", "Phi3ForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLForConditionalGeneration"),
        *("Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        *("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        *("Qwen4ExpForConditionalGeneration",),
    }
)
TARGETS: dict[str, frozenset[str]] = {
    "vllm": _BOTH
    | {
        *("AfmoeForCausalLM", "ApertusForCausalLM", "ArceeForCausalLM", "Cohere2MoeForCausalLM"),
        *("CohereCompassForConditionalGeneration", "CwmForCausalLM", "Emu3ForConditionalGeneration"),
        *("Ernie4_5ForCausalLM", "Exaone4_5_ForConditionalGeneration", "FlexOlmoForCausalLM"),
        *("GPTBigCodeForCausalLM", "GPTNeoXForCausalLM", "GlmForCausalLM", "GraniteForCausalLM"),
        *("GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM"),
        *("GraniteSWAForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"),
        *("HunYuanVLForConditionalGeneration", "Jais2ForCausalLM", "Kolibri1ForCausalLM"),
        *("Llama4ForConditionalGeneration", "LlavaForConditionalGeneration", "MiniCPM3ForCausalLM"),
        *("MiniCPMOcrForConditionalGeneration", "MiniCPMV4_6ForConditionalGeneration"),
        *("MiniCPMV4_7ForConditionalGeneration", "MiniMaxM2ForCausalLM"),
        *("Mistral3ForConditionalGeneration", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM"),
        *("PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2_5_VLForConditionalGeneration"),
        *("SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM"),
    },
    "sglang": _BOTH
    | {
        *("Glm4MoeLiteForCausalLM", "InklingForConditionalGeneration", "Lfm2ForCausalLM"),
        *("Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration"),
    },
}


def broken_rules(config: Qwen3Config, engine: str) -> list[Rule]:
    """What an engine, one of `RULES`, asks for and a draft does not have."""
    return [rule for rule in RULES[engine] if not rule.holds(config)]


def check_engine(config: Qwen3Config, engine: str, dtype: str) -> None:
    """Whether an engine can serve a draft.

    Args:
        dtype: of the exported weights.

    Raises:
        UsageError: it can't, with every reason and what to do.
    """
    broken = broken_rules(config, engine)
    if broken:
        last = config.num_target_layers - 2
        others = [name for name in RULES if not broken_rules(config, name)]
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


def obstacle(config: Qwen3Config, engine: str, dtype: str) -> str:
    """Why an engine can't serve a draft; empty where it can."""
    refused = DTYPES_REFUSED.get((engine, dtype))
    found = [
        _reasons(config, broken_rules(config, engine)),
        f"dtype is {dtype}, and {refused}" if refused else "",
    ]
    return "; ".join(filter(None, found))


def unknown_target(architecture: str, engine: str) -> str | None:
    """What to say where an engine's known version serves no draft for a target; None where it does.

    Args:
        architecture: the target's class.
        engine: one of `RULES`.
    """
    if engine not in TARGETS or architecture in TARGETS[engine]:
        return None
    return f"{VERSIONS[engine]} serves no draft for a {architecture} target; a newer version may"


def _reasons(config: Qwen3Config, broken: list[Rule]) -> str:
    """What is wrong with a draft, field by field."""
    return "; ".join(f"{r.field} is {getattr(config, r.field, None)}, and {r.reason}" for r in broken)
