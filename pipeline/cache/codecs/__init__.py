"""Codecs: rows of states to bytes and back.

A codec encodes rows `[n, H]` as one or more named tensors with `n` rows each, and decodes them. Every row is
encoded by itself, with elementwise operations that round once each. So a decoded row depends on no other row
and is the same on every device. FORMAT.md specifies the bytes of each codec.

To add a codec: write a small frozen dataclass that subclasses `Codec`, put it in `CODECS` and specify it in
FORMAT.md. Commands offer it, price it and rank it by the facts it carries. Importing this imports no torch.
"""

from __future__ import annotations

from pipeline.cache.codecs.base import Codec, Statistics, TensorSpec, bits_per_value
from pipeline.cache.codecs.grouped import LM3, NF4
from pipeline.cache.codecs.plain import BFloat16, Float16, Float32
from pipeline.cache.codecs.scaled import FP8, Int8
from pipeline.errors import CacheError

# Every codec by name, in the order of menus and tables.
CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (BFloat16(), Float16(), Float32(), FP8(), Int8(), NF4(), LM3())
}


def get_codec(name: str) -> Codec:
    """Return the codec of that name. Raises CacheError, naming the known ones."""
    if name not in CODECS:
        raise CacheError(
            f"unknown codec {name!r}: this version knows {', '.join(CODECS)}; update dspark-pipeline"
        )
    return CODECS[name]


__all__ = ["CODECS", "Codec", "Statistics", "TensorSpec", "bits_per_value", "get_codec"]
