"""Compile flex_attention for GPUs that are not here, and print the shared memory that its kernels need.

python -m tests.gpu_less.mocked.flex rtx3090 '[["bfloat16", 128]]'
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu_less.mocked.gpu import GPUS, install
from tests.gpu_less.mocked.machine_code import needs_of
from train.draft.blocks.attention import attend, flex_options
from train.draft.blocks.masks import flex_block_mask

BLOCKS, SIZE, TOKENS = 64, 7, 1024


def main(gpu: str, cases: list[tuple[str, int]]) -> list[list[int]]:
    """Return the bytes of each kernel, forward and backward, for each dtype and head dimension."""
    compiler, found = install(GPUS[gpu]), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda:0")
        for dtype, dim in cases:
            compiler.kernels.clear()
            anchors = torch.zeros(1, BLOCKS, dtype=torch.int64, device=device)
            mask = flex_block_mask(anchors, TOKENS, SIZE)
            queries = BLOCKS * SIZE
            states = [
                torch.empty(1, heads, length, dim, device=device, dtype=getattr(torch, dtype))
                for heads, length in ((32, queries), (8, TOKENS + queries), (8, TOKENS + queries))
            ]
            options = flex_options(dim, states[0].dtype, device)
            attend(*(state.requires_grad_() for state in states), mask, options).sum().backward()
            found.append([each for each in compiler.kernels if each[0].startswith("triton_tem")])
    needed = [needs_of(kernels, GPUS[gpu]) for kernels in found]
    return [[each["shared"] for each in kernels] for kernels in needed]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))), flush=True)
    os._exit(0)
