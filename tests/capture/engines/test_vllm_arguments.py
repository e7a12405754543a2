"""Arguments of vLLM, without a vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capture.engines.options import _OURS
from capture.engines.worker.arguments import (
    OURS,
    EngineError,
    RequestError,
    check,
    engine_arguments,
    sampling_arguments,
)

ASKED = {"max_new_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "keep": True}


def config(rows: Path, **changed: Any) -> dict[str, Any]:
    return {
        "target": "/t",
        "dtype": "bfloat16",
        "layers": [0, 5, 9],
        "folder": str(rows),
        "max_model_len": 100,
        "tensor_parallel": 2,
        "arguments": {"gpu_memory_utilization": 0.7, "enable_prefix_caching": False, "seed": 3},
        **changed,
    }


def test_the_engine_is_what_capture_needs_and_the_user_asks(tmp_path: Path) -> None:
    check(config(tmp_path))
    found = engine_arguments(config(tmp_path), on_cpu=False)
    states = found.pop("speculative_config")["draft_model_config"]["hf_config"]
    assert states == {"eagle_aux_hidden_state_layer_ids": [0, 5, 9]}
    transfer = found.pop("kv_transfer_config")
    assert (transfer["kv_role"], transfer["kv_connector_module_path"]) == ("kv_producer", "connector")
    assert transfer["kv_connector_extra_config"]["shared_storage_path"] == str(tmp_path)
    assert found == {
        "model": "/t",
        "dtype": "bfloat16",
        "max_model_len": 100,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.7,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 3,
    }
    on_cpu = engine_arguments(config(tmp_path, arguments={"kv_cache_memory_bytes": 5}), on_cpu=True)
    assert (on_cpu["enforce_eager"], on_cpu["kv_cache_memory_bytes"]) == (True, 5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layers": []}, "ascending"),
        ({"layers": [3, 1]}, "ascending"),
        ({"layers": [1, 1]}, "ascending"),
        ({"layers": [-1, 1]}, "ascending"),
        ({"arguments": {"enable_prefix_caching": True}}, "enable_prefix_caching"),
        ({"arguments": {"kv_transfer_config": {}}}, "kv_transfer_config"),
        ({"arguments": {"speculative_config": None}}, "speculative_config"),
        ({"arguments": {"tensor_parallel_size": 4}}, "tensor_parallel_size"),
        ({"folder": "/no/such"}, "/no/such is no folder"),
    ],
)
def test_what_contradicts_it_is_refused(tmp_path: Path, changed: dict, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        check(config(tmp_path, **changed))


def request(tokens: int, sampling: dict | None = None, logprobs: bool = False) -> dict[str, Any]:
    return {"id": 4, "tokens": [1] * tokens, "logprobs": logprobs, "sampling": sampling}


def test_a_prefill() -> None:
    found = sampling_arguments(request(99, logprobs=True), [2], 100, 50)
    assert found == {
        "temperature": 0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        "detokenize": False,
        "ignore_eos": True,
        "extra_args": {"kv_transfer_params": {"id": 4, "answer": False}},
    }


def test_an_answer() -> None:
    """It stops at the given tokens only, and before the last tokens of the context."""
    found = sampling_arguments(request(10, ASKED), [2, 8], 100, 50)
    assert found == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 9,
        "stop_token_ids": [2, 8],
        "prompt_logprobs": None,
        "detokenize": False,
        "ignore_eos": True,
        "extra_args": {"kv_transfer_params": {"id": 4, "answer": True}},
    }
    assert sampling_arguments(request(90, ASKED), [], 100, 50)["max_tokens"] == 6
    unkept = sampling_arguments(request(10, {**ASKED, "keep": False}), [], 100, 50)
    assert unkept["extra_args"] == {"kv_transfer_params": {}}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (request(100), "100 tokens leave no room for another in a context of 100"),
        (request(96, ASKED), "96 tokens leave no room"),
        (request(0), "expected one or more token ids from 0 to 49"),
        ({**request(1), "tokens": [50]}, "from 0 to 49"),
        ({**request(1), "tokens": [-1]}, "from 0 to 49"),
    ],
)
def test_requests_that_can_not_be_served(asked: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        sampling_arguments(asked, [], 100, 50)


def test_the_command_line_refuses_what_the_worker_would() -> None:
    """At once, and not after the target was loaded. The command passes a context of its own."""
    assert set(_OURS) >= OURS - {"max_model_len"}
