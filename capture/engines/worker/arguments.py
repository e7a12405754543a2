"""Arguments of vLLM from the lines of a driver. Imports neither vLLM nor this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Arguments of the engine that capture decides.
OURS = {
    "model", "dtype", "max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "skip_tokenizer_init", "speculative_config", "kv_transfer_config", "logprobs_mode", "runner",
}  # fmt: skip
# Tokens of the context that an answer leaves free. vLLM keeps no states of a step, of any request, in which
# one comes as near to the end of the context as speculation reaches.
ROOM = 4

Json = dict[str, Any]


class EngineError(Exception):
    """The engine can't be started, or has ended."""


class RequestError(Exception):
    """A request that can't be served."""


def check(config: Json) -> None:
    """Check what can be checked before vLLM is imported.

    Raises:
        EngineError: the configuration contradicts what capture needs.
    """
    layers, arguments = config["layers"], config["arguments"]
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise EngineError(f"layers {layers}: expected different ids from 0 on, in ascending order")
    if taken := sorted(OURS & set(arguments)):
        raise EngineError(f"engine argument {taken[0]}: capture decides it; leave it out")
    if arguments.get("enable_prefix_caching"):
        raise EngineError(
            "engine argument enable_prefix_caching: a cached prefix has no states; leave it out"
        )
    if not Path(config["folder"]).is_dir():
        raise EngineError(f"{config['folder']} is no folder")


def engine_arguments(config: Json, on_cpu: bool) -> Json:
    """Return the arguments of the engine."""
    return {
        "seed": 0,
        "disable_log_stats": True,
        **({"enforce_eager": True, "kv_cache_memory_bytes": 2**30} if on_cpu else {}),
        **config["arguments"],
        "model": config["target"],
        "dtype": config["dtype"],
        "max_model_len": config["max_model_len"],
        "tensor_parallel_size": config["tensor_parallel"],
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": config["layers"]}},
        },
        "kv_transfer_config": {
            "kv_connector": "StatesConnector",
            "kv_connector_module_path": "connector",
            "kv_role": "kv_producer",  # so that a request that is preempted as it ends is computed again
            "kv_connector_extra_config": {
                "shared_storage_path": config["folder"],
                "use_synchronization_lock": False,
            },
        },
    }


def sampling_arguments(request: Json, stop: list[int], limit: int, vocabulary: int) -> Json:
    """Return the arguments of vLLM's SamplingParams.

    Args:
        stop: tokens that end an answer.
        limit: tokens of the context.

    Raises:
        RequestError: the request can't be served.
    """
    tokens, sampling = request["tokens"], request["sampling"]
    if not tokens or not all(0 <= token < vocabulary for token in tokens):
        raise RequestError(f"expected one or more token ids from 0 to {vocabulary - 1}")
    room = limit - len(tokens) - (ROOM if sampling else 0)
    if room < 1:
        raise RequestError(f"{len(tokens)} tokens leave no room for another in a context of {limit}")
    common = {"detokenize": False, "ignore_eos": True, "prompt_logprobs": 0 if request["logprobs"] else None}
    if sampling is None:
        rows = {"id": request["id"], "answer": False}
        return {**common, "temperature": 0, "max_tokens": 1, "extra_args": {"kv_transfer_params": rows}}
    rows = {"id": request["id"], "answer": True} if sampling["keep"] else {}
    return {
        **common,
        **{name: sampling[name] for name in ("temperature", "top_k", "top_p", "seed")},
        "max_tokens": min(sampling["max_new_tokens"], room),
        "stop_token_ids": stop,
        "extra_args": {"kv_transfer_params": rows},
    }
