"""Caches written by the project's own writer from plain values, and every byte of a cache for comparing."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import (
    CacheReader,
    CacheWriter,
    DataIdentity,
    FeatureIdentity,
    Identity,
    SampleFacts,
    TargetIdentity,
    TokenizerIdentity,
    build_index,
    plan_shards,
)

VOCAB = 17


def make_identity(
    layers: Sequence[int] = (0, 2), *, hidden: int = 4, shard_tokens: int = 10, num_layers: int = 7, **target
) -> Identity:
    values = {
        "name": "tiny",
        "weights": "ab" * 32,
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "hidden_size": hidden,
        "num_layers": num_layers,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
        "tied_embeddings": True,
        "embedding_scale": 1.0,
        "logit_scale": 1.0,
        "final_logit_softcapping": None,
    }
    return Identity(
        target=TargetIdentity(**{**values, **target}),
        tokenizer=TokenizerIdentity(
            sha256="cd" * 32,
            chat_template_sha256="ef" * 32,
            length=VOCAB,
            mask_token_id=None,
            unk_token_id=0,
            pad_token_id=2,
        ),
        data=DataIdentity(sources=("chats.jsonl",), sha256="01" * 32, settings={"max_length": "64"}),
        features=FeatureIdentity(layer_ids=tuple(layers), context_codec="bf16", last_codec="bf16"),
        shard_tokens=shard_tokens,
        batch_tokens=32,
    )


@dataclass
class Sample:
    """S tokens; `rows` are the label positions, found by looking at every position."""

    ids: list[int]
    mask: list[int]
    context: dict[int, Tensor]  # layer id: [S, H] bf16
    last: Tensor  # [S, H] bf16, of which only `rows` are stored

    @property
    def name(self) -> bytes:
        """FORMAT.md's rule 3."""
        content = struct.pack(f"<{len(self.ids)}i", *self.ids) + bytes(self.mask)
        return hashlib.sha256(content).digest()[:16]

    @property
    def rows(self) -> list[int]:
        return [t - 1 for t in range(1, len(self.mask)) if self.mask[t] == 1]

    @property
    def candidates(self) -> list[int]:
        return [p for p in range(len(self.mask) - 1) if self.mask[p] == 1 and self.mask[p + 1] == 1]


def make_sample(mask: Sequence[int], layers: Sequence[int], hidden: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def states() -> Tensor:
        return torch.randn(len(mask), hidden, generator=generator).bfloat16()

    ids = torch.randint(VOCAB, (len(mask),), generator=generator).tolist()
    return Sample(ids, list(mask), {layer: states() for layer in layers}, states())


class Writing:
    """One capture's worth of calls on a CacheWriter, to be made in any order and by any number of writers.

    Args:
        shared: first rows of context that each sample has from the one before; None for none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        identity: Identity,
        names: Sequence[bytes] | None = None,
        shared: Sequence[int] | None = None,
    ):
        self.samples, self.identity = samples, identity
        self.shared = [0] * len(samples) if shared is None else shared
        self.shards = plan_shards([len(s.ids) for s in samples], identity.shard_tokens)
        names = names or [s.name for s in samples]
        facts = SampleFacts(
            sample_ids=np.frombuffer(b"".join(names), dtype=np.uint8).reshape(-1, 16),
            sources=np.zeros(len(samples), dtype=np.int32),
            source_rows=np.arange(len(samples)),
            lengths=np.array([len(s.ids) for s in samples]),
            last_rows=np.array([len(s.rows) for s in samples]),
            candidates=np.array([len(s.candidates) for s in samples]),
            shared=None if shared is None else np.array(shared),
        )
        self.index, self.plan = build_index(facts, self.shards)

    def open(self, path: Path) -> CacheWriter:
        return CacheWriter(path, self.identity, self.plan, self.index, {"read": len(self.samples)})

    def write_shard(self, writer: CacheWriter, shard: int) -> None:
        """Fill a shard and publish it."""
        buffer = writer.new_shard(shard)
        tensors = self.tensors(shard)
        assert tensors.keys() == buffer.tensors.keys()
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (buffer.tensors[name].dtype, buffer.tensors[name].shape)
            buffer.tensors[name].copy_(tensor)
        writer.write_shard(shard, buffer, {"teacher_tv": (0.25, 0.5)})

    def tensors(self, shard: int) -> dict[str, Tensor]:
        members = [self.samples[i] for i in self.shards[shard]]
        every = self.identity.features.hidden == "all-tokens"
        out = {
            "input_ids": torch.tensor([t for s in members for t in s.ids], dtype=torch.int32),
            "loss_mask": torch.tensor([m for s in members for m in s.mask], dtype=torch.uint8),
            "last_hidden": torch.cat([s.last if every else s.last[s.rows] for s in members]),
        }
        for layer in self.identity.features.layer_ids:
            own = zip(members, (self.shared[i] for i in self.shards[shard]), strict=True)
            out[f"context.{layer}"] = torch.cat([s.context[layer][start:] for s, start in own])
        return out

    def frozen(self) -> dict[str, Tensor]:
        target = self.identity.target
        return {
            "embed_tokens.weight": torch.arange(target.vocab_size * target.hidden_size)
            .remainder(251)
            .view(target.vocab_size, target.hidden_size)
            .bfloat16()
        }

    def finish(self, writer: CacheWriter) -> None:
        writer.write_target({"config.json": b"{}"}, self.frozen())
        for shard in writer.pending():
            self.write_shard(writer, shard)
        assert writer.finalise() is not None

    def write(self, path: Path) -> Path:
        self.finish(self.open(path))
        return path


def fill(writing: Writing, path: Path, wait: Callable[[], object] = lambda: None) -> bool:
    """What every process of a capture does; whether the cache was complete when it left."""
    wait()
    writer = writing.open(path)
    if not writer.complete:
        if not writer.target_written():
            writer.write_target({"config.json": b"{}"}, writing.frozen())
        for shard in writer.pending():
            writing.write_shard(writer, shard)
    return writer.finalise() is not None


def small_cache(path: Path, *, count: int = 7, layers: Sequence[int] = (0, 2, 5)) -> Path:
    """Several shards of several samples."""
    masks = [[0] * (i % 3) + [1, 1] + [0, 1] * (i % 2) for i in range(count)]
    samples = [make_sample(mask, layers, 4, seed=i) for i, mask in enumerate(masks)]
    return Writing(samples, make_identity(layers)).write(path)


def sharing_cache(path: Path) -> Path:
    """Two shards, whose samples have their first rows from the ones before."""
    samples = [make_sample([0, 0, 0, 0, 1, 1], (0, 2, 5), 4, seed=i) for i in range(6)]
    shared = [0, 4, 2, 0, 1, 3]
    for before, sample, rows in zip(samples, samples[1:], shared[1:], strict=False):
        sample.ids[:rows] = before.ids[:rows]
        for layer in sample.context:
            sample.context[layer][:rows] = before.context[layer][:rows]
    identity = make_identity((0, 2, 5), shard_tokens=18)
    features = dataclasses.replace(identity.features, prefixes="once")
    return Writing(samples, dataclasses.replace(identity, features=features), shared=shared).write(path)


def every_byte(path: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones too."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def read_all(path: Path) -> list:
    """Open a cache and read everything training could: every sample, and the frozen weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SGLang", category=UserWarning)
        reader = CacheReader(path)
        reader.check_shards()
    out: list = []
    for i in range(len(reader)):
        s = reader.read(i)
        bits = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (s.context, s.last_hidden)]
        tokens = (s.input_ids.tolist(), s.loss_mask.tolist(), s.last_positions.tolist())
        out.append((s.sample_id, *tokens, *bits, int(reader.candidates[i]), int(reader.lengths[i])))
    frozen = reader.frozen()
    out += [(name, frozen[name].float().numpy().astype(np.float64).tobytes()) for name in sorted(frozen)]
    return out


def make_writing(samples: list[list[int]], layers: tuple[int, ...] = (0, 2), limit: int = 10) -> Writing:
    made = [make_sample(mask, layers, 4, seed=i) for i, mask in enumerate(samples)]
    return Writing(made, make_identity(layers, shard_tokens=limit))


MASKS = [[0, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1, 1], [1, 1], [0, 1, 1, 0, 1, 1], [1, 1, 1]]
