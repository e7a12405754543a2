"""Encode and decode rows on a GPU that is not there: every operation of every codec must exist on it.

    python -m tests.gpu_less.mocked.codecs

prints, for each codec, the operations that it runs on the GPU, as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.cache.codecs import CODECS, Statistics
from tests.gpu_less.mocked.gpu import GPUS, install

ROWS, WIDTH = 4096, 2560


class Operations(TorchDispatchMode):
    """Note the operations that run, and refuse those that mix the GPU's tensors with the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        tensors = [each for each in tree_leaves((arguments, named)) if isinstance(each, torch.Tensor)]
        places = {each.device.type for each in tensors if each.dim()}
        copies = operation.name() in ("aten::_to_copy", "aten::copy_")
        assert copies or len(places) <= 1, f"{operation}: {places}"
        self.names.add(operation.name())
        if operation.name() == "aten::_local_scalar_dense":  # the host asks for a value that nobody has
            return True
        return operation(*arguments, **(named or {}))


def main() -> dict[str, list[str]]:
    install(GPUS["h100"])
    device, found = torch.device("cuda:0"), {}
    with FakeTensorMode():
        rows = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device=device)
        mean, deviation = torch.empty(2, WIDTH, device=device)
        statistics = Statistics(mean, deviation)
        for name, codec in CODECS.items():
            with Operations() as operations:
                parts = codec.encode(rows, statistics)
                out = torch.empty(ROWS, 5, WIDTH, dtype=torch.bfloat16, device=device)[:, 1]
                codec.decode(parts, out, statistics)
            for part, (dtype, shape) in codec.specs(ROWS, WIDTH).items():
                assert parts[part].is_cuda
                assert (parts[part].dtype, tuple(parts[part].shape)) == (dtype, shape), part
            found[name] = sorted(operations.names)
    return found


if __name__ == "__main__":
    print(json.dumps(main()), flush=True)
    os._exit(0)
