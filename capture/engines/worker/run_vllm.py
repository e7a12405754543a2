"""vLLM as an engine of captures. Runs in vLLM's environment, and imports nothing of this project:

    python run_vllm.py REPLY_FD

Lines of JSON come on stdin, the configuration first and then requests; lines of JSON go to REPLY_FD. Rows of
hidden states come as files, see connector.py. The end of stdin ends the engine.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from arguments import EngineError, RequestError, check, engine_arguments, sampling_arguments

os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # in process, the last requests would wait for a next one
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # its processes import this module, and inherit no pipe
}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
on_cpu = not torch.cuda.is_available()
if on_cpu:
    sys.path.insert(0, str(Path(__file__).parents[3] / "pipeline" / "vllm_worker"))
    import cpu_triton

    cpu_triton.install()
Json = dict[str, Any]
Reply = Callable[[Json], None]


def one_line(error: BaseException) -> str:
    """Return an error's kind and message without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class Worker:
    """An engine, its requests and its replies. Made inside a running event loop.

    Args:
        config: the first line of stdin.
        reply: sends a line.

    Raises:
        EngineError: the engine can't be started.
    """

    def __init__(self, config: Json, reply: Reply) -> None:
        check(config)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._reply, self._folder = reply, Path(config["folder"])
        arguments = engine_arguments(config, on_cpu)
        whole = AsyncEngineArgs(**arguments).create_engine_config()
        self._model = whole.model_config
        count = self._model.get_total_num_hidden_layers()
        if config["layers"][-1] > count:
            raise EngineError(f"layers {config['layers']}: the last id of this target is {count}")
        try:
            self._engine = AsyncLLM.from_vllm_config(whole, disable_log_stats=True)
        except Exception as error:
            raise EngineError(f"vLLM did not start{self._unsupported()}: {one_line(error)}") from error
        self._stop = config.get("stop", self._stop_ids())

    def _unsupported(self) -> str:
        """Return a remark if vLLM's class of the target is one that gives no hidden states."""
        from vllm.model_executor.models.interfaces import supports_eagle3

        kind, _ = self._model.registry.resolve_model_cls(self._model.architectures, self._model)
        return "" if supports_eagle3(kind) else f" (its {kind.__name__} gives no hidden states)"

    def _stop_ids(self) -> list[int]:
        """Return the tokens at which the target stops, by its generation config."""
        found = self._model.try_get_generation_config().get("eos_token_id")
        return found if isinstance(found, list) else [found] if found is not None else []

    def facts(self) -> Json:
        """Return what the engine is."""
        import vllm

        return {
            "version": vllm.__version__,
            "quantization": self._model.quantization,
            "implementation": "transformers" if self._model.using_transformers_backend() else "vllm",
            "max_model_len": self._model.max_model_len,
        }

    async def serve(self, request: Json) -> None:
        """Serve a request and reply to it.

        Raises:
            EngineError: the engine has ended.
        """
        try:
            self._reply({"id": request["id"], **await self._answer(request)})
        except Exception as error:
            self.check_alive()
            self._reply({"id": request["id"], "error": one_line(error.__cause__ or error)})

    async def _answer(self, request: Json) -> Json:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        limit, vocabulary = self._model.max_model_len, self._model.get_vocab_size()
        arguments = sampling_arguments(request, self._stop, limit, vocabulary)
        params = SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = {"prompt_token_ids": request["tokens"]}
        async for output in self._engine.generate(prompt, params, str(request["id"])):
            answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RequestError(f"the engine ended it with {answer.finish_reason!r}")
        logprobs = None
        if request["logprobs"]:
            pairs = zip(request["tokens"][1:], output.prompt_logprobs[1:], strict=True)
            logprobs = [found[token].logprob for token, found in pairs]
        return {
            "answer": list(answer.token_ids) if request["sampling"] else [],
            "reason": answer.finish_reason,
            "logprobs": logprobs,
            "rows": bool(arguments["extra_args"]["kv_transfer_params"]),
        }

    def check_alive(self) -> None:
        """Check that the engine's processes are at work.

        Raises:
            EngineError: one has ended.
        """
        if self._engine.errored:
            gone = "" if self._folder.is_dir() else f"; {self._folder} is gone"
            raise EngineError(f"a process of vLLM has ended, see its output{gone}")

    async def watch(self) -> NoReturn:
        """Check that once a second: without a request, nobody else would."""
        while True:
            self.check_alive()
            await asyncio.sleep(1)

    def end(self) -> None:
        """End the engine's processes."""
        self._engine.shutdown()


async def run(config: Json, reply: Reply) -> None:
    """Serve requests until stdin ends.

    Raises:
        EngineError: the engine can't be started, or has ended.
    """
    loop, inbox, ready = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()
    tasks: set[asyncio.Task] = set()

    def read() -> None:
        for line in sys.stdin.buffer:
            loop.call_soon_threadsafe(inbox.put_nowait, line)
        if not ready.is_set():  # loading takes minutes, in which the loop stands still
            leave(0)
        loop.call_soon_threadsafe(inbox.put_nowait, None)

    def start(work: Coroutine) -> None:
        tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(ended)

    def ended(task: asyncio.Task) -> None:
        tasks.discard(task)
        if error := task.exception():
            inbox.put_nowait(error)

    threading.Thread(target=read, daemon=True).start()
    worker = Worker(config, reply)
    reply({"ready": worker.facts()})
    ready.set()
    start(worker.watch())
    while (item := await inbox.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        start(worker.serve(json.loads(item)))
    worker.end()


async def run_to_the_end(descriptor: int) -> NoReturn:
    """Serve a driver. Leaves from inside the event loop: to cancel requests of a dead engine may hang."""
    with open(descriptor, "w", encoding="utf-8", buffering=1) as replies:

        def reply(message: Json) -> None:
            replies.write(json.dumps(message) + "\n")

        try:
            await run(json.loads(sys.stdin.buffer.readline()), reply)
        except Exception as error:
            with suppress(OSError):
                reply({"fatal": str(error) if isinstance(error, EngineError) else one_line(error)})
            leave(1)
        leave(0)


def leave(code: int) -> NoReturn:
    """End this process at once, and those that it started."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    asyncio.run(run_to_the_end(int(sys.argv[1])))
elif __name__ == "__mp_main__":  # in a process that vLLM started: it ends with the one that started it

    def _end_with(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
