"""A cache made by hand from FORMAT.md alone: struct, json, hashlib and pyarrow, no code of the project.

`HandCache` keeps the pieces (manifest, index columns, shard tensors, frozen weights) as plain values that a
test may bend before `save`; `save` packs them byte by byte. Three samples lie in two shards:

    sample 0, shard 0: tokens 3 1 4 1 5, mask 0 0 1 1 1 -> label rows 1 2 3, candidates 2 3
    sample 1, shard 0: tokens 9 2 6 5,   mask 1 1 0 1   -> label rows 0 2,   candidate 0
    sample 2, shard 1: tokens 3 5,       mask 1 1       -> label row 0,      candidate 0
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

HIDDEN = 3
LAYERS = (0, 2, 5)
NUM_LAYERS = 7
VOCAB = 11
TOKENS = ((3, 1, 4, 1, 5), (9, 2, 6, 5), (3, 5))
MASKS = ((0, 0, 1, 1, 1), (1, 1, 0, 1), (1, 1))
LABEL_ROWS = ((1, 2, 3), (0, 2), (0,))
CANDIDATES = (2, 1, 1)
SHARDS = ((0, 1), (2,))

Rows = list[list[float]]


def bf16(values: Rows) -> bytes:
    """Rule 9. Every value used here is exact in bf16, so rounding is cutting the low half off."""
    packed = b""
    for row in values:
        for value in row:
            four = struct.pack("<f", value)
            assert four[:2] == b"\0\0", f"{value} is not a bf16 number"
            packed += four[2:]
    return packed


def context_value(sample: int, layer: int, position: int, column: int) -> float:
    """A small number, another one for every place."""
    return (sample * 48 + LAYERS.index(layer) * 16 + position * 3 + column) * 0.5


def last_value(sample: int, position: int, column: int) -> float:
    return -(sample * 16 + position * 3 + column + 1) * 0.25


def context_rows(sample: int, layer: int) -> Rows:
    length = len(TOKENS[sample])
    return [[context_value(sample, layer, p, h) for h in range(HIDDEN)] for p in range(length)]


def last_rows(sample: int) -> Rows:
    return [[last_value(sample, p, h) for h in range(HIDDEN)] for p in LABEL_ROWS[sample]]


def embed_rows() -> Rows:
    return [[v + h * 0.125 for h in range(HIDDEN)] for v in range(VOCAB)]


def head_rows() -> Rows:
    return [[h - v * 0.5 for h in range(HIDDEN)] for v in range(VOCAB)]


def name_of(sample: int) -> bytes:
    """Rule 3."""
    length = len(TOKENS[sample])
    content = struct.pack(f"<{length}i", *TOKENS[sample]) + bytes(MASKS[sample])
    return hashlib.sha256(content).digest()[:16]


@dataclass
class Tensors:
    """A safetensors file in pieces: `entries` in file order, then anything a test wants to break."""

    entries: list[list[Any]]
    """`[name, dtype, shape, bytes]` each."""
    edit_header: Callable[[dict], Any] = lambda header: header
    edit_text: Callable[[bytes], bytes] = lambda text: text
    edit_file: Callable[[bytes], bytes] = lambda data: data

    def pack(self) -> bytes:
        header, body = {}, b""
        for name, dtype, shape, data in self.entries:
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(body), len(body) + len(data)],
            }
            body += data
        text = self.edit_text(json.dumps(self.edit_header(header)).encode())
        return self.edit_file(struct.pack("<Q", len(text)) + text + body)

    def entry(self, name: str) -> list[Any]:
        return next(entry for entry in self.entries if entry[0] == name)


def hand_shard(samples: tuple[int, ...]) -> Tensors:
    """Rules 4 to 7. Tensors lie in no particular order: the format asks for none, and for no alignment."""
    tokens = [token for s in samples for token in TOKENS[s]]
    mask = [m for s in samples for m in MASKS[s]]
    last = [row for s in samples for row in last_rows(s)]
    entries = [["loss_mask", "U8", [len(mask)], bytes(mask)]]
    for layer in (2, 0, 5):
        rows = [row for s in samples for row in context_rows(s, layer)]
        entries.append([f"context.{layer}", "BF16", [len(rows), HIDDEN], bf16(rows)])
    entries.append(["input_ids", "I32", [len(tokens)], struct.pack(f"<{len(tokens)}i", *tokens)])
    entries.append(["last_hidden", "BF16", [len(last), HIDDEN], bf16(last)])
    return Tensors(entries)


def hand_columns() -> dict[str, list]:
    """Rule 10, the values counted by hand."""
    return {
        "sample_id": [name_of(0), name_of(1), name_of(2)],
        "source": [0, 0, 1],
        "source_row": [0, 2, 0],
        "shard": [0, 0, 1],
        "token_start": [0, 5, 0],
        "length": [5, 4, 2],
        "last_start": [0, 3, 0],
        "last_rows": [3, 2, 1],
        "candidates": [2, 1, 1],
    }


SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("token_start", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("last_start", pa.int64(), nullable=False),
        pa.field("last_rows", pa.int32(), nullable=False),
        pa.field("candidates", pa.int32(), nullable=False),
    ]
)


def arrow_file(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def hand_manifest() -> dict[str, Any]:
    return {
        "format": "dspark-cache",
        "format_version": 1,
        "checksum": "0" * 64,
        "status": "complete",
        "created_by": "a hand",
        "identity": {
            "target": {
                "name": "tiny",
                "weights": "ab" * 32,
                "architecture": "LlamaForCausalLM",
                "model_type": "llama",
                "hidden_size": HIDDEN,
                "num_layers": NUM_LAYERS,
                "vocab_size": VOCAB,
                "dtype": "bfloat16",
                "tied_embeddings": False,
                "embedding_scale": 1.0,
                "logit_scale": 1.0,
                "final_logit_softcapping": None,
            },
            "tokenizer": {
                "sha256": "cd" * 32,
                "chat_template_sha256": "ef" * 32,
                "length": VOCAB,
                "mask_token_id": None,
                "unk_token_id": 0,
                "pad_token_id": 2,
            },
            "data": {
                "sources": ["chats.jsonl", "more.parquet"],
                "sha256": hashlib.sha256(b"".join(name_of(s) for s in range(3))).hexdigest(),
                "settings": {"max_length": "64"},
            },
            "features": {
                "layer_ids": list(LAYERS),
                "last_hidden": "post_norm",
                "context_codec": "bf16",
                "last_codec": "bf16",
            },
            "shard_tokens": 9,
            "batch_tokens": 32,
        },
        "rows": {"read": 4, "captured": 3, "no candidate": 1},
        "plan": {"samples": [2, 1], "tokens": [9, 2], "last_rows": [5, 1]},
        "fidelity": {"teacher_tv_mean": 0.001, "teacher_tv_max": 0.01, "teacher_tv_rows": 3.0},
        "shards": {"bytes": [], "sha256": []},
        "history": [],
        "files": [],
    }


def seal(data: bytes) -> bytes:
    """Rule 14: the hash of the whole file with zeros for the hash. A manifest without one stays as it is."""
    before, zeros, after = data.partition(b'"checksum": "' + b"0" * 64)
    digits = hashlib.sha256(data).hexdigest().encode() if zeros else b""
    return before + zeros[:-64] + digits + after


@dataclass
class HandCache:
    """The whole cache in pieces. Bend what a test needs, then `save`."""

    manifest: dict[str, Any] = field(default_factory=hand_manifest)
    columns: dict[str, list] = field(default_factory=hand_columns)
    shards: list[Tensors] = field(default_factory=lambda: [hand_shard(samples) for samples in SHARDS])
    frozen: Tensors = field(
        default_factory=lambda: Tensors(
            [
                ["lm_head.weight", "BF16", [VOCAB, HIDDEN], bf16(head_rows())],
                ["embed_tokens.weight", "BF16", [VOCAB, HIDDEN], bf16(embed_rows())],
            ]
        )
    )
    others: dict[str, bytes] = field(
        default_factory=lambda: {
            "target/config.json": b'{"model_type": "llama"}',
            "target/tokenizer.json": b"{}",
        }
    )
    edit_index: Callable[[pa.Table], bytes] = arrow_file
    edit_manifest: Callable[[dict], Any] = lambda manifest: manifest
    """Last word on the manifest, after its file table was filled in."""
    edit_json: Callable[[bytes], bytes] = lambda data: data
    """Last word on its text, but for the checksum."""
    edit_sealed: Callable[[bytes], bytes] = lambda data: data
    """Last word on its bytes."""

    def save(self, path: Path) -> Path:
        """Write the cache; the file table says what was written, however bent it is."""
        index = pa.table(self.columns, schema=SCHEMA)
        data = {"samples.arrow": self.edit_index(index), "target/frozen.safetensors": self.frozen.pack()}
        data |= self.others
        shards = [shard.pack() for shard in self.shards]
        manifest = copy.deepcopy(self.manifest)
        manifest["shards"] = {
            "bytes": [len(content) for content in shards],
            "sha256": [hashlib.sha256(content).hexdigest() for content in shards],
        }
        manifest["files"] = [
            {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(data.items())
        ]
        for folder in ("target", "shards"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        data |= {f"shards/{i:05d}.safetensors": content for i, content in enumerate(shards)}
        for name, content in data.items():
            (path / name).write_bytes(content)
        text = json.dumps(self.edit_manifest(manifest)).encode()
        (path / "manifest.json").write_bytes(self.edit_sealed(seal(self.edit_json(text))))
        return path
