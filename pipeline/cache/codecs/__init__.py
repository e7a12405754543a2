"""How feature rows become bytes and back.

A codec turns rows `[n, H]` into one or more named tensors that a shard can hold, each with `n` rows, and
back. Every row is encoded by itself, with elementwise operations that round once each: a decoded row depends
on no other row, and is the same on every device. To add a codec: write a small frozen dataclass with the
members of `Codec` and put it in `CODECS`. FORMAT.md says what each one's bytes mean.
"""

from __future__ import annotations

from pipeline.cache.codecs.base import Codec, Statistics, TensorSpec, bits_per_value
from pipeline.cache.codecs.grouped import LM3, NF4
from pipeline.cache.codecs.plain import BFloat16, Float16, Float32
from pipeline.cache.codecs.scaled import FP8, Int8
from pipeline.errors import CacheError

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (BFloat16(), Float16(), Float32(), FP8(), Int8(), NF4(), LM3())
}


def get_codec(name: str) -> Codec:
    """Look a codec up by name. Raises CacheError naming the known ones."""
    if name not in CODECS:
        raise CacheError(
            f"unknown codec {name!r}: this version knows {', '.join(CODECS)}; update the package"
        )
    return CODECS[name]


__all__ = ["CODECS", "Codec", "Statistics", "TensorSpec", "bits_per_value", "get_codec"]
