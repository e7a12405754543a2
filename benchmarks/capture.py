"""Compare the time of a whole capture with the bare forward of the target's backbone over the same batches.

    python benchmarks/capture.py                    # SmolLM2-135M's shape on the CPU, Qwen3-4B's on a GPU
    python benchmarks/capture.py --engine vllm --engine-python ~/vllm/bin/python  # vLLM beside transformers

Weights are random, and conversations are random tokens of log-normal lengths: speed depends on neither. Both
run in turn, several times, in one process; read the ratio. The capture writes to a temporary directory.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.engines.engine import CaptureEngine
from capture.engines.huggingface import HuggingFaceEngine, pad
from capture.engines.open import open_engine
from capture.engines.options import EngineOptions
from capture.options import CaptureOptions, DataOptions
from capture.prepare import PreparedCapture, prepare
from capture.run import capture, capture_shards
from capture.shards.clock import Clock
from capture.shards.fill import ShardFiller
from capture.shards.statistics import measure_statistics
from pipeline.cache import CacheWriter
from pipeline.cache.progress.claims import Worker
from pipeline.cache.statistics import state_codecs
from pipeline.device import reuse_freed_memory
from pipeline.hooks import find_decoder, rows_taken_as_given
from pipeline.process import WorkerPlace
from pipeline.quiet import quiet_transformers
from pipeline.signals import StopRequest
from pipeline.target_model.options import TargetOptions

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
# Name, shape, samples, longest, mean of the lengths' logarithm, tokens per batch and per shard, rounds.
CPU = ("SmolLM2-135M shape fp32", SMOLLM2, 64, 512, 4.8, 2048, 4096, 3)
GPU = ("Qwen3-4B shape bf16", QWEN3_4B, 400, 4096, 6.55, 16384, 32768, 3)
Row = tuple[str, str, float, str]


def make_target(folder: Path, shape: dict[str, int], device: torch.device) -> Path:
    """Save a random Qwen3 of `shape`, with a tokenizer that encodes nothing. Return the folder."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    config = AutoConfig.for_model("qwen3", **shape, tie_word_embeddings=True, max_position_embeddings=8192)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.cpu().save_pretrained(folder)
    return folder


def make_data(path: Path, samples: int, longest: int, mean_log: float, vocab: int) -> Path:
    """Write samples of random tokens below `vocab`, with the second half supervised. Return the path."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean_log, 0.8, samples), 16, longest).astype(int)
    with path.open("w") as file:
        for length in lengths:
            mask = [0] * (length // 2) + [1] * (length - length // 2)
            row = {"input_ids": rng.integers(0, vocab, length).tolist(), "loss_mask": mask}
            file.write(json.dumps(row) + "\n")
    return path


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def bare_seconds(engine: HuggingFaceEngine, prepared: PreparedCapture) -> float:
    """Return the seconds of the backbone's forward over all batches of the plan."""
    device, decoder = engine.device, find_decoder(engine.target.model)
    order = prepared.batching.order
    batches = [
        pad([prepared.data[int(order[i])] for i in batch], device) for batch in prepared.batching.batches
    ]
    synchronise(device)
    began = time.perf_counter()
    for ids in batches:
        with rows_taken_as_given():  # as capture does
            decoder(input_ids=ids, use_cache=False)
    synchronise(device)
    return time.perf_counter() - began


def capture_seconds(
    engine: CaptureEngine, prepared: PreparedCapture, cache: Path
) -> tuple[float, dict[str, float]]:
    """Every shard from tokens to disk, and the complete manifest; and where the time went."""
    identity, clock = prepared.full_identity(), Clock()
    writer = CacheWriter(cache, identity, prepared.plan, prepared.index, dict(prepared.data.rows))
    writer.write_target({}, {"embed_tokens.weight": engine.embedding.cpu()})
    statistics = writer.statistics(
        lambda: measure_statistics(engine, identity, prepared.data, prepared.batching.order)
    )
    filler = ShardFiller(engine, identity, state_codecs(identity, statistics), clock)
    place = WorkerPlace()
    with Worker(writer.progress) as worker:
        synchronise(filler.device)
        began = time.perf_counter()
        capture_shards(writer, worker, place, filler, prepared, StopRequest())
        assert writer.finalise() is not None
        return time.perf_counter() - began, clock.seconds()


def capture_rows(
    name: str,
    shape: dict[str, int],
    samples: int,
    longest: int,
    mean_log: float,
    batch_tokens: int,
    shard_tokens: int,
    rounds: int,
    *,
    device: torch.device,
    folder: Path,
) -> list[Row]:
    """Measure a case and return its rows. Leaves its target and caches in the folder.

    Args:
        name: of the case.
        shape: the target's sizes, as in its Hugging Face config.
        samples, longest, mean_log: number of conversations, their most tokens, and the mean of the logarithm
            of their lengths.
        folder: on the disk that is measured.
    """
    options = case_options(
        shape, samples, longest, mean_log, batch_tokens, shard_tokens, device=device, folder=folder
    )
    prepared = prepare(options)
    case = f"{name}, {options.context_codec}+{options.last_codec}"
    engine = HuggingFaceEngine(prepared.target.model(), prepared.layer_ids)
    bare_seconds(engine, prepared)  # warm-up
    bare, whole, steps = [], [], {}
    for i in range(rounds):
        bare.append(bare_seconds(engine, prepared))
        seconds, steps = capture_seconds(engine, prepared, folder / f"cache-{i}")
        whole.append(seconds)
    began = time.perf_counter()
    capture(options)
    command = time.perf_counter() - began
    ratio = statistics.median(w / b for w, b in zip(whole, bare, strict=True))
    tokens = prepared.batching.tokens
    rows = [(case, "capture / bare forward", ratio, "")]
    rows += [(case, "capture", tokens / statistics.median(whole), "tokens/s")]
    rows += [(case, f"of it: {name}", value, "s") for name, value in sorted(steps.items())]
    rows += [(case, "all of it", whole[-1], "s"), (case, "the whole command, set-up included", command, "s")]
    print(f"{tokens:,} tokens, {len(prepared.plan)} shards, {prepared.batching.padding:.1%} padding")
    return rows


def case_options(
    shape: dict[str, int],
    samples: int,
    longest: int,
    mean_log: float,
    batch_tokens: int,
    shard_tokens: int,
    *,
    device: torch.device,
    folder: Path,
) -> CaptureOptions:
    """Make a case's target and data in the folder, and return the options of its capture."""
    data = make_data(folder / "data.jsonl", samples, longest, mean_log, min(40000, shape["vocab_size"]))
    return CaptureOptions(
        target=TargetOptions(target=str(make_target(folder / "target", shape, device)), device=str(device)),
        data=DataOptions(data=(str(data),)),
        cache=folder / "first",
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
    )


def engine_rows(python: Path | None, *case: Any, device: torch.device, folder: Path) -> list[Row]:
    """Capture a case through vLLM and through transformers, one after the other, and return the rows.

    Args:
        python: of vLLM's environment; None for this one.
        case: as the arguments of `capture_rows`.
    """
    name, *sizes, rounds = case
    options = case_options(*sizes, device=device, folder=folder)
    seconds = {}
    for engine_options in (EngineOptions(), EngineOptions(engine="vllm", engine_python=python)):
        prepared = prepare(replace(options, engine=engine_options))
        with closing(open_engine(prepared)) as engine:
            caches = [folder / f"{engine_options.engine}-{i}" for i in range(rounds + 1)]
            times = [capture_seconds(engine, prepared, cache)[0] for cache in caches]
        seconds[engine_options.engine] = statistics.median(times[1:])  # the first one warms up
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    tokens = prepared.batching.tokens
    rows = [(name, f"capture by {engine}", tokens / value, "tokens/s") for engine, value in seconds.items()]
    return [*rows, (name, "vllm / huggingface", seconds["huggingface"] / seconds["vllm"], "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["huggingface", "vllm"], default="huggingface")
    parser.add_argument("--engine-python", type=Path, help="Python of vLLM's environment")
    given = parser.parse_args()
    quiet_transformers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        reuse_freed_memory()
    case = GPU if device.type == "cuda" else CPU
    with tempfile.TemporaryDirectory(prefix="dspark-bench-") as name:
        if given.engine == "vllm":
            rows = engine_rows(given.engine_python, *case, device=device, folder=Path(name))
        else:
            rows = capture_rows(*case, device=device, folder=Path(name))
        record("capture", device, rows)


if __name__ == "__main__":
    main()
