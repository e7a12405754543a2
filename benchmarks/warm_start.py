"""Measure a warm start: a draft of one target, trained on for a fine-tuned target, against one from nothing.

    make train && python benchmarks/warm_start.py --draft runs/example

The fine-tuned target is the example's, taught to explain functions: questions with the docstrings of
installed packages as answers. It then answers other such questions itself, and its states on those are
captured. Drafts of the example's config are trained from that cache for several numbers of steps, from the
draft given and from their own first weights. `0 steps` is the draft of before, on the new target.

Everything is kept in --folder, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.example import example_target
from pipeline.files import publish_bytes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "example.toml"
PACKAGES = """
numpy numpy.linalg numpy.random numpy.fft torch torch.nn torch.nn.functional torch.linalg
torch.optim torch.fft torch.utils.data os os.path re json random math statistics itertools functools
collections datetime pathlib shutil subprocess threading socket ssl email csv sqlite3 decimal
fractions textwrap string struct time calendar logging argparse inspect ast asyncio
concurrent.futures multiprocessing tempfile glob heapq bisect array enum dataclasses typing
contextlib copy pprint types unittest urllib.parse urllib.request http.client zlib gzip zipfile
tarfile hashlib hmac secrets pyarrow pyarrow.compute pytest click
"""
# Of fine-tuning: rows of a step, peak learning rate, tokens of a row.
ROWS, RATE, LONGEST = 4, 1e-4, 128


def explanations() -> list[tuple[str, str]]:
    """Return names of functions and classes with the sentences of their docstrings, in one random order."""
    found: dict[str, str] = {}
    for package in PACKAGES.split():
        module = importlib.import_module(package)
        for name in sorted(dir(module)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                each = getattr(module, name, None)
            if name.startswith("_") or not callable(each):
                continue
            paragraphs = [" ".join(p.split()) for p in (inspect.getdoc(each) or "").split("\n\n")]
            text = " ".join(p for p in paragraphs if re.fullmatch(r"[A-Z].*\.", p))[:600]
            text = text[: text.rfind(".") + 1]
            if len(text) > 60 and text not in found.values():
                found[f"{package}.{name}"] = text
    items = sorted(found.items())
    random.Random(0).shuffle(items)
    return items


def conversation(name: str, answer: str) -> list[dict[str, str]]:
    question = {"role": "user", "content": f"What does `{name}` do?"}
    return [question, {"role": "assistant", "content": answer}]


def fine_tune(source: Path, out: Path, rows: list[list[dict[str, str]]], steps: int) -> None:
    """Train a target on the answers of conversations, and save it in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def ids(messages: list[dict[str, str]], **more: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more)

    for step in (bar := tqdm(range(steps), desc="fine-tune")):
        batch = [rows[(step * ROWS + i) % len(rows)] for i in range(ROWS)]
        tokens = [ids(messages)[:LONGEST] for messages in batch]
        asked = [len(ids(messages[:1], add_generation_prompt=True)) for messages in batch]
        width = max(map(len, tokens))
        inputs = torch.zeros(ROWS, width, dtype=torch.long)
        labels = torch.full((ROWS, width), -100)
        for row, (each, start) in enumerate(zip(tokens, asked, strict=True)):
            inputs[row, : len(each)] = torch.tensor(each)
            labels[row, start : len(each)] = torch.tensor(each[start:])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=round(loss.item(), 2))
    partial = out.with_name(f"{out.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def dspark(*words: object, threads: int | None = None) -> None:
    """Run a command of the package. Ends this program if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "pipeline.cli", *map(str, words)]
    if subprocess.run(command, env=environment).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--draft", type=Path, required=True, help="a draft of the example: a run or a checkpoint"
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the draft and of all runs")
    parser.add_argument("--steps", default="0,100,400,1500")
    parser.add_argument("--folder", type=Path, default=Path(".cache/warm"))
    parser.add_argument("--fine-tuning-steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    folder, draft, config = (p.resolve() for p in (options.folder, options.draft, options.config))
    folder.mkdir(parents=True, exist_ok=True)
    items = explanations()
    print(f"{len(items):,} explanations")
    target, prompts, answers, cache = (
        folder / n for n in ("target", "prompts.jsonl", "answers.jsonl", "cache")
    )
    if not target.exists():
        rows = [conversation(*item) for item in items[options.prompts :]]
        fine_tune(example_target().resolve(), target, rows, options.fine_tuning_steps)
    lines = [json.dumps({"messages": conversation(name, "-")}) for name, _ in items[: options.prompts]]
    publish_bytes(prompts, "\n".join(lines).encode())
    if not answers.exists():
        dspark("regenerate", "--target", target, "--data", prompts, "--max-new-tokens", 160, "--out", answers)
    dspark("capture", "--target", target, "--data", answers, "--cache", cache)
    seeds = list(map(int, options.seeds.split(",")))

    def tau(start: str, steps: int, seed: int) -> float:
        """Train a draft, or find it trained, and return its held-out tau."""
        run = folder / "runs" / config.stem / f"{start.split()[-1]}-{steps}-{seed}"
        settings = [f"train.seed={seed}", f"train.max_steps={max(1, steps)}", "train.eval_every=0"]
        if not steps:
            settings.append("train.lr=1e-12")
        if start != "nothing":
            settings += ['draft.init="random"', f"draft.init_from={json.dumps(str(draft))}"]
        changes = [word for setting in settings for word in ("--set", setting)]
        dspark("train", "--cache", cache, "--config", config, "--run", run, *changes, threads=1)
        progress = json.loads((run / "latest" / "training.json").read_text())["progress"]
        return progress["evaluation"]["tau"]

    cases = [
        (s, n)
        for n in map(int, options.steps.split(","))
        for s in ("the old draft", "nothing")
        if n or s != "nothing"
    ]
    jobs = [(*case, seed) for case in cases for seed in (seeds if case[1] else seeds[:1])]  # no step, no seed
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(lambda job: tau(*job), jobs), strict=True))
    rows = []
    for start, steps in cases:
        taus = [found[job] for job in jobs if job[:2] == (start, steps)]
        error = statistics.stdev(taus) / math.sqrt(len(taus)) if len(taus) > 1 else 0.0
        case = f"{config.stem}: from {start}, {steps} steps"
        rows.append((case, "held-out tau", statistics.mean(taus), ""))
        rows.append((case, "standard error", error, ""))
    record("warm_start", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
