"""A driver of vLLM's worker, as plain as can be, and the environment that vLLM is in."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
WORKER = ROOT / "capture" / "engines" / "worker" / "run_vllm.py"
PATIENCE_SECONDS = 180


def python() -> Path:
    """Return the interpreter of vLLM's environment; skip the test if there is none."""
    named = os.environ.get("DSPARK_VLLM_PYTHON")
    path = Path(named or ROOT / ".cache" / "engines" / "vllm" / "bin" / "python")
    if not path.exists() or not (named or (path.parents[1] / ".ready").exists()):
        pytest.skip(f"no vLLM at {path}: run `make engines`, or set DSPARK_VLLM_PYTHON")
    return path


class Driver:
    """A worker at work, its requests and what comes of them.

    Args:
        folder: for rows; made.
        config: of the first line, besides target and folder.
    """

    def __init__(self, folder: Path, target: Path, **config: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder.with_suffix(".log")
        read, write = os.pipe()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [python(), WORKER, str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,
            )
        os.close(write)
        self._replies, self._rest = read, b""
        values = {"dtype": "float32", "layers": [0, 3, 6], "max_model_len": 300, "tensor_parallel": 1}
        values |= {"arguments": {}, **config}
        self._write({"target": str(target), "folder": str(folder), **values})

    def _write(self, line: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def send(self, number: int, tokens: list[int], logprobs: bool = False, **sampling: Any) -> None:
        """Send a request: a prefill, or with `max_new_tokens` and the like an answer."""
        plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "keep": True}
        asked = {**plain, **sampling} if sampling else None
        self._write({"id": number, "tokens": tokens, "logprobs": logprobs, "sampling": asked})

    def read(self) -> dict[str, Any] | None:
        """Return the next reply; None when there are no more."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\n" not in self._rest:
            if not select.select([self._replies], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no reply: {self.log.read_text()[-2000:]}")
            if not (more := os.read(self._replies, 1 << 16)):
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ready(self) -> dict[str, Any]:
        """Return what the engine says of itself when it has started."""
        reply = self.read() or {}
        assert "ready" in reply, (reply, self.log.read_text()[-5000:])
        return reply["ready"]

    def read_all(self, count: int) -> dict[int, dict[str, Any]]:
        """Return the next `count` replies by their ids."""
        replies = [self.read() for _ in range(count)]
        assert all(reply and "id" in reply for reply in replies), (replies, self.log.read_text()[-2000:])
        return {reply["id"]: reply for reply in replies}

    def rows(self, number: int) -> tuple[list[int], torch.Tensor]:
        """Return a request's token ids and states, and remove its file."""
        path = self.wait_for(f"{number}.safetensors")
        tensors = load_file(path)
        path.unlink()
        assert tensors["token_ids"].dtype == torch.int64
        return tensors["token_ids"].tolist(), tensors["states"]

    def wait_for(self, name: str) -> Path:
        """Return a file that comes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, (name, sorted(self.folder.iterdir()))
            time.sleep(0.01)
        return self.folder / name

    def processes(self) -> dict[str, int]:
        """Return the processes of the worker's session that are at work, by their names."""
        command = ["ps", "-o", "pid=,state=,comm=", "-s", str(self.process.pid)]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        fields = [line.split(maxsplit=2) for line in lines]
        return {name: int(pid) for pid, state, name in fields if state[0] != "Z"}

    def ended(self, seconds: float) -> int:
        """Return the exit code of a worker that ends in so many seconds, with all that it started."""
        deadline = time.monotonic() + seconds
        code = self.process.wait(seconds)
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        return code

    def close(self) -> None:
        """End whatever is left."""
        for pid in self.processes().values():
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        self.process.wait()
        self.process.stdin.close()
        os.close(self._replies)
