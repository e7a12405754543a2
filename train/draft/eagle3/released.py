"""Translate a released EAGLE-3 draft (SpecForge's, NeMo's or an exported one) into settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from pipeline.errors import RunError
from pipeline.text import one_line
from train.draft.eagle3.config import ARCHITECTURE, DECLARED, LAYER_IDS, layer_ids_of
from train.draft.released import check_unquantized

# Names in config.json -> names in a run's [draft] table.
_SETTINGS = {
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "ttt_steps": "ttt_steps",
    "fc_norm": "fc_norm",
    "norm_output": "norm_output",
}
# Values that every draft of this project has. Engines take a missing one for the same.
_FIXED = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    **DECLARED,
    "parallel_drafting": False,
    "use_aux_norm": False,
    "mlp_bias": False,
}
# The draft's class in SGLang, and in vLLM's own words.
ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM")


def check_released(values: Mapping[str, Any], where: str) -> None:
    """Check that a released config describes a draft of this project's kind.

    Args:
        values: values of config.json, without null ones.
        where: path of config.json, for messages.

    Raises:
        RunError: the config describes another kind of draft; the message names the field.
    """
    if values.get("architectures") not in [[name] for name in ARCHITECTURES]:
        known = " or ".join(ARCHITECTURES)
        raise RunError(
            f"{where} has architectures = {values.get('architectures')!r}, expected {known}: it is another "
            "kind of draft, import another"
        )
    for name, value in _FIXED.items():
        if name in values and values[name] != value:
            raise RunError(
                f"{where} has {name} = {values[name]!r}, expected {value!r}: it is another kind of draft, "
                "import another"
            )
    nested = values.get("eagle_config", {})
    if not isinstance(nested, dict) or nested.get("use_aux_hidden_state", True) is not True:
        raise RunError(
            f"{where} has an eagle_config without use_aux_hidden_state, so its draft reads one layer in "
            "EAGLE's older way: it is another kind of draft, import another"
        )
    if nested.get("norm_before_fc", False) is not False:
        raise RunError(
            f"{where} has eagle_config.norm_before_fc = {nested['norm_before_fc']!r}, expected False: it is "
            "another kind of draft, import another"
        )
    check_unquantized(values, where)
    _check_layers(values, nested, where)


def _check_layers(values: Mapping[str, Any], nested: Mapping[str, Any], where: str) -> None:
    """Check that a config names its layers, and that its two lists agree. Raise RunError if not."""
    try:
        ids = layer_ids_of(values)
        lists = [[i - 1 for i in values[LAYER_IDS]]] if LAYER_IDS in values else []
        lists += [list(nested[LAYER_IDS])] if LAYER_IDS in nested else []
    except TypeError as error:
        raise RunError(f"{where}: {LAYER_IDS} can't be read ({one_line(error)})") from None
    if ids is None:
        raise RunError(
            f"{where} has no eagle_config.{LAYER_IDS}, so it does not say which layers the draft reads: add "
            "their numbers there, counted from 0 (engines take 1, N/2 - 1 and N - 4 of N layers)"
        )
    if any(each != ids for each in lists):
        raise RunError(
            f"{where}: {LAYER_IDS} is {values[LAYER_IDS]}, which vLLM reads, but {nested[LAYER_IDS]} in "
            "eagle_config, which SGLang reads: the first must be one higher, layer for layer"
        )


def released_settings(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `[draft]` settings that describe a released draft, and its config with defaults filled in.

    Args:
        values: values of config.json, checked by `check_released`.
        weights: tensors by name, from `released_weights`; they decide what the config leaves open.
        where: path of config.json, for messages.

    Raises:
        RunError: the config can't be read.
    """
    values = dict(values)
    try:
        body = LlamaConfig.from_dict(values)
        values |= {name: getattr(body, name) for name in _SETTINGS if hasattr(body, name)}
    except Exception as error:  # transformers raises errors of many kinds for a config
        raise RunError(f"{where} can't be read ({one_line(error)})") from None
    draft = {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
    ids = layer_ids_of(values)
    assert ids is not None
    draft["target_layer_ids"] = tuple(ids)
    head = weights.get("lm_head.weight")
    size = values.get("draft_vocab_size", values.get("vocab_size") if head is None else len(head))
    if size != values.get("vocab_size"):
        draft["draft_vocab_size"] = size
    values |= {"draft_vocab_size": size, "target_layer_ids": ids}
    return draft, values


def released_weights(weights: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a released draft's weights by the names that a run's have.

    Trainers write the layer as `midlayer` or `layers.0`, with or without a prefix `model.`. Some write `d2t`
    and `t2d` for a draft that has the whole vocabulary.

    Args:
        weights: tensors by name.
        values: of config.json.
    """
    found = {}
    for name, weight in weights.items():
        name = name.removeprefix("model.")
        found[name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name] = weight
    offsets = found.get("d2t")
    if offsets is not None and len(offsets) == values.get("vocab_size") and not offsets.any():
        return {name: weight for name, weight in found.items() if name not in ("d2t", "t2d")}
    return found
