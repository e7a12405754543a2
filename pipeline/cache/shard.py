"""One shard file: lay it out in memory to be written, and map it to be read.

Both sides are ours rather than the safetensors library's because the plan already says what a shard holds. To
write one, its tensors are views of one buffer that is the file, header and all, and goes to disk without a
copy. To read one, anything but what the plan says is refused before a byte of data is looked at, and tensors
are views of the map, read only when touched.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.codecs import TensorSpec
from pipeline.errors import CacheError

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# How the safetensors library orders tensors in a file, from its last to its first.
DTYPE_ORDER = ("U8", "I8", "F8_E4M3", "F16", "BF16", "I32", "F32")
# Looked up once: every CDLL makes classes of its own.
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None)
# A header lists a few hundred layers at most, at about 100 bytes each.
MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class FileLayout:
    """A safetensors file that is yet to be: its first bytes, and where its tensors go."""

    header: bytes
    offsets: dict[str, int]
    """Where each tensor begins in the file; a multiple of 8 for the first, of its dtype's size for all."""
    size: int
    """Bytes of the whole file."""


def file_layout(specs: dict[str, TensorSpec]) -> FileLayout:
    """Lay out a safetensors file as the library does: tensors of wider dtypes first, then by name."""
    ranks = {name: rank for rank, name in enumerate(DTYPE_ORDER)}
    entries, ends = {}, [0]
    for name, (dtype, shape) in sorted(specs.items(), key=lambda s: (-ranks[DTYPE_NAMES[s[1][0]]], s[0])):
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    return FileLayout(struct.pack("<Q", len(text)) + text, offsets, start + ends[-1])


@dataclass(frozen=True)
class ShardBuffer:
    """A shard file in memory, to be filled through its tensors."""

    memory: Tensor
    """`[size]` uint8 on the CPU: the bytes of the file."""
    tensors: dict[str, Tensor]
    """Views of it, by name."""

    def bytes(self) -> memoryview:
        """The file."""
        return memoryview(self.memory.numpy())


def shard_buffer(specs: dict[str, TensorSpec], memory: Tensor | None = None) -> ShardBuffer:
    """A shard to be filled.

    Args:
        memory: uint8 on the CPU, at least as large as the file, to be reused; None allocates.
    """
    layout = file_layout(specs)
    memory = torch.empty(layout.size, dtype=torch.uint8) if memory is None else memory[: layout.size]
    memory[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        start = layout.offsets[name]
        tensors[name] = memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    return ShardBuffer(memory, tensors)


def file_bytes(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file of tensors that are in memory already, in pieces and without copies."""
    layout = file_layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    ordered = sorted(tensors, key=lambda name: layout.offsets[name])
    views = [tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy() for name in ordered]
    return [layout.header, *map(memoryview, views)]


@dataclass(frozen=True)
class MappedShard:
    """A shard file, open and mapped. The map lives as long as any view of it does."""

    tensors: dict[str, Tensor]
    """Views into the file, by name."""
    path: Path
    descriptor: int
    """The open file; closed with this object."""
    start: int
    """Where the first of the tensors begins in the file."""

    def read_ahead(self, view: Tensor) -> None:
        """Have the kernel start to read what `view` shows from the disk, unless it has its beginning already.

        For what is cached the asking takes a tenth of the time that reading it takes.
        """
        try:
            cached = os.preadv(self.descriptor, [bytearray(1)], self._offset(view), os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # it would block, or there is no way to ask
            cached = False
        if not cached:
            advise(mmap.MADV_WILLNEED, view)

    def _offset(self, view: Tensor) -> int:
        """Where a view begins in the file."""
        tensor = next(iter(self.tensors.values()))
        return self.start + view.data_ptr() - tensor.data_ptr()

    def read(self, view: Tensor, out: Tensor) -> None:
        """Copy what `view` shows into contiguous CPU memory of the same bytes.

        The kernel copies from the page cache, which spares the page faults of reading through the map: they
        take as long as the copying.

        Raises:
            CacheError: the file has become shorter.
        """
        offset, left = self._offset(view), memoryview(out.view(-1).view(torch.uint8).numpy())
        while len(left):
            count = os.preadv(self.descriptor, [left], offset)
            if not count:
                raise CacheError(f"{self.path} is damaged: it ends at {offset} while it is read")
            left, offset = left[count:], offset + count


def map_shard(path: Path, specs: dict[str, TensorSpec], *, random: bool = False) -> MappedShard:
    """Map `path` after checking that it holds what it should.

    The mapping is private (copy on write), so nothing can reach the file.

    Args:
        random: the file will be read here and there: the kernel then reads what is touched, and not the
            megabytes around it.

    Raises:
        CacheError: missing, truncated, or not holding exactly the tensors of `specs`.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            descriptor = os.dup(file.fileno())
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: run `dspark capture` again to rewrite it") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} can't be mapped ({error}): the cache is damaged") from None
    if random and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_RANDOM)
    try:
        offsets = _read_header(path, data, specs)
    except CacheError:
        os.close(descriptor)
        raise
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = math.prod(shape)
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=offsets[name]).view(shape)
    shard = MappedShard(tensors, path, descriptor, offsets[next(iter(tensors))])
    weakref.finalize(shard, os.close, descriptor)
    return shard


def advise(advice: int, *views: Tensor) -> None:
    """Tell the kernel how part of a mapped shard is used; it does nothing where there is no madvise.

    Args:
        views: of one shard's tensors by `map_shard`, and of nothing else, because what is not needed is
            dropped: everything from the first one's beginning to the last one's end.
        advice: mmap's `MADV_WILLNEED`, or `MADV_DONTNEED`, after which it no longer counts as
            this process's memory and is mapped again when touched.
    """
    filled = [view for view in views if view.numel()]
    if _MADVISE is None or not filled:
        return
    page = mmap.PAGESIZE
    first = min(view.data_ptr() for view in filled)
    last = max(view.data_ptr() + view.nbytes for view in filled)
    if advice == mmap.MADV_DONTNEED:  # whole pages only: those at the ends have neighbours
        first, last = -(-first // page) * page, last // page * page
    else:
        first = first // page * page
    if last > first:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _read_header(path: Path, data: mmap.mmap, specs: dict[str, TensorSpec]) -> dict[str, int]:
    """Each tensor's absolute offset, after checking that the header says exactly what the plan says."""

    def damaged(reason: str) -> CacheError:
        return CacheError(
            f"{path} is damaged ({reason}): `dspark verify --repair` sets it aside for capture to rewrite"
        )

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
