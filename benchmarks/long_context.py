"""Measure the time and memory of a training step over one long document, by its length.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --device cuda

A block starts at every eighth token, as in a batch of 512 blocks and 4,096 tokens. The draft is small, so
that what attention takes shows. "groups" is training's sdpa, "one mask" the mask over all blocks that it
replaces, and "window" a draft whose layers see 1,024 positions. A GPU has flex_attention as well. Each is
measured in a process of its own, as the memory that it adds to that at rest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from pipeline.device import resolve_device
from train.draft.blocks import masks
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.trainer.metrics import peak_memory

LENGTHS = (8192, 16384, 32768)
# One mask of the longest document takes 9 GB on a CPU.
WAYS = {"groups": LENGTHS, "one mask": LENGTHS[:2], "window": LENGTHS, "flex": LENGTHS}
HIDDEN, VOCAB, APART, WINDOW = 64, 512, 8, 1024


def make_draft(way: str) -> Qwen3DSparkModel:
    """Make a draft of two layers with random weights."""
    sliding = {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": WINDOW}
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        block_size=7,
        mask_token_id=0,
        target_layer_ids=[1],
        num_target_layers=4,
        markov_rank=8,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        **(sliding if way == "window" else {}),
    )
    model = Qwen3DSparkModel(config)
    model.attention = "flex" if way == "flex" else "sdpa"
    return model


def step(way: str, length: int, device: torch.device, queue: multiprocessing.Queue) -> None:
    """Put the seconds and bytes of a step's forward and backward into a queue."""
    torch.set_num_threads(1)
    if way == "one mask":
        masks.GROUP = length
    module = DSparkTrainerModule(make_draft(way).to(device), 4.0)
    anchors = torch.arange(APART // 2, length - 1, APART, device=device)[None]
    arguments = {
        "input_ids": torch.randint(VOCAB, (1, length), device=device),
        "target_hidden_states": torch.randn(1, length, HIDDEN, device=device),
        "loss_mask": torch.ones(1, length, device=device),
        "target_last_hidden_states": torch.randn(1, length, HIDDEN, device=device),
        "anchor_positions": anchors,
        "block_keep_mask": torch.ones_like(anchors, dtype=torch.bool),
    }
    if device.type == "cuda":  # not the time of compiling
        module(**arguments).loss.backward()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    rest = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    begun = time.perf_counter()
    module(**arguments).loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    queue.put((time.perf_counter() - begun, peak_memory(device) - rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    device = resolve_device(parser.parse_args().device)
    context = multiprocessing.get_context("spawn")
    rows = []
    for way, lengths in WAYS.items():
        if way == "flex" and device.type != "cuda":  # it has no backward there
            continue
        for length in lengths:
            queue = context.Queue()
            process = context.Process(target=step, args=(way, length, device, queue))
            process.start()
            seconds, peak = queue.get(timeout=600)  # a timeout means that the process died
            process.join()
            case = f"{length} tokens, {length // APART} blocks, {way}"
            rows += [(case, "time", seconds, "s"), (case, "extra peak memory", peak / 2**20, "MiB")]
    record("long_context", device, rows)


if __name__ == "__main__":
    main()
