"""Map one shard file: tensors that are views of the file, read only when touched.

The header is parsed here rather than by the safetensors library because the plan already says what it
must be: anything else is refused before a byte of data is looked at, and the mapping stays ours.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.codecs import TensorSpec
from pipeline.errors import CacheError

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8"}
# A header lists a few hundred layers at most, at about 100 bytes each.
MAX_HEADER_BYTES = 2**20


def map_shard(path: Path, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Map `path` and return its tensors as views into the file.

    The mapping is private (copy on write), so nothing can reach the file, and it lives as long as
    any view does.

    Raises:
        CacheError: missing, truncated, or not holding exactly the tensors of `specs`.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: run `dspark capture` again to rewrite it") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} can't be mapped ({error}): the cache is damaged") from None
    offsets = _read_header(path, data, specs)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = math.prod(shape)
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=offsets[name]).view(shape)
    return tensors


def _read_header(path: Path, data: mmap.mmap, specs: dict[str, TensorSpec]) -> dict[str, int]:
    """Each tensor's absolute offset, after checking that the header says exactly what the plan says."""

    def damaged(reason: str) -> CacheError:
        return CacheError(f"{path} is damaged ({reason}): remove the cache and capture again")

    if len(data) < 8:
        raise damaged("shorter than a header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise damaged(f"its header claims {length} bytes")
    text = data[8 : 8 + length]
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    if not text.startswith(b"{"):
        raise damaged("its header does not start with a brace")
    if not isinstance(header, dict) or header.keys() != specs.keys():
        raise damaged("its tensors are not those of the plan")
    spans = []
    for name, (dtype, shape) in specs.items():
        entry = header[name]
        size = math.prod(shape) * dtype.itemsize
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"tensor {name} is not described by dtype, shape and data_offsets")
        if entry["dtype"] != DTYPE_NAMES[dtype] or not _is_sizes(entry["shape"], list(shape)):
            raise damaged(f"tensor {name} is not {DTYPE_NAMES[dtype]} {list(shape)}")
        offsets = entry["data_offsets"]
        if not _is_sizes(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= len(data):
            raise damaged(f"tensor {name} has no valid offsets")
        if offsets[1] - offsets[0] != size:
            raise damaged(f"tensor {name} spans {offsets[1] - offsets[0]} bytes, expected {size}")
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise damaged(f"a gap or an overlap before tensor {name}")
        end = stop
    if 8 + length + end != len(data):
        raise damaged(f"{len(data)} bytes long, expected {8 + length + end}")
    return {name: 8 + length + start for start, _, name in spans}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two equal ones, readers could follow different ones."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _is_sizes(value: Any, expected: list[int] | None = None) -> bool:
    """Whether a JSON value is a list of integers (9.0 is none), and the expected one if there is one."""
    sizes = isinstance(value, list) and all(type(n) is int for n in value)
    return sizes and (expected is None or value == expected)
