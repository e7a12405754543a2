"""llama.cpp's server. Its drafted tokens are read from its log, where it writes each at the debug level."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.child import SILENCE, failed, started
from pipeline.errors import EngineError, UsageError
from pipeline.text import one_line
from train.prove.engine import Answer, run

SERVER, CONVERTER = Path("build/bin/llama-server"), Path("convert_hf_to_gguf.py")
# Errors of a request without a reply, or with one that is no JSON object.
_NO_REPLY = (OSError, http.client.HTTPException, ValueError, TypeError)
# Names of dtypes in llama.cpp.
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Seconds in which the server has loaded its models.
LOADING = 600
# Lines of the log: a request begins; the best candidate of a slot, whose numbers rise in a round.
_REQUEST = re.compile(r"launch_slot_: .*processing task")
_CANDIDATE = re.compile(r"draft candidate\s+0, pos\s+(\d+):\s+(\d+)")


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp, on the CPU.

    Args:
        folder: a built checkout of llama.cpp.
        target: directory of the target, or a GGUF file.
        draft_type: value of `--spec-type` for the draft's kind.
        slots: tokens to draft in a round.
        dtype: that weights are converted to, and that keys and values are kept in.
        work: folder for converted models, and for its output.
    """

    folder: Path
    target: Path
    draft_type: str
    slots: int
    dtype: str
    work: Path
    name = "llama.cpp"

    def __post_init__(self) -> None:
        for part in (SERVER, CONVERTER):
            if not (self.folder / part).is_file():
                raise UsageError(
                    f"expected a built checkout of llama.cpp at {self.folder}, which has no {part}: pass "
                    "--engine-path, or run `make engines`"
                )

    def serve(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, draft: Path | None) -> Answer:
        """As in `Engine`."""
        kept = TYPES[self.dtype]
        name, port = "plain" if draft is None else "draft", _free_port()
        command = [
            *(self.folder / SERVER, "--model", self._converted(self.target, "target")),
            *("--host", "127.0.0.1", "--port", port, "--parallel", "1", "--no-ui", "--verbosity", "5"),
            *("--ctx-size", max(map(len, prompts)) + max_new_tokens + 2 * self.slots + 8),
            *("--cache-type-k", kept, "--cache-type-v", kept, "--flash-attn", "off", "--device", "none"),
            *("--threads", max(1, (os.cpu_count() or 1) // 2)),  # they spin
        ]
        if draft is not None:
            command += [
                *("--model-draft", self._converted(draft, "draft", "--target-model-dir", self.target)),
                *("--spec-type", self.draft_type, "--spec-draft-n-max", self.slots),
                *("--spec-draft-p-min", "0", "--cache-type-k-draft", kept, "--cache-type-v-draft", kept),
            ]
        log = self.work / f"{name}.log"
        with started(list(map(str, command)), log) as process:
            server = _Server(process, port, log)
            server.wait()
            server.complete(prompts[0], max_new_tokens)  # not timed: the first is slow
            begun = time.perf_counter()
            texts = [server.complete(prompt, max_new_tokens) for prompt in prompts]
            seconds = time.perf_counter() - begun
            version = self._origin() or server.build()
        drafts = read_drafts(log.read_text(encoding="utf-8", errors="replace"))[1:]
        return Answer(f"llama.cpp {version}", texts, drafts, seconds)

    def _origin(self) -> str:
        """Return where `make engines` has its source from; empty for another checkout."""
        path = self.folder / ".ready"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def _converted(self, model: Path, name: str, *options: str | Path) -> Path:
        """Return a GGUF file of a model, made by llama.cpp's own converter where there is none."""
        if model.is_file():
            return model
        kind = TYPES[self.dtype]
        exported = model / f"{name}-{kind}.gguf"  # by `dspark export --gguf`
        if exported.is_file():
            return exported
        if self.target.is_file():
            raise UsageError(
                f"beside a target's GGUF file, llama.cpp needs the draft's: export it with --gguf {kind} "
                f"--target-gguf {self.target}"
            )
        found = self.work / f"{name}-{kind}.gguf"
        if not found.exists():
            command = [sys.executable, self.folder / CONVERTER, model, *options]
            path = os.pathsep.join(map(str, (self.folder / "gguf-py", self.folder / "site-packages")))
            run(
                [*command, "--outtype", kind, "--outfile", found],
                self.work / f"convert-{name}.log",
                {"PYTHONPATH": path},
            )
        return found


@dataclass
class _Server:
    process: subprocess.Popen
    port: str
    log: Path

    def wait(self) -> None:
        """Wait until it has loaded its models. Raise EngineError if it ends or takes too long."""
        for _ in range(2 * LOADING):
            if self.process.poll() is not None:
                raise failed("llama-server", self.log)
            try:
                self._open("/health", None)
            except _NO_REPLY:
                time.sleep(0.5)
            else:
                return
        raise EngineError(
            f"llama-server has not loaded its models in {LOADING} s; its output is in {self.log}"
        )

    def build(self) -> str:
        """Return what it says of its build."""
        return str(self._ask("/props", None).get("build_info", "of an unknown build"))

    def complete(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation's tokens."""
        request = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        tokens = self._ask("/completion", request).get("tokens")
        if not isinstance(tokens, list):
            raise failed("llama-server", self.log)
        return tokens

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return the reply to a request. Raise EngineError if there is none."""
        try:
            return self._open(path, body)
        except urllib.error.HTTPError as error:
            raise EngineError(f"llama-server refused a request: {one_line(error.read().decode())}") from None
        except _NO_REPLY:
            raise failed("llama-server", self.log) from None

    def _open(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return the reply to a request. Raises one of `_NO_REPLY` if there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy
        with opener.open(request, timeout=SILENCE if data else 5) as answer:
            return dict(json.load(answer))


def _free_port() -> str:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return str(own.getsockname()[1])


def read_drafts(log: str) -> list[list[list[int]]]:
    """Return the drafted tokens of each request in a server's log, round after round."""
    requests: list[list[list[int]]] = []
    last = -1
    for line in log.splitlines():
        if _REQUEST.search(line):
            requests.append([])
            last = -1
        elif (found := _CANDIDATE.search(line)) and requests:
            slot, token = map(int, found.groups())
            if slot <= last or not requests[-1]:
                requests[-1].append([])
            requests[-1][-1].append(token)
            last = slot
    return requests
