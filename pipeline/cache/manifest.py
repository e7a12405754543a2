"""The manifest of a cache: identity, plan, file table, fidelity. See FORMAT.md.

It is written first with status "incomplete" and replaced last with status "complete". Without a complete
manifest there is no cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pipeline import config, files
from pipeline.cache.engine import EngineIdentity
from pipeline.cache.features import ONCE, FeatureIdentity
from pipeline.cache.optional import LEFT_OUT, plain_values
from pipeline.cache.skipped import Skipped, impossible
from pipeline.errors import CacheError, ConfigError
from pipeline.features import validate_target_layer_ids
from pipeline.text import one_line

FORMAT = "dspark-cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "samples.arrow"
PROGRESS = "progress"
STATISTICS = "statistics.safetensors"
FROZEN = "target/frozen.safetensors"
# Name, among the settings of the data, of the hash of prompts that the target answers while it is captured.
PROMPTS = "prompts"
# A manifest has about a hundred bytes per shard, in an object store a thousand: 500,000 shards stay below.
MAX_MANIFEST_BYTES = 512 * 2**20
UNSEALED = "0" * 64  # in place of a manifest's checksum while it is computed
MAX_COUNT = 2**48  # far above any real size, and sums of many still fit 64 bits


def shard_file(shard: int) -> str:
    """Return the only name that a shard can have, relative to the cache."""
    return f"shards/{shard:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """The frozen model whose states the cache holds."""

    name: str
    """Directory name or Hub id, for messages and the export's model card."""
    weights: str
    """SHA-256 over the weight files' names and bytes."""
    architecture: str
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    dtype: str
    """The dtype that the target computed in."""
    tied_embeddings: bool
    embedding_scale: float
    """Factor on token embeddings before the first layer."""
    logit_scale: float
    """Factor on the head's logits, before any soft-cap."""
    final_logit_softcapping: float | None


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """The tokenizer and chat template that turned conversations into token ids."""

    sha256: str
    chat_template_sha256: str
    length: int
    """Number of token ids the tokenizer can produce."""
    mask_token_id: int | None
    unk_token_id: int | None
    pad_token_id: int | None


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """The captured token sequences."""

    sources: tuple[str, ...]
    """File names without their directories, and Hub ids; the index has each sample's source."""
    sha256: str
    """SHA-256 over the sample ids in order, and so over all token ids and loss masks."""
    settings: dict[str, str]
    """The options by which rows became samples: form, supervision, lengths, selection."""

    @property
    def of_prompts(self) -> bool:
        """True while prompts are answered: the plan has bounds, and no index exists. See rule 22.1."""
        return self.settings.get(PROMPTS) == self.sha256


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides the bytes of a cache. Captures of equal identity give the same cache."""

    target: TargetIdentity
    tokenizer: TokenizerIdentity
    data: DataIdentity
    features: FeatureIdentity
    shard_tokens: int
    batch_tokens: int
    engine: EngineIdentity | None = dataclasses.field(default=None, metadata=LEFT_OUT)
    """None for transformers in one process. Two engines sum in other orders: their caches differ."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Samples, tokens and label rows of one shard."""

    samples: int
    tokens: int
    last_rows: int
    rows: int | None = None
    """Rows of context, where samples share some; None where every token has its own."""

    @property
    def context_rows(self) -> int:
        return self.tokens if self.rows is None else self.rows


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Samples, tokens and label rows of every shard, as columns: a hundred thousand shards open fast.

    `len(plan)` is the number of shards, `plan[shard]` one shard's row.
    """

    samples: tuple[int, ...]
    tokens: tuple[int, ...]
    last_rows: tuple[int, ...]
    rows: tuple[int, ...] = dataclasses.field(default=(), metadata=LEFT_OUT)
    """Rows of context, where samples share some; empty where every token has its own."""

    def __post_init__(self) -> None:
        if not len(self.samples) == len(self.tokens) == len(self.last_rows):
            raise ConfigError("expected columns of equal length")
        if self.rows and len(self.rows) != len(self.samples):
            raise ConfigError("expected columns of equal length")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, shard: int) -> ShardPlan:
        return ShardPlan(
            samples=self.samples[shard],
            tokens=self.tokens[shard],
            last_rows=self.last_rows[shard],
            rows=self.rows[shard] if self.rows else None,
        )

    @property
    def context_rows(self) -> tuple[int, ...]:
        """Rows of context of every shard."""
        return self.rows or self.tokens


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A finished file."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The finished shards' files in order; a shard's name follows from its number."""

    bytes: tuple[int, ...] = ()
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    checksum: str = UNSEALED
    """SHA-256 of the file's bytes with the 64 digits of this value as zeros; filled in by `to_json`."""
    status: Literal["incomplete", "complete"] = "incomplete"
    created_by: str
    identity: Identity
    rows: dict[str, int]
    """Counts of source rows: read, captured, and dropped by reason."""
    plan: Plan
    fidelity: dict[str, float]
    """Errors of the stored states against the target's, measured during capture."""
    history: tuple[dict[str, str], ...] = ()
    """The caches that this one was converted from, the first one first; empty for a captured one."""
    shards: ShardFiles = ShardFiles()
    """The shards; empty until the cache is complete."""
    files: tuple[FileRecord, ...] = ()
    """Every other file of the cache but the manifest; empty until the cache is complete."""
    skipped: Skipped = dataclasses.field(default_factory=Skipped, metadata=LEFT_OUT)
    """Samples that no reader returns; empty until the cache is complete."""
    tensors: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, metadata=LEFT_OUT)
    """SHA-256 of every shard's tensors, a column of shards by name; empty for a cache that has none."""

    @property
    def num_samples(self) -> int:
        """Samples that a reader returns."""
        return sum(self.plan.samples) - len(self.skipped)

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples that a reader returns."""
        return sum(self.plan.tokens) - sum(self.skipped.tokens)

    @property
    def num_last_rows(self) -> int:
        """Label rows of the samples that a reader returns."""
        return sum(self.plan.last_rows) - sum(self.skipped.last_rows)

    @property
    def num_files(self) -> int:
        return len(self.shards.bytes) + len(self.files)

    @property
    def num_bytes(self) -> int:
        return sum(self.shards.bytes) + sum(record.bytes for record in self.files)

    def all_files(self) -> Iterator[FileRecord]:
        """Yield every file of a complete cache but the manifest: the shards in order, then the others."""
        for shard, (size, digest) in enumerate(zip(self.shards.bytes, self.shards.sha256, strict=True)):
            yield FileRecord(file=shard_file(shard), bytes=size, sha256=digest)
        yield from self.files

    def to_json(self) -> bytes:
        """Return the file's bytes. Equal manifests give equal bytes."""
        values = plain_values(self) | {"checksum": UNSEALED}
        unsealed = (_dumps(values) + "\n").encode()
        return unsealed.replace(UNSEALED.encode(), hashlib.sha256(unsealed).hexdigest().encode(), 1)


def _dumps(value: Any, indent: str = "") -> str:
    """Format as JSON with sorted keys, one per line, and every list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, sort_keys=True)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_dumps(value[key], inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def read_manifest(cache: Path) -> Manifest:
    """Read and check `cache/manifest.json`.

    Raises:
        CacheError: missing, not a manifest, of another version, or with impossible values.
    """
    path = cache / MANIFEST
    try:
        found = stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        found = False
    if not found:
        raise CacheError(
            f"no cache at {config.show(str(cache))[1:-1]}: expected a plain file {MANIFEST} there; "
            "run `dspark capture` or `make capture` first"
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CacheError(f"{path} is not a manifest: it is larger than {MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"it can't be read: {one_line(error)}") from None
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """Check a manifest's bytes and return what they say.

    Args:
        path: name of the file, for messages.

    Raises:
        CacheError: see `read_manifest`.
    """
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it can't be read as JSON: {one_line(error)}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CacheError(f"{path} is not the manifest of a {FORMAT}: point --cache at a captured directory")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{path} has format version {config.show(version)}, this package reads version {FORMAT_VERSION}: "
            "use the version of dspark-pipeline that wrote it, or capture again"
        )
    if not _sealed(data, values.get("checksum")):
        raise _damaged(path, "its checksum differs from that of its content")
    try:
        manifest = config.build(Manifest, values, "manifest")
    except ConfigError as error:
        raise _damaged(path, f"{error}") from None
    _check(manifest, path)
    return manifest


def _damaged(path: Path | str, reason: str) -> CacheError:
    return CacheError(f"{path} is damaged ({reason}): restore it, or remove the cache and capture again")


def _sealed(data: bytes, checksum: Any) -> bool:
    """Return whether `checksum` is the SHA-256 of `data` with zeros in its place."""
    if not isinstance(checksum, str) or not is_sha256(checksum):
        return False
    unsealed = data.replace(checksum.encode(), UNSEALED.encode(), 1)
    return hashlib.sha256(unsealed).hexdigest() == checksum


def _check(manifest: Manifest, path: Path | str) -> None:
    """Refuse a manifest of the right types with impossible values. Raises CacheError."""
    target, features = manifest.identity.target, manifest.identity.features
    sizes = [target.hidden_size, target.num_layers, target.vocab_size]
    plan, shards = manifest.plan, manifest.shards
    if any(not 0 <= record.bytes <= MAX_COUNT for record in manifest.files):
        raise _damaged(path, "a size outside 0 to 2^48")
    for column in (sizes, plan.samples, plan.tokens, plan.last_rows, plan.rows, shards.bytes):
        sizes = [*sizes, *([min(column), max(column)] if column else [])]
    if min(sizes) < 1 or max(sizes) > MAX_COUNT or sum(plan.tokens) > MAX_COUNT:
        raise _damaged(path, "a size outside 1 to 2^48")
    shares = features.prefixes == ONCE
    if shares != bool(plan.rows) or any(map(operator.gt, plan.rows, plan.tokens)):
        raise _damaged(path, "its plan has other rows of context than its identity says")
    if reason := impossible(manifest.skipped, sum(plan.samples)):
        raise _damaged(path, reason)
    try:
        validate_target_layer_ids(features.layer_ids, target.num_layers)
    except ValueError as error:
        raise _damaged(path, f"{error}") from None
    for label in (target.name, *manifest.identity.data.sources):
        if label.startswith(("/", "\\", "~")) or label[1:2] == ":":
            raise _damaged(path, "it holds an absolute path")
    columns = manifest.tensors.values()
    if not all(map(is_sha256, [*shards.sha256, *(r.sha256 for r in manifest.files), *chain(*columns)])):
        raise _damaged(path, "it holds a hash that is no SHA-256")
    if manifest.status != "complete" and len(manifest.skipped):
        raise _damaged(path, "it skips samples and is incomplete")
    if any(len(column) != len(plan) or manifest.status != "complete" for column in columns):
        raise _damaged(path, "its hashes of tensors differ from its plan")
    if manifest.status == "complete":
        if not len(shards.bytes) == len(shards.sha256) == len(plan):
            raise _damaged(path, "its shards differ from those of its plan")
        expected = {MANIFEST, INDEX, FROZEN}
        allowed = {*expected, STATISTICS}
        listed = {record.file for record in manifest.files} | {MANIFEST}
        if len(listed) != len(manifest.files) + 1:
            raise _damaged(path, "its file table names a file twice")
        strangers = [name for name in listed - allowed if not is_target_file(name)]
        if expected - listed or strangers:
            wrong = sorted(expected - listed) or sorted(strangers)
            raise CacheError(
                f"{path} is damaged (its file table is wrong about {config.show(wrong[0])}): capture again"
            )


is_sha256 = re.compile("[0-9a-f]{64}").fullmatch


def is_target_file(name: str) -> bool:
    """Return whether a config or tokenizer file can have this name in a cache."""
    folder, _, rest = name.partition("/")
    plain = folder == "target" and rest not in ("", ".", "..") and not set(rest) & set("/\\\0")
    return plain and rest.isprintable() and not is_weights(rest)


def is_weights(name: str) -> bool:
    """Return whether a file name looks like model weights, which a cache must not hold."""
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"))


def write_manifest(cache: Path, manifest: Manifest) -> None:
    """Publish the manifest atomically."""
    files.publish_bytes(cache / MANIFEST, manifest.to_json())
