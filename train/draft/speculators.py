"""The config.json of the speculators library, as far as all kinds of drafts have it in common.

From the source of speculators 0.9.0, whose files vLLM reads as well. A config nests the draft's layers in
`transformer_layer_config` and names the kind in `speculators_model_type`. Its layer ids are one higher than a
run's: id i is what layer i reads, and 0 the embeddings. Each kind has its own fields in
`draft/<kind>/speculators.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from pipeline.errors import RunError
from pipeline.text import one_line
from train.draft.body import body_export

TYPE = "speculators_model_type"
LAYERS = "transformer_layer_config"
# Fields of the nested config that a run's config may need, and that a file leaves out if they are defaults.
_FILLED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "rope_parameters",
)


@dataclass(frozen=True, kw_only=True)
class SpeculatorsForm:
    """A kind's form in the speculators library."""

    name: str
    """Value of `speculators_model_type`."""
    architecture: str
    """The library's class."""
    fields: Callable[[PretrainedConfig], dict[str, Any]]
    """Return the fields of a draft's config.json that the kind has to itself."""
    layers: Callable[[PretrainedConfig], dict[str, Any]]
    """Return `transformer_layer_config` of a draft's config.json."""
    claims: Callable[[Mapping[str, Any]], bool]
    """Return whether a config.json describes a draft of this kind, runnable or not."""
    released: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """Return a config.json as `DraftKind.check_released` takes it. Arguments: its values, its path for
    messages. Raise RunError if the kind can't run it."""
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights
    """Return a run's weights by the library's names. `DraftKind.released_weights` takes those back."""


def layer_config(config: PretrainedConfig) -> dict[str, Any]:
    """Return the part of `transformer_layer_config` that all kinds have: the body and the target's layers."""
    return {**body_export(config), "num_target_layers": config.num_target_layers}


def library_ids(layer_ids: list[int]) -> list[int]:
    """Return layer ids in the library's counting."""
    return [i + 1 for i in layer_ids]


def run_ids(values: Mapping[str, Any], name: str, where: str) -> list[int]:
    """Return the layer ids of a field in a run's counting.

    Raises:
        RunError: they are missing, or no list of whole numbers.
    """
    ids = values.get(name)
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise RunError(
            f"{where} has {name} = {ids!r}, expected the layers that the draft reads, counted from 1: add "
            "their numbers"
        )
    return [i - 1 for i in ids]


def need(values: Mapping[str, Any], name: str, readers: str, where: str) -> Any:
    """Return a field that readers don't agree on where it is missing.

    Args:
        readers: each reader's own assumption, for the message.

    Raises:
        RunError: it is missing.
    """
    if values.get(name) is None:
        raise RunError(f"{where} has no {name}, which {readers}: add the value that it was trained with")
    return values[name]


def nested_layers(
    values: Mapping[str, Any], config_class: type[PretrainedConfig], where: str
) -> dict[str, Any]:
    """Return the fields of `transformer_layer_config`, with the defaults that a file leaves out.

    Args:
        values: values of config.json.
        config_class: class of the kind's own config.
        where: path of config.json, for messages.

    Raises:
        RunError: it is missing or can't be read, it is another class's, or its weights are quantised.
    """
    layers = values.get(LAYERS)
    if not isinstance(layers, dict):
        raise RunError(f"{where} has no {LAYERS}, so it is not a draft of speculators: import another")
    layers = {name: value for name, value in layers.items() if value is not None}
    wanted, found = config_class.model_type, layers.get("model_type", "qwen3")
    if found != wanted:
        raise RunError(
            f"{where} has {LAYERS}.model_type = {found!r}, expected {wanted!r}: no run has a draft with such "
            "layers, import another"
        )
    for each in (values, layers):
        if "quantization_config" in each:
            layers["quantization_config"] = each["quantization_config"]  # refused by check_released
    try:
        body = config_class.from_dict(dict(layers))
        layers |= {name: getattr(body, name) for name in _FILLED}
    except Exception as error:  # transformers raises errors of many kinds for a config
        raise RunError(f"{where}: {LAYERS} can't be read ({one_line(error)})") from None
    width, hidden = values.get("target_hidden_size"), layers["hidden_size"]
    if width is not None and width != hidden:
        raise RunError(
            f"{where} has target_hidden_size = {width!r} and {LAYERS}.hidden_size = {hidden!r}, expected the "
            "same: no run can describe this draft, import another"
        )
    size = values.get("draft_vocab_size")
    if size is not None and size != layers["vocab_size"]:
        layers["draft_vocab_size"] = size
    return layers


def speculative_tokens(values: Mapping[str, Any], where: str) -> int:
    """Return the tokens that a config's first way of proposing drafts in a round.

    Raises:
        RunError: there is none.
    """
    try:
        tokens = values["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        tokens = None
    if type(tokens) is not int or tokens < 1:
        raise RunError(
            f"{where} has no speculators_config.proposal_methods with speculative_tokens, so it does not say "
            "how many tokens the draft drafts: add them"
        )
    return tokens
