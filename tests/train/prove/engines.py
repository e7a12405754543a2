"""Stand-ins for engines, as programs of their own: they do what this project does, or make one mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RUN, FAULT, PIDS = "DSPARK_TEST_RUN", "DSPARK_TEST_FAULT", "DSPARK_TEST_PIDS"


def program(path: Path, name: str) -> Path:
    """Write a program that runs a function of this module."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import tests.train.prove.engines as e; e.{name}()" "$@"\n'
    )
    path.chmod(0o755)
    return path


def environment(folder: Path) -> Path:
    """Make what passes for vLLM's virtual environment."""
    program(folder / "bin" / "python", "vllm")
    return folder


def checkout(folder: Path) -> Path:
    """Make what passes for a built checkout of llama.cpp. Its converter writes the path that it was given."""
    program(folder / "build" / "bin" / "llama-server", "llama_server")
    (folder / "convert_hf_to_gguf.py").write_text(
        "import sys\nopen(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(sys.argv[1])\n"
    )
    return folder


def decode(target: str, prompts: list[list[int]], new: int, draft: bool) -> tuple[list, list]:
    """Return texts and drafts, with the mistake that the environment asks for."""
    from transformers import AutoModelForCausalLM

    from train.decode.speculative import decode_plain, decode_speculative
    from train.decode.target import CachedTarget
    from train.runs.open import open_draft

    fault = os.environ.get(FAULT)
    model = AutoModelForCausalLM.from_pretrained(target, dtype="float32").eval()
    trained = open_draft(Path(os.environ[RUN]))
    own = trained.model()
    own.embed_tokens.weight.data.copy_(model.get_input_embeddings().weight)
    own.lm_head.weight.data.copy_(own.head_rows(model.get_output_embeddings().weight))
    decoder, log = trained.kind.decoder(own.eval()), []
    propose = decoder.draft

    def logged(*args: Any, **kwargs: Any) -> Any:
        drafted = propose(*args, **kwargs)
        log.append(drafted.tokens.tolist())
        return drafted

    decoder.draft = logged
    texts, drafts = [], []
    with CachedTarget(model, trained.shape.target_layer_ids) as watched:
        for prompt in prompts:
            log.clear()
            found = (
                decode_speculative(watched, decoder, prompt, new)
                if draft
                else decode_plain(watched, prompt, new)
            )
            texts.append(found.tokens)
            drafts.append(list(log))
    if fault == "token" and draft:
        drafts[-1][0][-1] += 1
    if fault == "text" and draft:
        texts[-1][-1] += 1
    return texts, drafts


def vllm() -> None:
    """Stand in for `python run_vllm.py REQUEST ANSWER`."""
    request = json.loads(Path(sys.argv[2]).read_text())
    if os.environ.get(FAULT) == "crash":
        raise SystemExit("Traceback\nValueError: no such kernel")
    if os.environ.get(FAULT) == "hang":
        child = subprocess.Popen(["sleep", "600"])
        Path(os.environ[PIDS]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    with_draft = request["draft"] is not None
    texts, drafts = decode(request["target"], request["prompts"], request["max_new_tokens"], with_draft)
    answer = {"version": "vLLM of the tests", "texts": texts, "drafts": drafts, "seconds": 1.0}
    Path(sys.argv[3]).write_text(json.dumps(answer))


def llama_server() -> None:
    """Stand in for llama-server: answers on its port, and writes drafted tokens to its log as that one does."""
    arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    assert arguments["--host"] == "127.0.0.1"
    if os.environ.get(FAULT) == "crash":
        raise SystemExit("error: no such model")
    target = Path(arguments["--model"]).read_text()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            self.answer({"build_info": "of the tests"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            draft = "--model-draft" in arguments
            (text,), (drafts,) = decode(target, [body["prompt"]], body["n_predict"], draft)
            print("slot launch_slot_: id  0 | task 7 | processing task, is_child = 0", flush=True)
            for drafted in drafts:
                for slot, token in enumerate(drafted):
                    for candidate in range(3):
                        line = (
                            f" - seq_id 0, draft candidate {candidate:3}, pos {slot:3}: {token + candidate:6}"
                        )
                        print(f"{line} (   0.250) 'x'", flush=True)
            self.answer({"tokens": text})

        def log_message(self, *_: object) -> None: ...

    HTTPServer(("127.0.0.1", int(arguments["--port"])), Handler).serve_forever()
