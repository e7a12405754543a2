"""Stand-ins for engines, as programs of their own, which give the answers that a test has written for them.

A test's folder of answers has plain.json and draft.json: an `Answer` each.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ANSWERS, FAULT, PIDS = "DSPARK_TEST_ANSWERS", "DSPARK_TEST_FAULT", "DSPARK_TEST_PIDS"


def program(path: Path, name: str) -> None:
    """Write a program that runs a function of this module."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
    path.chmod(0o755)


def environment(folder: Path) -> Path:
    """Make what passes for vLLM's virtual environment."""
    program(folder / "bin" / "python", "vllm")
    return folder


def checkout(folder: Path) -> Path:
    """Make what passes for a built checkout of llama.cpp. Its converter writes what it was given."""
    program(folder / "build" / "bin" / "llama-server", "llama_server")
    (folder / "convert_hf_to_gguf.py").write_text(
        "import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv[1:]))\n"
    )
    return folder


def answer(draft: bool) -> dict[str, Any]:
    return json.loads(Path(os.environ[ANSWERS], "draft.json" if draft else "plain.json").read_text())


def vllm(_worker: str, asked: str, answered: str) -> None:
    """Stand in for `python run_vllm.py REQUEST ANSWER`."""
    request = json.loads(Path(asked).read_text())
    if os.environ.get(FAULT) == "crash":
        raise SystemExit("Traceback\nValueError: no such kernel")
    if os.environ.get(FAULT) == "hang":
        child = subprocess.Popen(["sleep", "600"])
        Path(os.environ[PIDS]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    found = answer(request["draft"] is not None)
    assert len(request["prompts"]) == len(found["texts"])
    assert request["dtype"] == "float32"
    assert request["speculative"]["method"] == "dspark"
    Path(answered).write_text(json.dumps(found))


def llama_server(*arguments: str) -> None:
    """Stand in for llama-server: answers on its port, and writes drafted tokens to its log as it does."""
    options = dict(itertools.pairwise(arguments))
    assert options["--host"] == "127.0.0.1"
    if os.environ.get(FAULT) == "crash":
        raise SystemExit("error: no such model")
    found = answer("--model-draft" in options)
    if "--model-draft" in options:
        assert "--target-model-dir" in Path(options["--model-draft"]).read_text()
        assert options["--spec-type"] == "draft-dspark"
    texts = [found["texts"][0], *found["texts"]]  # the first prompt comes twice
    drafts = [found["drafts"][0], *found["drafts"]] if found["drafts"] else [[]] * len(texts)

    class Handler(BaseHTTPRequestHandler):
        number = 0

        def reply(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.reply({"build_info": "of the tests"})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            print("slot launch_slot_: id  0 | task 7 | processing task, is_child = 0", flush=True)
            for drafted in drafts[Handler.number]:
                for slot, token in enumerate(drafted):
                    for k in range(3):
                        line = f" - seq_id 0, draft candidate {k:3}, pos {slot:3}: {token + k:6}"
                        print(f"{line} (   0.250) 'x'", flush=True)
            if os.environ.get(FAULT) == "dies":
                os._exit(1)
            if os.environ.get(FAULT) == "lies":
                self.reply(["no object"])  # type: ignore[arg-type]
                return
            self.reply({"tokens": texts[Handler.number]})
            Handler.number += 1

        def log_message(self, *_: object) -> None: ...

    HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    {"vllm": vllm, "llama_server": llama_server}[sys.argv[1]](*sys.argv[2:])
