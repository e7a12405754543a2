"""Compile drafts' backbones at Qwen3-4B's shape for a GPU that is not there, pack after pack.

    python -m tests.gpu_less.mocked.backbone '[{"packs": [[512, true]]}]'

prints what became of each case as JSON. `packs` are numbers of anchors, and whether gradients are wanted.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import torch

from tests.gpu_less.mocked.gpu import GPUS, Compiler, faked, install
from tests.gpu_less.mocked.machine_code import needs_of
from tests.train.drafts import small_config
from train.draft.blocks.masks import context_spans
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.settings import run_config
from train.runtime import compiled

TOKENS = 4096
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "block_size": 7,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "num_target_layers": 36,
    "markov_rank": 256,
}


def main(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile each case as if it were the first; see `compile_case`.

    Loading the compiler and its first use take as long as a case: so all are compiled in this process.
    """
    compiler, found = install(GPUS["h100"]), []
    for case in cases:
        torch._dynamo.reset()
        compiled.compiled.cache_clear()
        compiler.kernels.clear()
        compiler.graphs.clear()
        found.append(compile_case(compiler, **case))
    for case in found:  # last: no kernel can be generated behind it
        case["needs"] = needs_of(case.pop("templates"), GPUS["h100"])
    return found


def compile_case(
    compiler: Compiler,
    packs: list[tuple[int, bool]],
    attention: str = "auto",
    precision: str = "bf16",
    checkpointing: bool = False,
    layers: int = 1,
    machine_code: bool = False,
    **draft: Any,
) -> dict[str, Any]:
    """Compile; return the attention kernel chosen, the number of graphs, and the Triton kernels' sources.

    Args:
        machine_code: keep the kernels of attention as `templates`, to see what they need.
        draft: more fields of the draft's configuration.
    """
    device = torch.device("cuda:0")
    config = small_config(**SHAPE, num_hidden_layers=layers, **draft)
    module = DSparkTrainerModule(Qwen3DSparkModel(config).float())
    model = module.draft_model
    train = {"precision": precision, "activation_checkpointing": checkpointing}
    settings = run_config({"draft": {"attention": attention}, "train": train})
    with faked(module):
        module.prepare(settings, device)
        probed = compiler.graphs.copy()
        for anchors, grad in packs:
            known = np.linspace(1, TOKENS - 8, anchors, dtype=np.int64)[None]
            module.train(grad)
            with (
                torch.set_grad_enabled(grad),
                torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"),
            ):
                states = model.hidden_states(
                    torch.empty(1, anchors * config.block_size, config.hidden_size, device=device),
                    torch.empty(1, TOKENS, 5, config.hidden_size, dtype=torch.bfloat16, device=device),
                    torch.zeros(1, anchors, dtype=torch.int64, device=device),
                    torch.zeros(1, TOKENS, dtype=torch.int32, device=device),
                    spans=context_spans(known, np.zeros_like(known)),
                )
            assert states.is_cuda
            assert states.shape == (1, anchors, config.block_size, config.hidden_size)
            if grad:
                states.float().sum().backward()
    templates = [each for each in compiler.kernels if each[0].startswith("triton_tem")]
    return {
        "attention": model.attention,
        "graphs": compiler.graphs - probed,
        "kernels": dict(compiler.kernels),
        "templates": templates if machine_code else [],
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # threads of autograd wait for the device
