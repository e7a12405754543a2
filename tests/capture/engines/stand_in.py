"""An engine in numpy that speaks as vLLM's worker does, and misbehaves when it is told to.

It is its own "environment": with `-c` it answers as a Python that has vLLM, else as `run_vllm.py`. The
target is a tiny Qwen3 in fp32, computed here from its equations. FAULT in the environment names a fault,
FAULT_AT the number of tokens of the requests that it befalls (all without it), COUNT a file that counts its
starts, WRITTEN one that lists how many bytes were on their way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FAULT, AT = os.environ.get("FAULT", ""), int(os.environ.get("FAULT_AT", 0))


class Qwen3:
    """A target's forward."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "np") as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[f"{name}.weight"]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        half, base = x.shape[-1] // 2, (self.config.get("rope_parameters") or self.config)["rope_theta"]
        angles = np.arange(len(x))[:, None] / base ** (np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        one, two = x[..., :half], x[..., half:]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def layer(self, x: np.ndarray, number: int) -> np.ndarray:
        own, c = f"model.layers.{number}", self.config
        heads = {"q": c["num_attention_heads"], "k": c["num_key_value_heads"], "v": c["num_key_value_heads"]}
        h, parts = self.norm(x, f"{own}.input_layernorm"), {}
        for name, count in heads.items():
            part = h @ self.weights[f"{own}.self_attn.{name}_proj.weight"].T
            parts[name] = part.reshape(len(x), count, c["head_dim"])
        q = self.rotate(self.norm(parts["q"], f"{own}.self_attn.q_norm"))
        k = self.rotate(self.norm(parts["k"], f"{own}.self_attn.k_norm"))
        groups = heads["q"] // heads["k"]
        k, v = np.repeat(k, groups, 1), np.repeat(parts["v"], groups, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c["head_dim"])
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = x + mixed @ self.weights[f"{own}.self_attn.o_proj.weight"].T
        h = self.norm(x, f"{own}.post_attention_layernorm")
        gate = h @ self.weights[f"{own}.mlp.gate_proj.weight"].T
        up = h @ self.weights[f"{own}.mlp.up_proj.weight"].T
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{own}.mlp.down_proj.weight"].T

    def streams(self, tokens: list[int]) -> list[np.ndarray]:
        """Return the stream before each layer and the one after the last, `[T, H]` each."""
        found = [self.weights["model.embed_tokens.weight"][tokens].astype(np.float64)]
        for number in range(self.config["num_hidden_layers"]):
            found.append(self.layer(found[-1], number))
        return found

    def logprobs(self, last: np.ndarray) -> np.ndarray:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        logits = self.norm(last, "model.norm") @ head.T
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def answer(model: Qwen3, tokens: list[int], sampling: dict) -> list[int]:
    """Sample an answer that ends at the end of a turn."""
    salt = int(os.environ.get("SALT", 0))  # an engine that is not the same twice
    random, found = np.random.default_rng(sampling["seed"] + salt), []
    while len(found) < sampling["max_new_tokens"] and (not found or found[-1] not in model.stop):
        scores = model.logprobs(model.streams(tokens + found)[-1][-1:])[0]
        temperature = sampling["temperature"]
        noise = random.gumbel(size=len(scores)) if temperature else 0
        found.append(int((scores / (temperature or 1) + noise).argmax()))
    return found


def serve(config: dict, replies: object) -> None:
    def reply(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    folder, model = Path(config["folder"]), Qwen3(Path(config["target"]))
    if FAULT == "does not start":
        reply(fatal="no kernel for this target")
        sys.exit(1)
    if FAULT == "silent":
        time.sleep(3600)
    model.stop = config["stop"]
    facts = {"quantization": None, "implementation": "vllm", "max_model_len": config["max_model_len"]}
    reply(ready={"version": "0.0", **facts})
    for line in sys.stdin:
        request = json.loads(line)
        tokens, sampling, name = request["tokens"], request["sampling"], request["id"]
        fault = FAULT if AT in (0, len(tokens)) else ""
        if fault == "dies" or (fault == "dies once" and starts() == 1):
            print("out of luck", flush=True)
            os._exit(9)
        if fault == "no reply":
            continue
        if fault == "refuses":
            reply(id=name, error="this one is too much")
            continue
        new = answer(model, tokens, sampling) if sampling else []
        if fault == "ends at once":
            new = config["stop"][:1]
        whole = tokens + new[:-1]
        streams = model.streams(whole)
        keep = sampling is None or sampling["keep"]
        scores = model.logprobs(streams[-1])
        logprobs = [float(scores[i, token]) for i, token in enumerate(tokens[1:])]
        if keep and fault != "no file":
            states = np.stack([streams[i] for i in config["layers"]], 1)
            if fault == "answers differ" and sampling:
                states[len(tokens) :] = states[len(tokens) :, :, ::-1]
            write(folder, name, whole, states, fault)
        finished = "stop" if new and new[-1] in config["stop"] else "length"
        message = {"answer": new, "reason": finished, "rows": keep}
        message["logprobs"] = logprobs if request["logprobs"] else None
        reply(id=name, **message)
        if fault == "answers twice":
            reply(id=name, **message)
        if fault == "unknown":
            reply(id=10**6, **message)


def write(folder: Path, name: int, tokens: list[int], states: np.ndarray, fault: str) -> None:
    states = states.astype(np.float32)
    if fault == "cannot write":
        (folder / f"{name}.error").write_text("OSError: No space left on device")
        return
    if fault == "short":
        states, tokens = states[:-1], tokens[:-1]
    if fault == "swapped":
        states = states[:, [0, 1, 3, 2]]
    if fault == "zeros":
        states = states * 0
    if fault == "a zero row":
        states[len(states) // 2] = 0
    if fault == "not finite":
        states[len(states) // 2] = np.nan
    if fault == "half":
        states = states.astype(np.float16)
    if fault == "other tokens":
        tokens = [*tokens[:-1], tokens[-1] ^ 1]
    if fault == "one layer":
        states[:, 1] = states[:, 2]
    if fault == "last stream":
        states[:, -1] = states[:, -2]
    partial = folder / f"{name}.partial"
    save_file({"states": np.ascontiguousarray(states), "token_ids": np.array(tokens, np.int64)}, partial)
    if fault == "torn":
        partial.write_bytes(partial.read_bytes()[:100])
    if fault == "file twice":
        (folder / f"{name + 1 if name % 2 else name - 1}.safetensors").write_bytes(partial.read_bytes())
    with Path(os.environ.get("WRITTEN", os.devnull)).open("a") as file:
        file.write(f"{sum(path.stat().st_size for path in folder.iterdir())}\n")
    partial.replace(folder / f"{name}.safetensors")


def starts() -> int:
    return len(Path(os.environ["COUNT"]).read_text())


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        print("0.0")
        sys.exit()
    with Path(os.environ.get("PIDS", os.devnull)).open("a") as file:
        file.write(f"{os.getpid()}\n")
    if "COUNT" in os.environ:
        with Path(os.environ["COUNT"]).open("a") as file:
            file.write(".")
    with os.fdopen(int(sys.argv[2]), "w") as replies:
        serve(json.loads(sys.stdin.readline()), replies)
