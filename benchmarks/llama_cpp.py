"""Measure what the example's draft saves in llama.cpp: tokens/s of its server, with and without the draft.

    make engines train && python benchmarks/llama_cpp.py --run runs/example

Held-out prompts of the cache are continued greedily, one after the other, by a server of the target alone and
by servers that draft 1 to K tokens a round. Rates are the server's own, of generating alone; the first prompt
of each server is not counted. The target alone comes first and last: how far the two are apart is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.example import example_target
from pipeline.cache import CacheReader
from pipeline.child import started
from train.data.split import split
from train.decode.prompts import held_out_prompts
from train.runs.open import open_draft

ROOT = Path(__file__).resolve().parents[1]
SERVER, CONVERTER = Path("build/bin/llama-server"), Path("convert_hf_to_gguf.py")
LOADING_S = 120


def converted(llama_cpp: Path, model: Path, kind: str, out: Path) -> Path:
    """Return a target's GGUF file, made by llama.cpp's converter."""
    path = out / f"target-{kind}.gguf"
    modules = os.pathsep.join(str(llama_cpp / name) for name in ("gguf-py", "site-packages"))
    command = [sys.executable, llama_cpp / CONVERTER, model, "--outtype", kind, "--outfile", path]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": modules}, capture_output=True)
    return path


def exported(run: Path, cache: Path, target: Path, kind: str, out: Path) -> Path:
    """Export a run's draft of a type of weights."""
    folder = out / "draft"
    words = ["export", run, folder, "--to", "llama.cpp", "--gguf", kind, "--target-gguf", target]
    if "d2t" in open_draft(run).weights:
        words += ["--with-embeddings", "--cache", cache]
    subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return folder / f"draft-{kind}.gguf"


def rate(
    command: list[str | Path | int], prompts: list[list[int]], new: int, log: Path
) -> tuple[float, float]:
    """Serve prompts one after the other. Return tokens/s, and the tokens of a verified round (1 without)."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    tokens = milliseconds = accepted = 0.0
    with started([str(word) for word in [*command, "--host", "127.0.0.1", "--port", port]], log):
        url = f"http://127.0.0.1:{port}"
        for _ in range(2 * LOADING_S):
            try:
                opener.open(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        for number, prompt in enumerate(prompts):
            body = {"prompt": prompt, "n_predict": new, "temperature": 0, "cache_prompt": False}
            request = urllib.request.Request(
                f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with opener.open(request, timeout=600) as answer:
                times = json.load(answer)["timings"]
            if number:
                tokens += times["predicted_n"]
                milliseconds += times["predicted_ms"]
                accepted += times.get("draft_n_accepted", 0)
    return 1000 * tokens / milliseconds, tokens / (tokens - accepted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, required=True, help="a run of the example, or one of its checkpoints"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "caches/example")
    parser.add_argument("--llama-cpp", type=Path, default=ROOT / ".cache/engines/llama.cpp")
    parser.add_argument("--type", default="bf16", choices=["f32", "f16", "bf16", "q8_0"])
    parser.add_argument("--prompts", type=int, default=13)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    draft = open_draft(options.run)
    reader = CacheReader(options.cache)
    _, held_out = split(reader, draft.page.config.train.held_out)
    prompts = held_out_prompts(reader, held_out, options.prompts)
    with tempfile.TemporaryDirectory(prefix="dspark-llama-") as folder:
        work = Path(folder)
        target = converted(options.llama_cpp, example_target().resolve(), options.type, work)
        file = exported(options.run, options.cache, target, options.type, work)
        alone = [options.llama_cpp / SERVER, "--model", target, "--parallel", 1, "--no-ui"]
        alone += ["--threads", options.threads, "--ctx-size", 2048, "--device", "none"]
        with_draft = [*alone, "--model-draft", file, "--spec-type", draft.kind.gguf.spec_type]
        with_draft += ["--spec-draft-p-min", 0, "--threads-draft", options.threads]
        cases = {"alone": alone}
        for count in range(1, draft.kind.slots(draft.shape) + 1):
            cases[f"{count} drafted"] = [*with_draft, "--spec-draft-n-max", count]
        cases["alone, again"] = alone
        found = {
            name: rate(command, prompts, options.new_tokens, work / f"{name}.log")
            for name, command in cases.items()
        }
    plain = (found["alone"][0] + found["alone, again"][0]) / 2
    rows = []
    for name, (speed, a_round) in found.items():
        case = f"example, {options.type}, {options.threads} threads, {name}"
        rows.append((case, "tokens/s", speed, "tokens/s"))
        rows.append((case, "against the target alone", speed / plain, "x"))
        rows.append((case, "tokens of a round", a_round, "tokens"))
    record("llama_cpp", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
