"""One shard file: laid out in memory to be written, and mapped to be read.

This replaces the safetensors library because the plan already gives a shard's content. To write a shard, its
tensors are views of one buffer, which is the whole file and goes to disk without a copy. To read one, any
difference from the plan is refused before data is read, and tensors are views of the map, read when touched.
"""

from __future__ import annotations

import ctypes
import hashlib
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
# Dtypes in the order of the safetensors library, which puts the last of them first in a file.
DTYPE_ORDER = ("U8", "I8", "F8_E4M3", "F16", "BF16", "I32", "F32")
# Looked up once, because every CDLL creates new classes.
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None)
# A header has at most a few hundred layers, of about 100 bytes each.
MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class FileLayout:
    """Layout of a safetensors file: its first bytes, and the offsets of its tensors."""

    header: bytes
    offsets: dict[str, int]
    """Each tensor's first byte in the file: a multiple of 8 for the first, of its dtype's size for all."""
    size: int
    """Size of the whole file in bytes."""


def file_layout(specs: dict[str, TensorSpec]) -> FileLayout:
    """Lay out a safetensors file like the library: wider dtypes first, then by name."""
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
    """Views of `memory`, by name."""

    def bytes(self) -> memoryview:
        """Return the file's bytes, a view."""
        return memoryview(self.memory.numpy())


def shard_buffer(specs: dict[str, TensorSpec], memory: Tensor | None = None) -> ShardBuffer:
    """Return a shard to be filled.

    Args:
        memory: reused for the file: uint8 on the CPU, at least as large; None allocates.
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
    """Return a safetensors file of these tensors, in pieces and without copies."""
    layout = file_layout({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    ordered = sorted(tensors, key=lambda name: layout.offsets[name])
    views = [tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy() for name in ordered]
    return [layout.header, *map(memoryview, views)]


@dataclass(frozen=True)
class MappedShard:
    """A shard file, open and mapped. The map lives as long as any view of it."""

    tensors: dict[str, Tensor]
    """Views into the file, by name."""
    path: Path
    descriptor: int
    """The open file, closed with this object."""
    start: int
    """Offset in the file of the first entry of `tensors`."""
    direct: int | None = None
    """The file open for reads past the page cache; None if it was not asked for, or has none."""

    def read_ahead(self, view: Tensor) -> None:
        """Ask the kernel to read the file under `view` ahead, unless its first byte is in the page cache.

        Without that test, the request for cached pages takes a tenth of the time of reading them.
        """
        try:
            cached = os.preadv(self.descriptor, [bytearray(1)], self.offset(view), os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):  # it would block, or this system can't tell
            cached = False
        if not cached:
            advise(mmap.MADV_WILLNEED, view)

    def offset(self, view: Tensor) -> int:
        """Return a view's offset in the file."""
        tensor = next(iter(self.tensors.values()))
        return self.start + view.data_ptr() - tensor.data_ptr()

    def read(self, view: Tensor, out: Tensor) -> None:
        """Copy the bytes of `view` from the file into contiguous CPU memory of the same size.

        The kernel copies from the page cache. That avoids the page faults of reading through the map, which
        take as long as the copy.

        Raises:
            CacheError: the file has become shorter.
        """
        offset, left = self.offset(view), memoryview(out.view(-1).view(torch.uint8).numpy())
        while len(left):
            count = os.preadv(self.descriptor, [left], offset)
            if not count:
                raise cut_short(self.path, offset)
            left, offset = left[count:], offset + count


def cut_short(path: Path, size: int) -> CacheError:
    """Return the error of a file that ended before its time."""
    return CacheError(
        f"{path} is damaged (it was cut to {size} bytes while it was read): "
        "`dspark verify --repair` sets it aside for capture to rewrite"
    )


def open_direct(path: Path) -> int | None:
    """Open a file for reads past the page cache; None if its file system or this system has none."""
    flag = getattr(os, "O_DIRECT", None)
    try:
        return None if flag is None else os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None


def map_shard(
    path: Path, specs: dict[str, TensorSpec], *, random: bool = False, direct: bool = False
) -> MappedShard:
    """Map `path` after checking that it holds exactly the tensors of `specs`.

    The mapping is private (copy on write), so no write can reach the file.

    Args:
        random: whether it will be read at random places. The kernel then reads only the pages touched, not
            the megabytes around them.
        direct: open it for reads past the page cache too, where that is possible.

    Raises:
        CacheError: missing, truncated, or with other tensors.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            descriptor = os.dup(file.fileno())
    except FileNotFoundError:
        raise CacheError(f"{path} is missing: run `dspark capture` again to rewrite it") from None
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path} can't be mapped ({error}): `dspark verify --repair` sets it aside for capture to rewrite"
        ) from None
    if random and hasattr(data, "madvise"):
        data.madvise(mmap.MADV_RANDOM)
    try:
        offsets = {n: start for n, (start, _) in read_header(path, data, len(data), specs).items()}
    except CacheError:
        os.close(descriptor)
        raise
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = math.prod(shape)
        tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=offsets[name]).view(shape)
    past = open_direct(path) if direct else None
    shard = MappedShard(tensors, path, descriptor, offsets[next(iter(tensors))], past)
    for opened in [descriptor] if past is None else [descriptor, past]:
        weakref.finalize(shard, os.close, opened)
    return shard


def tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of the bytes of each of a shard's tensors, by name."""
    views = {name: tensor.flatten().view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(view).hexdigest() for name, view in views.items()}


def advise(advice: int, *views: Tensor) -> None:
    """Advise the kernel on the use of part of a mapped shard. Does nothing without madvise.

    Args:
        advice: mmap's `MADV_WILLNEED`, or `MADV_DONTNEED`, after which the pages no longer count as
            this process's memory and are mapped again when touched.
        views: of one shard's tensors by `map_shard` only: the advice holds for everything from the first
            one's start to the last one's end, and `MADV_DONTNEED` would drop other memory there.
    """
    filled = [view for view in views if view.numel()]
    if _MADVISE is None or not filled:
        return
    page = mmap.PAGESIZE
    first = min(view.data_ptr() for view in filled)
    last = max(view.data_ptr() + view.nbytes for view in filled)
    if advice == mmap.MADV_DONTNEED:  # whole pages only: the pages at both ends are shared with neighbours
        first, last = -(-first // page) * page, last // page * page
    else:
        first = first // page * page
    if last > first:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def read_header(
    path: Path | str, head: bytes | mmap.mmap, size: int, specs: dict[str, TensorSpec]
) -> dict[str, tuple[int, int]]:
    """Return each tensor's first byte in the file and its end, after checking a header against `specs`.

    Args:
        path: name of the file, for messages.
        head: the file's first bytes, the header's at least.
        size: bytes of the whole file.

    Raises:
        CacheError: the header does not describe exactly the tensors of `specs`.
    """

    def damaged(reason: str) -> CacheError:
        return CacheError(
            f"{path} is damaged ({reason}): `dspark verify --repair` sets it aside for capture to rewrite"
        )

    if size < 8:
        raise damaged("it is shorter than a header")
    (length,) = struct.unpack("<Q", head[:8])
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise damaged(f"its header claims {length} bytes")
    text = head[8 : 8 + length]
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON") from None
    if not text.startswith(b"{"):
        raise damaged("its header does not start with a brace")
    if not isinstance(header, dict) or header.keys() != specs.keys():
        raise damaged("its tensors differ from those of the plan")
    spans = []
    for name, (dtype, shape) in specs.items():
        entry = header[name]
        count = math.prod(shape) * dtype.itemsize
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"tensor {name} is not described by dtype, shape and data_offsets")
        if entry["dtype"] != DTYPE_NAMES[dtype] or not _is_sizes(entry["shape"], list(shape)):
            raise damaged(f"tensor {name} is not {DTYPE_NAMES[dtype]} {list(shape)}")
        offsets = entry["data_offsets"]
        if not _is_sizes(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= size:
            raise damaged(f"tensor {name} has no valid offsets")
        if offsets[1] - offsets[0] != count:
            raise damaged(f"tensor {name} spans {offsets[1] - offsets[0]} bytes, expected {count}")
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise damaged(f"a gap or an overlap before tensor {name}")
        end = stop
    if 8 + length + end != size:
        raise damaged(f"expected {8 + length + end} bytes, got {size}")
    return {name: (8 + length + start, 8 + length + stop) for start, stop, name in spans}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a repeated key, of which readers could take either value."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)


def _is_sizes(value: Any, expected: list[int] | None = None) -> bool:
    """Return whether a JSON value is a list of integers (9.0 is none), and the expected one if given."""
    sizes = isinstance(value, list) and all(type(n) is int for n in value)
    return sizes and (expected is None or value == expected)
