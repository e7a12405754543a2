"""How feature rows become bytes and back.

A codec turns rows `[n, H]` into one or more named tensors a shard can hold, each with `n` rows, and
back. To add one: write a small frozen dataclass with these four members and put it in `CODECS`.
FORMAT.md says what each one's bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import CacheError

# A tensor in a shard: its torch dtype and its shape.
TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class Codec(Protocol):
    """What the writer and the reader ask of a codec."""

    name: str

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        """The stored tensors by suffix ("" is the main one) for `rows` rows of `width` values."""

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Encode `[n, H]` into the tensors that `specs` names."""

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """Decode the stored tensors of some rows into `out` `[n, H]`."""


@dataclass(frozen=True)
class BFloat16:
    """The rows themselves in bfloat16: exact for a bf16 target, and read without a copy."""

    name: str = "bf16"

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {"": (torch.bfloat16, (rows, width))}

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        return {"": rows.to(torch.bfloat16)}

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        out.copy_(parts[""])


CODECS: dict[str, Codec] = {codec.name: codec for codec in (BFloat16(),)}


def get_codec(name: str) -> Codec:
    """Look a codec up by name. Raises CacheError naming the known ones."""
    if name not in CODECS:
        raise CacheError(
            f"unknown codec {name!r}: this version knows {', '.join(CODECS)}; update the package"
        )
    return CODECS[name]
