"""Hugging Face config of an EAGLE-3 draft, from a run's `[draft]` table and the target's config.

vLLM and SGLang count layers differently. Layer id i here is the output of layer i. SGLang's list
`eagle_config.eagle_aux_hidden_state_layer_ids` has these ids. vLLM's list of that name, at the top level, has
the layer that reads the states: i + 1. An exported config has both, and each engine reads its own.
TensorRT-LLM is told the layers where it is started, counted as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from pipeline.cache import Manifest
from train.draft.body import DIMENSIONS, body, body_export
from train.draft.eagle3.settings import Eagle3Config
from train.draft.vocabulary import check_vocabulary

ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# Fields that Llama's config lacks.
FIELDS = (
    "draft_vocab_size",
    "target_hidden_size",
    "num_aux_hidden_states",
    "fc_norm",
    "norm_output",
    "target_layer_ids",
    "num_target_layers",
    "ttt_steps",
    "train_head",
)
# Those of them that engines read. The ids are written in the engines' own counting.
_SERVED = FIELDS[:5]
# Facts that engines would otherwise assume, each its own.
DECLARED = {"norm_before_residual": False, "norm_before_fc": False}


def draft_config(
    draft: Eagle3Config,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 0,
) -> LlamaConfig:
    """Return the draft's config: Llama's body with the target's dimensions, and EAGLE-3's own fields.

    Args:
        draft: the run's `[draft]` table; a setting that is None is taken from the target.
        target: the target's own config.
        manifest: the cache's manifest.
        layer_ids: the captured layers the draft reads.
        num_anchors: not looked at: every candidate is an anchor.

    Raises:
        ConfigError: the heads don't fit each other, or the target has fewer tokens.
    """
    found = body(draft, target, manifest)
    return LlamaConfig(
        architectures=[ARCHITECTURE],
        **found,
        num_hidden_layers=1,
        draft_vocab_size=check_vocabulary(draft.draft_vocab_size, found["vocab_size"]),
        target_hidden_size=found["hidden_size"],
        num_aux_hidden_states=len(layer_ids),
        fc_norm=draft.fc_norm,
        norm_output=draft.norm_output,
        target_layer_ids=list(layer_ids),
        num_target_layers=manifest.identity.target.num_layers,
        ttt_steps=draft.ttt_steps,
        train_head=draft.train_head,
    )


def exported(config: PretrainedConfig) -> dict[str, Any]:
    """Return what an exported config states for engines."""
    ids = list(config.target_layer_ids)
    return {
        **body_export(config),
        **{name: getattr(config, name) for name in _SERVED},
        **DECLARED,
        "ttt_steps": config.ttt_steps,  # no engine reads it; an import does
        LAYER_IDS: [i + 1 for i in ids],
        "eagle_config": {"use_aux_hidden_state": True, LAYER_IDS: ids},
    }


def served(config: PretrainedConfig) -> dict[str, Any]:
    """Return how engines are told to serve a draft."""
    slots = config.ttt_steps
    # Without draft_sample_method vLLM drafts greedily for requests that sample, and accepts less of them.
    own = {"method": "eagle3", "num_speculative_tokens": slots, "draft_sample_method": "probabilistic"}
    trt = {"decoding_type": "Eagle3", "max_draft_len": slots}
    trt |= {"eagle3_layers_to_capture": list(config.target_layer_ids)}
    return {"vllm": own, "sglang": "EAGLE3", "tensorrt-llm": trt}


def layer_ids_of(values: Mapping[str, Any]) -> list[int] | None:
    """Return the layers that a config names, in this project's counting; None if it names none.

    Args:
        values: of a run's config.json or of an exported one.
    """
    if "target_layer_ids" in values:
        return list(values["target_layer_ids"])
    nested = values.get("eagle_config") or {}
    if LAYER_IDS in nested:
        return list(nested[LAYER_IDS])
    return [i - 1 for i in values[LAYER_IDS]] if LAYER_IDS in values else None


def weight_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean."""
    names = (*DIMENSIONS, *_SERVED, "num_target_layers")
    found = {name: values[name] for name in names if name in values}
    ids = layer_ids_of(values)
    return found if ids is None else found | {"target_layer_ids": ids}


def describe(config: PretrainedConfig) -> list[str]:
    """Return what a model card tells of the unroll and the head."""
    norms = [name for name in ("fc_norm", "norm_output") if getattr(config, name)]
    version = f"EAGLE 3.1 ({' and '.join(norms)})" if norms else "EAGLE-3"
    head = "trained from the target's" if config.train_head else "the target's, frozen"
    size, whole = config.draft_vocab_size, config.vocab_size
    vocabulary = f"{size:,} of {whole:,} tokens (`d2t`)" if size < whole else f"all {whole:,} tokens"
    return [
        f"{version}, one layer, trained by an unroll of {config.ttt_steps} steps on its own hidden states",
        f"output head over {vocabulary}, {head}",
    ]
