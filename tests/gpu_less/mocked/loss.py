"""Compile the plain pass of the loss at Qwen3's vocabulary for a GPU that is not there.

    python -m tests.gpu_less.mocked.loss '{"chunks": [[1664, 900]]}'

prints what became of it as JSON. `chunks` are numbers of slots and of their positions.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu_less.mocked.gpu import GPUS, install
from tests.gpu_less.mocked.machine_code import needs_of
from train.losses.plain import differentiate_compiled

VOCAB = 151_936


def main(chunks: list[tuple[int, int]]) -> dict[str, Any]:
    """Compile, with a bias by position.

    Returns:
        The number of kernels for each chunk, their sources, and what they need.
    """
    compiler, generated = install(GPUS["h100"]), []

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda:0")

    with FakeTensorMode(), torch.no_grad():
        for slots, positions in chunks:
            before = len(compiler.kernels)
            rows, labels = empty(slots, dtype=torch.int64), empty(slots, 1, dtype=torch.int64)
            weights = empty(slots, 1), empty(slots, 1)
            found = differentiate_compiled(
                empty(slots, VOCAB), *(empty(positions, VOCAB) for _ in range(2)), rows, labels, *weights
            )
            assert [each.shape for each in found[:3]] == [(slots, VOCAB), (slots,), (slots,)]
            generated.append(len(compiler.kernels) - before)
    sources = [source for _, source in compiler.kernels]
    return {"generated": generated, "sources": sources, "needs": needs_of(compiler.kernels, GPUS["h100"])}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
