"""Sections `codecs`, `loader` and `capture`: the target's states to the disk and back."""

from __future__ import annotations

import shutil

import numpy as np
import torch

from benchmarks import codecs as codec_speed
from benchmarks import loader as reading
from benchmarks.capture import GPU, QWEN3_4B, Row, capture_rows
from benchmarks.gpu.figures import Figure, Limit, SkipSection, judged
from benchmarks.gpu.place import FULL, Place
from benchmarks.page_cache import warm
from pipeline.cache import CacheReader
from pipeline.cache.tools.convert import convert
from pipeline.options import DEFAULT_CONTEXT_CODEC, DEFAULT_LAST_CODEC
from pipeline.quiet import quiet_transformers
from train.data.loader import load_encoded_batch
from train.data.packing import epoch_packs
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors

CUDA = torch.device("cuda", 0)
# A micro-batch at Qwen3-4B's shape takes 126 MB of bf16 states, and an H100 works on it for about 60 ms.
NEEDED_GB = 2.1
TINY_TARGET = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def codecs(place: Place) -> list[Figure]:
    """Measure encoding and decoding on the device: decoding may cost a tenth of a training step."""
    place = place.sized()
    rows = codec_speed.speed_rows(CUDA, *place.pick((16384, 2560), (16384, 2560), (32, 128)))
    place.record("codecs", rows)
    enough = Limit(at_least=10 * NEEDED_GB, speed=True)
    limits = {"decode": enough, "encode": enough} if place.size == FULL else {}  # a smaller GPU trains slower
    return judged(rows, limits, pretend=place.pretend)


def loader(place: Place) -> list[Figure]:
    """Read a cache from the page cache to the device, exact and with the default codecs."""
    place = place.sized()
    total, tokens = place.pick((10**9, 4096), (10**9, 4096), (10**5, 4096))
    exact = reading.make(place.folder / "bf16", total)
    default = place.folder / "default"
    convert(exact, default, context_codec=DEFAULT_CONTEXT_CODEC, last_codec=DEFAULT_LAST_CODEC)
    rows: list[Row] = []
    for name, path in (("bf16", exact), (f"{DEFAULT_CONTEXT_CODEC}+{DEFAULT_LAST_CODEC}", default)):
        warm(path)
        reader = CacheReader(path)
        case = f"{name}, warm, to the GPU"
        epochs = place.pick(3, 3, 1)
        (seconds,) = reading.medians(
            place.pick(5, 5, 1),
            lambda r=reader, e=epochs: reading.one_pass(
                r, r.layer_ids, epochs=e, device=CUDA, batch_tokens=tokens
            ),
        )
        rows += [
            (case, "read", reading.state_bytes(reader, reader.layer_ids) / seconds / 1e9, "GB/s of bf16")
        ]
        rows += [(case, "read", int(reader.lengths.sum()) / seconds, "tokens/s")]
        rows += [(case, "page-locked", pinned_share(reader, tokens), "share of bytes")]
    place.record("loader", rows)
    limits = {"page-locked": Limit(at_least=1.0)}
    if place.size == FULL:
        limits["GB/s of bf16"] = Limit(at_least=NEEDED_GB, speed=True)
    return judged(rows, limits, pretend=place.pretend)


def pinned_share(reader: CacheReader, batch_tokens: int) -> float:
    """Return the share of a batch's bytes that lie in page-locked memory before they are copied."""
    pack = epoch_packs(reader.lengths, batch_tokens, 0, 0)[0]
    collate = collate_anchors(random_anchors(reading.ANCHORS, 0, 0))
    batch = load_encoded_batch(reader, np.asarray(pack).tolist(), reader.layer_ids, batch_tokens, collate)
    tensors = [each for each in batch.tensors().values() if isinstance(each, torch.Tensor)]
    tensors += batch.last_hidden.values()
    tensors += [tensor for parts in batch.context.values() for tensor in parts.values()]
    pinned = sum(tensor.nbytes for tensor in tensors if tensor.is_pinned())
    return pinned / sum(tensor.nbytes for tensor in tensors)


def capture(place: Place) -> list[Figure]:
    """Compare capture with the bare forward at Qwen3-4B's shape, with fewer layers where memory is short.

    Keeps one cache for the section `train`.
    """
    place = place.sized()
    quiet_transformers()
    name, shape, _, longest, mean_log, batch_tokens, shard_tokens, _ = GPU
    fewer = {**QWEN3_4B, "num_hidden_layers": 12}
    full = (name, shape, 200, longest, mean_log, batch_tokens, shard_tokens, 2)
    small = (f"{name}, 12 layers", fewer, 120, longest, mean_log, 8192, shard_tokens, 2)
    tiny = ("tiny shape", TINY_TARGET, 12, 128, 3.5, 256, 512, 1)
    case = place.pick(full, small, tiny)
    check_disk(place, case[1])
    rows = capture_rows(*case, device=CUDA, folder=place.folder)
    shutil.rmtree(place.folder / "target")
    for path in place.folder.glob("cache-*"):
        shutil.rmtree(path)
    place.record("capture", rows)
    limit = Limit(at_most=1.15, speed=True)
    return judged(rows, {"capture / bare forward": limit}, pretend=place.pretend)


def check_disk(place: Place, shape: dict[str, int]) -> None:
    """Raise SkipSection if the disk can't hold the target and its caches."""
    weights = 2 * shape["vocab_size"] * shape["hidden_size"] + shape["num_hidden_layers"] * (
        2 * shape["hidden_size"] * (3 * shape["intermediate_size"] + 3 * shape["hidden_size"])
    )
    needed = weights + place.pick(12 * 10**9, 8 * 10**9, 10**7)
    free = shutil.disk_usage(place.folder).free
    if free < needed:
        raise SkipSection(
            f"needs {needed / 1e9:.0f} GB of disk at {place.folder}, {free / 1e9:.0f} GB are free"
        )
