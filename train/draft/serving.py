"""Rules of inference engines for drafts, and the layout of llama.cpp's files.

Each kind has its own in `draft/<kind>/serving.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rule:
    """A requirement of an engine on a draft."""

    field: str
    """Field of the draft's config that breaks the rule."""
    holds: Callable[[PretrainedConfig], bool]
    reason: str
    """Reason why the engine can't serve other values."""
    remedy: str | None = None
    """Setting of a draft that the engine serves; `{last}` stands for the last layer but one."""


@dataclass(frozen=True, kw_only=True)
class GgufLayout:
    """Keys and tensors of a kind of draft in a GGUF file, as llama.cpp's converter writes them.

    Keys are without the architecture before them. Their values come from an exported config.
    """

    architecture: str
    spec_type: str
    """Value of llama-server's `--spec-type`."""
    first: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Return the keys before those that all kinds have."""
    last: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Return the keys after those that all kinds have."""
    mask_token: Callable[[Mapping[str, Any]], int | None]
    """Return the mask token, which the file's tokenizer names; None for a kind without one."""
    tensors: Mapping[str, str]
    """Names in the file by the names of weights, both without suffix and layer."""
    only_layer: str | None = None
    """Prefix of the weights of a kind's only layer; None for `layers.<number>.`."""
    rules: tuple[Rule, ...]
    """llama.cpp's rules where the file is written here, not by its converter, which leaves things out."""
    neighbours: bool = False
    """True if rotated pairs of queries and keys are neighbours in the file; False if they are halves."""


LLAMA_TENSORS = {
    "fc": "fc",
    "norm": "output_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
"""Names of the tensors that all kinds have or may have; see `GgufLayout.tensors`."""


def scale_of(config: PretrainedConfig, name: str) -> float:
    """Return a scale that a draft shares with its target; 1 if the config has none."""
    return getattr(config, name, None) or 1.0


LAYERS_OF_VLLM = Rule(
    "target_layer_ids",
    # Drafts learn the last layer's states after the final norm; vLLM passes those before it.
    lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
    "it passes other states of the last layer than the draft was trained on",
    "draft.target_layer_ids within [-1, {last}]",
)
LAYERS_OF_SGLANG = Rule(
    "target_layer_ids",
    lambda c: min(c.target_layer_ids) >= 0 and max(c.target_layer_ids) <= c.num_target_layers - 2,
    "it can capture neither the embeddings nor the last layer",
    "draft.target_layer_ids within [0, {last}]",
)
LAYERS_OF_LLAMA_CPP = Rule(
    "target_layer_ids",
    lambda c: min(c.target_layer_ids) >= -1 and max(c.target_layer_ids) <= c.num_target_layers - 2,
    "it passes the inputs of layers, so of the last layer nothing",
    "draft.target_layer_ids within [-1, {last}]",
)
FULL_ATTENTION = Rule(
    "layer_types",
    lambda c: "sliding_attention" not in (getattr(c, "layer_types", None) or ()),
    "it has no window in which the slots of a block see each other",
    "draft.sliding_window not set",
)
MASK_TOKEN = Rule(
    "mask_token_id",
    lambda c: 0 <= c.mask_token_id < c.vocab_size,
    "it must be a row of the embedding",
    "draft.mask_token_id below the vocabulary's size",
)
WHOLE_VOCABULARY = Rule(
    "draft_vocab_size",
    lambda c: (getattr(c, "draft_vocab_size", None) or c.vocab_size) == c.vocab_size,
    "its drafts of blocks draft all of the target's tokens",
    "draft.draft_vocab_size not set",
)
# Fields of scaled rotary embeddings that llama.cpp's converter writes as transformers means them.
_ROPE_FIELDS = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
}


def rope_of_llama_cpp(*scaled: str) -> Rule:
    """Return the rule on rotary embeddings for a kind of draft.

    Args:
        scaled: values of `rope_type` that the file's writer knows for this kind, besides the default.
    """
    more = " (by --gguf llama3 as well)"

    def holds(config: PretrainedConfig) -> bool:
        rope = config.rope_parameters
        if rope.get("rope_type", "default") == "default":
            return True
        known = _ROPE_FIELDS | ({"low_freq_factor", "high_freq_factor"} if "llama3" in scaled else set())
        whole = rope["rope_type"] == "linear" or "original_max_position_embeddings" in rope
        return rope["rope_type"] in scaled and "factor" in rope and whole and rope.keys() <= known

    return Rule(
        "rope_parameters",
        holds,
        f"a file for it has plain, {' or '.join(scaled)} ones with no other fields than "
        f"{', '.join(sorted(_ROPE_FIELDS - {'rope_type'}))}{'' if 'llama3' in scaled else more}",
    )


UNSCALED = (
    Rule(
        "embedding_scale",
        lambda c: scale_of(c, "embedding_scale") == 1,
        "it embeds the draft's tokens unscaled",
    ),
    Rule(
        "logit_scale",
        lambda c: scale_of(c, "logit_scale") == 1,
        "it leaves a draft's logits unscaled",
    ),
    Rule(
        "final_logit_softcapping",
        lambda c: getattr(c, "final_logit_softcapping", None) is None,
        "it leaves a draft's logits uncapped",
    ),
)

_SEEN = (
    "{} has served a draft of this kind in fp32. Every token that it drafted was the one that this project's "
    "decoder drafts"
)
# Engines that served drafts of every kind, as `make prove` shows.
PROVED = {
    "vllm": (_SEEN.format("vLLM 0.32.0 on a CPU") + ", as `dspark prove` found.",),
    "llama.cpp": (
        _SEEN.format("llama.cpp of llama-cpp-python 0.3.36 on a CPU") + ", as `dspark prove` found.",
    ),
}
"""Notes for model cards."""
