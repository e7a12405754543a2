"""What operations allocate, for tests of how memory grows."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that any operation of this thread returns."""

    largest = 0
    """Its bytes."""
    made_by = ""
    """The operation and the tensor's shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > self.largest:
                self.largest = tensor.untyped_storage().nbytes()
                self.made_by = f"{function} {tuple(tensor.shape)}"
        return out
