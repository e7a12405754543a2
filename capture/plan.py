"""What a capture will do and what it will cost, known before any weights are loaded: `dspark plan`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import torch

from capture.batching import CapturePlan, plan_capture
from capture.data.summary import data_lines
from capture.data.tokens import TokenizedData
from capture.example import with_example
from capture.options import DataOptions
from capture.prepare import open_data, prepare_data, row_tokenizer
from capture.shards.fill import pad
from capture.target import HFDSparkTargetModel
from pipeline.cache import (
    DataIdentity,
    FeatureIdentity,
    Identity,
    TargetIdentity,
    TokenizerIdentity,
    build_index,
    read_manifest,
)
from pipeline.cache import price as disk
from pipeline.cache.codecs import CODECS
from pipeline.cache.manifest import MANIFEST, Plan, refuse_another
from pipeline.cache.price import Price, cache_price, free_bytes, written_bytes
from pipeline.errors import CacheError
from pipeline.features import default_layer_ids, validate_target_layer_ids
from pipeline.hooks import input_device
from pipeline.options import DEFAULT_CONTEXT_CODEC, DEFAULT_LAST_CODEC
from pipeline.target_model.identity import tokenizer_identity
from pipeline.target_model.load import DTYPES, Target, open_target
from pipeline.target_model.options import TargetOptions
from pipeline.text import duration, size

PROBE_BATCHES = 6
# Codecs for context and last hidden whose price is told.
PRICED = tuple((name, name if codec.for_last else DEFAULT_LAST_CODEC) for name, codec in CODECS.items())


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What `dspark capture` and `dspark plan` were asked for."""

    target: TargetOptions
    data: DataOptions
    cache: Path
    layer_ids: tuple[int, ...] | None = None
    """None: an even spread of five, see `pipeline.features.default_layer_ids`."""
    batch_tokens: int = 4096
    """Padded tokens of one target forward."""
    shard_tokens: int = 32768
    """Tokens of a shard: 0.3 GB at Qwen3-4B's size, and 40,000 shards for the paper's 1.3M conversations."""
    context_codec: str = DEFAULT_CONTEXT_CODEC
    last_codec: str = DEFAULT_LAST_CODEC
    """How states are stored, names in `pipeline.cache.codecs.CODECS`."""
    force: bool = False
    """Whether to start though the disk can't hold the cache."""
    worker: str | None = None
    """Which of several plain processes this is, as 0/4."""


@dataclass(frozen=True, eq=False)
class PreparedCapture:
    """A capture that could begin: everything but the target's weights."""

    options: CaptureOptions
    target: Target
    shape: TargetIdentity
    """The target's identity, the hash of its weights left out."""
    tokenizer: TokenizerIdentity
    layer_ids: tuple[int, ...]
    data: TokenizedData
    data_identity: DataIdentity
    batching: CapturePlan
    index: pa.Table
    plan: Plan
    found: Identity | None
    """Of the cache that is in the directory already, if any."""

    def check_directory(self) -> None:
        """Refuse a directory with another capture in it, as far as can be told without hashing the weights.

        Raises:
            CacheError: naming the fields that differ.
        """
        if self.found is not None:
            shape = dataclasses.replace(self.shape, weights=self.found.target.weights)
            refuse_another(self.options.cache, self.found, self.identity(shape))

    def identity(self, shape: TargetIdentity) -> Identity:
        """The cache's identity, with `shape` for the target."""
        return Identity(
            target=shape,
            tokenizer=self.tokenizer,
            data=self.data_identity,
            features=FeatureIdentity(
                layer_ids=self.layer_ids,
                context_codec=self.options.context_codec,
                last_codec=self.options.last_codec,
            ),
            shard_tokens=self.options.shard_tokens,
            batch_tokens=self.options.batch_tokens,
        )


def prepare(options: CaptureOptions) -> PreparedCapture:
    """Read the target's config and tokenise the data.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    found = read_manifest(options.cache).identity if (options.cache / MANIFEST).is_file() else None
    target = open_target(_with_the_caches_dtype(with_example(options.target), found))
    shape = target.identity(hash_weights=False)
    layer_ids = options.layer_ids or default_layer_ids(shape.num_layers)
    layer_ids = tuple(validate_target_layer_ids(layer_ids, shape.num_layers))
    tokenizer = target.tokenizer()
    # A template that prints the date prints the day on which the capture began.
    today = found.data.settings.get("today") if found else None
    tokenize = row_tokenizer(options.data, tokenizer, shape.vocab_size, today)
    chat = tokenize.template
    tokenizer.chat_template = chat.own
    tokens = tokenizer_identity(tokenizer)
    sources = open_data(options.data)
    data = prepare_data(options.data, tokenize, tokens.sha256, sources)
    target.check_length(int(data.facts.lengths.max()))
    batching = plan_capture(data.facts.lengths, options.batch_tokens, options.shard_tokens)
    facts = data.facts.take(batching.order)
    index, plan = build_index(facts, batching.shards)
    return PreparedCapture(
        options=options,
        target=target,
        shape=shape,
        tokenizer=tokens,
        layer_ids=layer_ids,
        data=data,
        data_identity=DataIdentity(
            sources=tuple(source.name for source in sources),
            sha256=facts.content_hash(),
            settings=options.data.settings() | ({"today": chat.today} if chat.prints_the_date else {}),
        ),
        batching=batching,
        index=index,
        plan=plan,
        found=found,
    )


def _with_the_caches_dtype(options: TargetOptions, found: Identity | None) -> TargetOptions:
    """`--dtype auto` is what the cache already there was captured in, on whatever machine that was."""
    if found is not None and options.dtype == "auto" and found.target.dtype in DTYPES:
        return dataclasses.replace(options, dtype=found.target.dtype)
    return options


def price(prepared: PreparedCapture, context_codec: str, last_codec: str) -> Price:
    """What the cache takes with these codecs."""
    features = FeatureIdentity(
        layer_ids=prepared.layer_ids, context_codec=context_codec, last_codec=last_codec
    )
    identity = dataclasses.replace(prepared.identity(prepared.shape), features=features)
    rows = dict(prepared.data.rows)
    return cache_price(identity, prepared.plan, rows, prepared.index, _target_bytes(prepared.target))


def _target_bytes(target: Target) -> int:
    """Config, tokenizer, embedding and head, as a cache keeps them: in bf16 where that loses nothing."""
    shell = target.shell
    embedding, head = shell.get_input_embeddings().weight, shell.get_output_embeddings().weight
    stored = target.checkpoint_dtype if target.checkpoint_dtype == torch.bfloat16 else target.dtype
    values = embedding.numel() + (0 if head is embedding else head.numel())
    return values * stored.itemsize + sum(map(len, target.files().values()))


def check_disk(prepared: PreparedCapture, cost: Price) -> None:
    """Refuse a cache that the disk can't hold. Raises CacheError with what it needs and what there is."""
    disk.check_disk(
        prepared.options.cache, cost, "capture fewer layers (--layers) or samples (--num-samples)"
    )


def plan_lines(prepared: PreparedCapture) -> Iterator[str]:
    """The plan for the terminal."""
    shape, batching, options = prepared.shape, prepared.batching, prepared.options
    features = prepared.identity(shape).features
    yield (
        f"{shape.name} ({shape.architecture}, {shape.dtype}), layers {list(prepared.layer_ids)}, "
        f"width {shape.hidden_size:,}"
    )
    yield from data_lines(prepared.data)
    yield (
        f"{len(batching.batches):,} batches of at most {options.batch_tokens:,} tokens, "
        f"{batching.padding:.1%} padding"
    )
    yield f"{len(prepared.plan):,} shards of at most {options.shard_tokens:,} tokens"
    yield f"{'codec':<14}{'bytes a token':>14}{'cache':>12}"
    chosen = (features.context_codec, features.last_codec)
    for pair in dict.fromkeys([chosen, *PRICED]):
        cost = price(prepared, *pair)
        name = pair[0] if pair[0] == pair[1] else "+".join(pair)
        mark = "  (this capture's)" if pair == chosen else ""
        yield f"{name:<14}{cost.per_token:>14,.0f}{size(cost.total):>12}{mark}"
    written = written_bytes(options.cache) if options.cache.is_dir() else 0
    there = f", {size(written)} of the cache there already" if written else ""
    yield f"disk: {size(free_bytes(options.cache))} free at {options.cache}{there}"


@torch.no_grad()
def probe(prepared: PreparedCapture) -> str:
    """Load the target, run a few batches, and say how long the capture will take one process."""
    target = HFDSparkTargetModel(prepared.target.model(), prepared.layer_ids)
    device = input_device(target.model)
    batching, data = prepared.batching, prepared.data
    chosen = np.linspace(0, len(batching.batches) - 1, PROBE_BATCHES).astype(int)
    tokens, seconds = 0, 0.0
    for n, batch in enumerate([chosen[0], *dict.fromkeys(chosen.tolist())]):
        samples = [data[int(i)] for i in batching.order[list(batching.batches[batch])]]
        began = time.perf_counter()
        states = target.states(pad(samples, device))
        float(next(iter(states.values())).view(-1)[0])  # until it is computed
        if n:  # the first is to warm up
            seconds += time.perf_counter() - began
            tokens += sum(len(sample.input_ids) for sample in samples)
    rate = tokens / seconds
    return (
        f"probe: {rate:,.0f} tokens/s on {device}, so {duration(batching.tokens / rate)} for all "
        f"{batching.tokens:,} tokens by one process"
    )


def show_plan(options: CaptureOptions, *, probing: bool) -> None:
    """`dspark plan`: print the plan, with `probing` the time, and refuse if the disk can't hold the cache."""
    prepared = prepare(options)
    for line in plan_lines(prepared):
        click.echo(line)
    try:
        prepared.check_directory()
    except CacheError as error:
        click.echo(f"warning: {error}", err=True)
    if probing:
        click.echo(probe(prepared))
    features = prepared.identity(prepared.shape).features
    if not options.force:
        check_disk(prepared, price(prepared, features.context_codec, features.last_codec))
