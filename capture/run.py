"""The capture loop: the hooked target runs once over the data, shard by shard of a fixed plan."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from capture.conversations import TokenizedSample
from capture.load import DTYPES, Target, open_target, tokenizer_identity
from capture.options import DataOptions, TargetOptions
from capture.preparation import open_data, prepare_data, row_tokenizer
from capture.target import HFDSparkTargetModel
from capture.tokens import TokenizedData
from pipeline.cache import (
    CacheWriter,
    DataIdentity,
    FeatureIdentity,
    Identity,
    Manifest,
    SampleFacts,
    TargetIdentity,
    build_index,
    last_hidden_rows,
    plan_shards,
)
from pipeline.cache.codecs import get_codec
from pipeline.cache.layout import LAST_HIDDEN, context_name, part_name, shard_specs
from pipeline.cache.manifest import MANIFEST, read_manifest
from pipeline.device import reuse_freed_memory
from pipeline.errors import TargetError
from pipeline.features import default_layer_ids, head_logits, validate_target_layer_ids
from pipeline.hooks import input_device

# Mean total variation above which the captured teacher is not the target's. bf16 rounding of the
# logits alone costs about 0.01; a teacher from before the final norm costs 0.3 or more.
MAX_TEACHER_TV = 0.05
# Rows on which the teacher is proved before the first shard.
PROOF_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """What `dspark capture` was asked for."""

    target: TargetOptions
    data: DataOptions
    cache: Path
    layer_ids: tuple[int, ...] | None = None
    """None: an even spread of five, see `pipeline.features.default_layer_ids`."""
    batch_tokens: int = 4096
    """Padded tokens of one target forward."""
    shard_tokens: int = 32768
    """Tokens of a shard: 1 GB at Qwen3-4B's size, and 40,000 shards for the paper's 1.3M conversations."""


def capture(options: CaptureOptions) -> tuple[Manifest, bool]:
    """Capture what `options` names into its cache, or continue where an earlier capture stopped.

    Returns the complete manifest, and whether the cache was there already (no target was loaded).

    Raises:
        DSparkError: see `pipeline.errors`; nothing finished is ever lost.
    """
    found = read_manifest(options.cache).identity if (options.cache / MANIFEST).is_file() else None
    target = open_target(_with_the_caches_dtype(options.target, found))
    if target.device.type == "cpu":
        reuse_freed_memory()
    shape = target.identity()
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
    target.check_length(max(fact.length for fact in data.facts))
    shards = plan_shards([fact.length for fact in data.facts], options.shard_tokens)
    index, plan = build_index(data.facts, shards)
    identity = Identity(
        target=shape,
        tokenizer=tokens,
        data=DataIdentity(
            sources=tuple(source.name for source in sources),
            sha256=_data_hash(data.facts),
            settings=options.data.settings() | ({"today": chat.today} if chat.prints_the_date else {}),
        ),
        features=FeatureIdentity(layer_ids=layer_ids),
        shard_tokens=options.shard_tokens,
        batch_tokens=options.batch_tokens,
    )
    writer = CacheWriter(options.cache, identity, plan, index, dict(data.rows))
    if writer.complete:
        return writer.manifest, True
    model = target.model()
    _write_target(writer, target, model)
    fidelity = prove_teacher(model, layer_ids, data[0], shape)
    _capture_shards(writer, HFDSparkTargetModel(model, layer_ids), data, shards, options.batch_tokens)
    return writer.finalise(fidelity), False


def _data_hash(facts: Sequence[SampleFacts]) -> str:
    return hashlib.sha256(b"".join(fact.sample_id for fact in facts)).hexdigest()


def _with_the_caches_dtype(options: TargetOptions, found: Identity | None) -> TargetOptions:
    """`--dtype auto` is what the cache already there was captured in, on whatever machine that was."""
    if found is not None and options.dtype == "auto" and found.target.dtype in DTYPES:
        return dataclasses.replace(options, dtype=found.target.dtype)
    return options


def _write_target(writer: CacheWriter, target: Target, model: nn.Module) -> None:
    """Keep what training needs of the target: config, tokenizer, embedding and head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    frozen = {"embed_tokens.weight": _compact(embedding)}
    if not writer.manifest.identity.target.tied_embeddings:
        frozen["lm_head.weight"] = _compact(head)
    writer.write_target(target.files(), frozen)


def _compact(weight: Tensor) -> Tensor:
    """A weight in bf16 where that loses nothing (a bf16 checkpoint run in fp32), else as it is."""
    weight = weight.detach().cpu()
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.to(weight.dtype), weight) else weight.contiguous()


@torch.no_grad()
def prove_teacher(
    model: nn.Module, layer_ids: Sequence[int], sample: TokenizedSample, identity: TargetIdentity
) -> dict[str, float]:
    """Show that head(stored last hidden) is the target's own next-token distribution.

    Returns the total variation (mean and maximum over rows) between the two.

    Raises:
        TargetError: they differ by more than rounding, so a draft would learn from a wrong teacher.
    """
    ids = torch.from_numpy(sample.input_ids[:PROOF_TOKENS]).long().to(input_device(model))[None]  # [1, S]
    logits = model(input_ids=ids, use_cache=False).logits[0]  # [S, V]
    states = HFDSparkTargetModel(model, layer_ids).states(ids, torch.ones_like(ids))
    for key, rows in states.items():
        _check_state(rows, _state_name(key), sample)
    last_hidden = states[LAST_HIDDEN][0]
    decoded = torch.empty_like(last_hidden, dtype=torch.bfloat16)
    codec = get_codec("bf16")
    codec.decode(codec.encode(last_hidden), decoded)
    head = model.get_output_embeddings().weight
    stored = head_logits(
        decoded.to(head.device), head, identity.final_logit_softcapping, identity.logit_scale
    )
    mean = worst = 1.0
    if stored.shape == logits.shape:
        expected = logits.to(head.device).float().softmax(-1)
        variation = (stored.softmax(-1) - expected).abs().sum(-1) / 2  # [S]
        mean, worst = variation.mean().item(), variation.max().item()
    if not mean <= MAX_TEACHER_TV:
        raise TargetError(
            f"the captured teacher is not the target's: mean total variation {mean:.3f}, expected at most "
            f"{MAX_TEACHER_TV}; {type(model).__name__} changes its logits after lm_head in a way that this "
            "version does not record"
        )
    return {"teacher_tv_mean": mean, "teacher_tv_max": worst, "teacher_tv_rows": float(len(stored))}


def _capture_shards(
    writer: CacheWriter,
    target: HFDSparkTargetModel,
    data: TokenizedData,
    shards: Sequence[range],
    batch_tokens: int,
) -> None:
    pending = set(writer.pending())
    done = sum(plan.tokens for shard, plan in enumerate(writer.manifest.plan) if shard not in pending)
    total = writer.manifest.num_tokens
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc="capture") as progress:
        for shard in sorted(pending):
            samples = [data[i] for i in shards[shard]]
            writer.write_shard(shard, _fill_shard(writer, shard, target, samples, batch_tokens, progress))


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices of similar length so that rows × longest stays within `batch_tokens`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _fill_shard(
    writer: CacheWriter,
    shard: int,
    target: HFDSparkTargetModel,
    samples: list[TokenizedSample],
    batch_tokens: int,
    progress: tqdm,
) -> dict[str, Tensor]:
    """Run the target over one shard's samples and lay their rows out as the plan says."""
    identity, plan = writer.manifest.identity, writer.manifest.plan[shard]
    specs = shard_specs(identity, plan)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
    tensors["input_ids"].copy_(torch.from_numpy(np.concatenate([s.input_ids for s in samples])))
    tensors["loss_mask"].copy_(torch.from_numpy(np.concatenate([s.loss_mask for s in samples])))
    labels = [torch.from_numpy(last_hidden_rows(s.loss_mask)) for s in samples]
    starts = np.cumsum([0] + [len(s.input_ids) for s in samples])
    last_starts = np.cumsum([0] + [len(rows) for rows in labels])
    context_codec, last_codec = (
        get_codec(identity.features.context_codec),
        get_codec(identity.features.last_codec),
    )

    def store(state: str, codec, rows: Tensor, start: int) -> None:
        for suffix, encoded in codec.encode(rows).items():
            tensors[part_name(state, suffix)][start : start + len(rows)].copy_(encoded)

    for batch in length_batches([len(s.input_ids) for s in samples], batch_tokens):
        states = target.states(*_pad([samples[i] for i in batch], target.model.device))
        for row, i in enumerate(batch):
            length = len(samples[i].input_ids)
            for layer_id in identity.features.layer_ids:
                rows = states[layer_id][row, :length]
                _check_state(rows, _state_name(layer_id), samples[i])
                store(context_name(layer_id), context_codec, rows, starts[i])
            rows = states[LAST_HIDDEN][row, labels[i].to(states[LAST_HIDDEN].device)]
            _check_state(rows, _state_name(LAST_HIDDEN), samples[i])
            store(LAST_HIDDEN, last_codec, rows, last_starts[i])
            progress.update(length)
    return tensors


def _pad(samples: list[TokenizedSample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad samples to `input_ids` and `attention_mask` `[B, S]`."""
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[row, :length] = torch.from_numpy(sample.input_ids)
        mask[row, :length] = 1
    return ids.to(device), mask.to(device)


def _state_name(key: int | str) -> str:
    return "the last hidden state" if key == LAST_HIDDEN else f"layer {key}"


def _check_state(rows: Tensor, what: str, sample: TokenizedSample) -> None:
    """Refuse states that no draft should learn from."""
    peak = rows.abs().amax()
    if not torch.isfinite(peak):
        problem = "holds NaN or infinity"
    elif peak == 0:
        problem = "is all zero"
    else:
        return
    raise TargetError(
        f"{what} of the sample at row {sample.source_row + 1} of the data {problem}: "
        "check the target's weights, or try --dtype float32"
    )
