"""Requests to an engine's worker, and their answers in the same order.

The worker writes each sample's rows of states to a file in a folder that both see. What is sent and not yet
taken is bounded in bytes, because the worker does not wait for a reader. An engine that dies is started
again; the requests that it had are then sent one by one, so that the one that kills it is known.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from capture.console import note
from capture.engines.worker_process import EngineEndedError, WorkerProcess
from pipeline.child import SILENCE
from pipeline.errors import TargetError
from pipeline.text import one_line

# Seconds from an answer to its file, after which the file is not awaited any longer.
FILE_SECONDS = 300
# Seconds for loading a target: hundreds of gigabytes may come over a network.
LOADING = 7200
# Times that an engine may die without finishing a request.
MAX_DEATHS = 3
# Seconds between two looks for a file, and for an answer.
_FILE_POLL, _POLL = 0.002, 0.2


@dataclass(frozen=True, eq=False)
class Request:
    """Tokens for the engine."""

    tokens: np.ndarray
    """`[S]` int32."""
    place: str
    """Their place in the data, for messages."""
    logprobs: bool = False
    """Ask for the log-probabilities of the tokens, from the second on."""
    sampling: Mapping[str, Any] | None = None
    """Settings of an answer; None asks for the states of the tokens alone."""

    @property
    def keeps_rows(self) -> bool:
        """True if the states are wanted."""
        return self.sampling is None or bool(self.sampling["keep"])

    @property
    def max_rows(self) -> int:
        """The most rows of states that can come."""
        answer = 0 if self.sampling is None else int(self.sampling["max_new_tokens"])
        return (len(self.tokens) + answer) * self.keeps_rows


@dataclass
class Answer:
    """An engine's answer to a request."""

    states: Tensor | None = None
    """`[T, L, H]` in the order of the layers that were asked for; None if they were not wanted, or failed."""
    tokens: list[int] = field(default_factory=list)
    """The answer's tokens."""
    finished: str = ""
    """stop or length."""
    logprobs: Tensor | None = None
    """`[S - 1]` fp32."""
    failure: str = ""
    """The reason why there is nothing."""


@dataclass(eq=False)
class _Slot:
    """A request on its way."""

    request: Request
    id: int = -1
    message: dict[str, Any] | None = None
    """The worker's answer."""
    answered: float = 0.0
    """When it came, on the monotonic clock."""
    failure: str = ""


class Stream:
    """Requests sent ahead within a bound, and answers in order.

    Args:
        start: starts a worker.
        folder: where its files appear.
        shape: layers and hidden size of a row.
        dtype: of the states.
        bound: maximum bytes of states that are sent for and not yet taken. One request is always allowed.

    Raises:
        TargetError: the engine does not start.
    """

    def __init__(
        self,
        start: Callable[[], WorkerProcess],
        folder: Path,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bound: int,
    ):
        self._start, self._folder, self._shape, self._dtype = start, folder, shape, dtype
        self.bound, self.peak = bound, 0
        """Allowed and largest bytes of states on their way."""
        self.died = False
        """True if the engine ever ended by itself."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called often while an answer is awaited; raises to stop."""
        self._order: deque[_Slot] = deque()
        self._waiting: deque[_Slot] = deque()
        self._sent: dict[int, _Slot] = {}
        self._careful: set[_Slot] = set()
        """Requests that an engine had when it died: each is sent alone."""
        self._done: dict[int, str] = {}
        self._bytes, self._deaths, self._next = 0, 0, 0
        self._process: WorkerProcess | None = None
        self.facts = self._restart()

    def expect(self, requests: Iterable[Request]) -> None:
        """Add requests to those that `take` returns the answers of."""
        for request in requests:
            slot = _Slot(request)
            self._order.append(slot)
            self._waiting.append(slot)

    @property
    def next(self) -> Request | None:
        """The request whose answer `take` returns next."""
        return self._order[0].request if self._order else None

    def drop(self) -> None:
        """Forget every request. Those that were sent are waited for, because their files will come."""
        for slot in self._waiting:
            self._order.remove(slot)
        self._waiting.clear()
        while self._order:
            self.take()

    def take(self) -> Answer:
        """Return the answer to the next request.

        Raises:
            TargetError: it never comes, is incomplete, or is not the answer to this request; or the engine
                dies again and again.
        """
        slot, heard = self._order[0], time.monotonic()
        while not self._is_ready(slot):
            try:
                self._send()
                self.while_waiting()
                message = self._worker.receive(_FILE_POLL if slot.message else _POLL)
            except EngineEndedError as ended:
                self._recover(ended)
                heard = time.monotonic()
                continue
            if message is not None:
                self._accept(message)
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENCE:
                raise TargetError(
                    f"vLLM has been silent for {SILENCE} s, with {slot.request.place} unanswered: the same "
                    "command continues"
                )
        self._order.popleft()
        answer = self._answer(slot)
        self._bytes -= self._size(slot)
        self._done[slot.id] = slot.request.place
        self._careful.discard(slot)
        self._sent.pop(slot.id, None)
        return answer

    def check_folder(self) -> None:
        """Refuse files that nobody waits for. Raises TargetError naming the sample."""
        for path in self._folder.glob("*.safetensors"):
            place = self._done.get(int(path.stem)) if path.stem.isdecimal() else None
            if place is not None:
                raise TargetError(f"vLLM gave the states of {place} twice: report it, with its version")
        self._done.clear()

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.close()
            self._process = None

    @property
    def _worker(self) -> WorkerProcess:
        assert self._process is not None
        return self._process

    def _size(self, slot: _Slot) -> int:
        layers, width = self._shape
        return slot.request.max_rows * layers * width * self._dtype.itemsize

    def _send(self) -> None:
        """Send what may be sent."""
        while self._waiting:
            slot = self._waiting[0]
            size, alone = self._size(slot), bool(self._careful)
            if self._sent and (self._bytes + size > self.bound or (alone and self._unfinished())):
                return
            self._waiting.popleft()
            slot.id, self._next = self._next, self._next + 1
            self._sent[slot.id] = slot
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            self._worker.send(
                {
                    "id": slot.id,
                    "tokens": slot.request.tokens.tolist(),
                    "logprobs": slot.request.logprobs,
                    "sampling": slot.request.sampling and dict(slot.request.sampling),
                }
            )

    def _unfinished(self) -> list[_Slot]:
        """Return the requests that the engine has and has not finished."""
        return [slot for slot in self._sent.values() if not self._is_ready(slot)]

    def _file(self, slot: _Slot, suffix: str = "safetensors") -> Path:
        return self._folder / f"{slot.id}.{suffix}"

    def _is_ready(self, slot: _Slot) -> bool:
        """Return whether a request is finished: it has failed, or its answer and its file are there."""
        if slot.failure or slot.message is None:
            return bool(slot.failure)
        if not slot.request.keeps_rows or self._file(slot).exists():
            return True
        if self._file(slot, "error").exists():
            reason = self._file(slot, "error").read_text(encoding="utf-8", errors="replace")
            raise TargetError(f"vLLM could not write the states of {slot.request.place}: {one_line(reason)}")
        if time.monotonic() - slot.answered > FILE_SECONDS:
            raise TargetError(
                f"the states of {slot.request.place} never came, in {FILE_SECONDS} s after vLLM's answer"
            )
        return False

    def _accept(self, message: Mapping[str, Any]) -> None:
        """Take a line of the worker. Raises TargetError for one that nobody waits for."""
        slot = self._sent.get(message.get("id", -1))
        if slot is None or slot.message is not None or slot.failure:
            place = slot.request.place if slot else self._done.get(message.get("id", -1))
            what = f"answered {place} twice" if place else f"sent a line that nobody expects ({message})"
            raise TargetError(f"vLLM {what}: report it, with its version")
        self._deaths = 0
        slot.answered = time.monotonic()
        if "error" in message:
            slot.failure = one_line(str(message["error"]))
        else:
            slot.message = dict(message)

    def _answer(self, slot: _Slot) -> Answer:
        """Return a finished request's answer, checked, and remove its file."""
        if slot.failure:
            return Answer(failure=slot.failure)
        message, request = slot.message or {}, slot.request
        answer = Answer(tokens=list(message["answer"]), finished=message["reason"])
        if request.logprobs:
            answer.logprobs = torch.tensor(message["logprobs"] or [], dtype=torch.float32)
            if len(answer.logprobs) != len(request.tokens) - 1:
                raise _wrong(request, f"{len(answer.logprobs)} log-probabilities", len(request.tokens) - 1)
        if request.keeps_rows:
            answer.states = self._read(slot, answer.tokens)
        return answer

    def _read(self, slot: _Slot, answer: list[int]) -> Tensor:
        """Return the states `[T, L, H]` of a finished request, and remove their file."""
        path, request = self._file(slot), slot.request
        try:
            found = load_file(path)
            # A copy: the tensors of the file are views of its pages, which stay in the folder's memory.
            ids, states = found["token_ids"], found["states"].clone()
        except (OSError, SafetensorError, KeyError) as error:
            raise _wrong(request, f"a file that can't be read ({one_line(error)})", "states") from None
        path.unlink()
        expected = torch.from_numpy(request.tokens.astype(np.int64))
        expected = torch.cat([expected, torch.tensor(answer[:-1], dtype=torch.int64)])
        shape = (len(expected), *self._shape)
        if states.shape != shape or states.dtype != self._dtype:
            raise _wrong(
                request, f"states {list(states.shape)} {states.dtype}", f"{list(shape)} {self._dtype}"
            )
        if not torch.equal(ids, expected):
            raise _wrong(request, "the states of other tokens", "its own")
        return states

    def _recover(self, ended: EngineEndedError) -> None:
        """Start the engine again after it died, and find the request that kills it."""
        self._deaths += 1
        self.died = True
        lost = self._unfinished()
        if self._deaths > MAX_DEATHS:
            raise TargetError(f"vLLM has ended {self._deaths} times and finished nothing: {ended}")
        if len(lost) == 1 and self._careful:
            lost[0].failure = f"vLLM ends at it: {ended}"
            note(f"warning: vLLM ends each time at {lost[0].request.place}: {ended}")
        else:
            rows = f", with {len(lost):,} samples at work" if lost else ""
            note(f"warning: vLLM has ended{rows}, and is started again: {ended}")
        again = [slot for slot in lost if not slot.failure]
        for slot in again:
            del self._sent[slot.id]
            self._bytes -= self._size(slot)
            slot.message = None
        self._careful.update(again)
        self._waiting.extendleft(reversed(again))
        self._restart()

    def _restart(self) -> dict[str, Any]:
        """Start a worker, wait until it is ready, and return what it says of itself.

        Raises:
            TargetError: it does not start.
        """
        self.close()
        waited = {self._file(slot).name for slot in self._sent.values()}
        for path in self._folder.iterdir():
            if path.name not in waited:
                path.unlink()
        self._process, begun = self._start(), time.monotonic()
        try:
            while time.monotonic() - begun < LOADING:
                self.while_waiting()
                message = self._process.receive(_POLL)
                if message is not None and "ready" in message:
                    return message["ready"]
            raise TargetError(f"vLLM has not loaded the target in {LOADING} s")
        except EngineEndedError as ended:
            self.close()
            raise TargetError(f"vLLM can't run the target: {ended}") from None
        except BaseException:
            self.close()
            raise


def _wrong(request: Request, got: str, expected: object) -> TargetError:
    """Return the error for an answer that can't be the request's."""
    return TargetError(
        f"vLLM gave {got} for {request.place}, {len(request.tokens):,} tokens; expected {expected}: report "
        "it, with its version"
    )
