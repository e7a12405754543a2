"""Answers by any server that speaks OpenAI's chat completions: `vllm serve`, SGLang, llama.cpp, ..."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from capture.regenerate.dialogue import Answer, Dialogue, with_arguments
from capture.regenerate.engine import Outcome, Report, Sampling, trim_unfinished
from pipeline.errors import DataError, TargetError, UsageError

# Waits between tries double from the first to the longest, each halved or less by jitter.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_CHECK_TIMEOUT_S = 15.0

# Statuses that speak about the endpoint, the key or the model, and would be the same for every row.
_FATAL = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check --endpoint and --model"}
_BUSY = {408, 409, 425, 429}
# Ends of an answer that is none.
_BROKEN_OFF = {"abort", "content_filter", "error"}


class _TryAgainError(Exception):
    """A try that failed through no fault of the row."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s
        """How long the server asks us to wait."""


class EndpointEngine:
    """Converses with an endpoint, up to `concurrency` dialogues at once."""

    def __init__(
        self,
        endpoint: str,
        sampling: Sampling,
        *,
        model: str | None = None,
        concurrency: int = 32,
        retries: int = 6,
        timeout_s: float = 600.0,
        template_arguments: dict[str, Any] | None = None,
    ):
        """Find the endpoint and the model.

        Args:
            endpoint: with or without the path that OpenAI's clients expect (`/v1`).
            model: as served; may be left out where the endpoint serves one model only.

        Raises:
            UsageError: not a URL, or which of several models is meant.
            TargetError: the `openai` package is missing, or nothing answers there.
        """
        try:
            import openai
        except ImportError:
            raise TargetError(
                "--endpoint needs the openai package: pip install 'dspark-pipeline[endpoint]'"
            ) from None
        self._openai = openai
        self._url = _base_url(endpoint)
        self._sampling = sampling
        self._concurrency = concurrency
        self._retries = retries
        self._timeout_s = timeout_s
        self._template_arguments = template_arguments or {}
        self.model = asyncio.run(self._find_model(model))
        """Its name, as served."""

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        """See `Engine.answer`. Raises TargetError when the endpoint as a whole stops answering."""
        try:
            asyncio.run(self._converse_with_all(dialogues, report))
        except BaseExceptionGroup as group:  # the first says it; the others were cancelled or say the same
            raise group.exceptions[0] from None

    def _client(self, timeout_s: float) -> Any:
        return self._openai.AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # servers of one's own ask for none
            timeout=timeout_s,
            max_retries=0,  # ours also cover bodies that are cut short, and the time a whole answer takes
        )

    async def _find_model(self, model: str | None) -> str:
        timeout_s = min(self._timeout_s, _CHECK_TIMEOUT_S)
        async with self._client(timeout_s) as client:
            try:
                served = await self._served(client, timeout_s)
            except _TryAgainError as error:
                raise TargetError(
                    f"{self._url} does not answer ({error}): start the server, or check --endpoint"
                ) from None
        if model is not None:
            return model
        if len(served) != 1:
            names = ", ".join(served) or "nothing that it lists"
            raise UsageError(f"{self._url} serves {names}: say with --model which to ask")
        return served[0]

    async def _served(self, client: Any, timeout_s: float) -> list[str]:
        """The models that the endpoint lists; it may list none. Raises _TryAgainError unless it's alive."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await client.models.with_raw_response.list()
            return [str(model["id"]) for model in json.loads(reply.http_response.content)["data"]]
        except (ValueError, KeyError, TypeError):
            return []  # something answers, though not with a list
        except TimeoutError:
            raise _TryAgainError(f"timed out after {timeout_s:g} s") from None
        except self._openai.APIConnectionError as error:
            raise _TryAgainError(_reason(error)) from None
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._fatal(error) from None
            if error.status_code >= 500:
                raise _TryAgainError(_reason(error)) from None
            return []  # alive, though it lists nothing

    async def _converse_with_all(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        waiting = iter([dialogue for dialogue in dialogues if not dialogue.finished])

        async def work(client: Any) -> None:
            for dialogue in waiting:  # shared: each worker takes the next
                await self._converse(client, dialogue, report)

        async with self._client(self._timeout_s) as client, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(work(client))

    async def _converse(self, client: Any, dialogue: Dialogue, report: Report) -> None:
        """Answer what is left of a dialogue, turn by turn."""
        while not dialogue.finished:
            try:
                answer = await self._ask_with_retries(client, dialogue)
            except DataError as error:
                report([Outcome(dialogue, failure=str(error))])
                return
            report([Outcome(dialogue, answer)])

    async def _ask_with_retries(self, client: Any, dialogue: Dialogue) -> Answer:
        request = self._request(dialogue)
        tries = 0
        while True:
            try:
                return self._read(await self._ask(client, request), dialogue)
            except _TryAgainError as error:
                tries += 1
                if tries > self._retries:
                    await self._check_alive(client, error)
                    raise DataError(f"gave up after {tries} tries: {error}") from None
                wait_s = min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(wait_s, min(error.wait_s or 0.0, _LONGEST_WAIT_S)))

    async def _check_alive(self, client: Any, last: _TryAgainError) -> None:
        """Tell a row that fails from an endpoint that is gone, which would fail every row left."""
        try:
            await self._served(client, min(self._timeout_s, _CHECK_TIMEOUT_S))
        except _TryAgainError:
            raise TargetError(
                f"{self._url} stopped answering ({last}): once it is back, run this again (without --fresh) "
                "to continue"
            ) from None

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        sampling = self._sampling
        extra: dict[str, Any] = {}
        if sampling.temperature > 0 and sampling.top_k:
            extra["top_k"] = sampling.top_k  # no parameter of OpenAI's, but of every open server
        if self._template_arguments:
            extra["chat_template_kwargs"] = self._template_arguments
        tools = dialogue.tools()
        return {
            "model": self.model,
            "messages": with_arguments(dialogue.prompt(), _as_text),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _turn_seed(sampling.seed, dialogue),
            **({"tools": tools} if tools else {}),
            **({"extra_body": extra} if extra else {}),
        }

    async def _ask(self, client: Any, request: dict[str, Any]) -> bytes:
        """One try. Raises _TryAgainError, DataError (the row's fault) or TargetError (nobody's row's)."""
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await client.chat.completions.with_raw_response.create(**request)
            return reply.http_response.content
        except (TimeoutError, self._openai.APITimeoutError):
            raise _TryAgainError(f"timed out after {self._timeout_s:g} s") from None
        except self._openai.APIConnectionError as error:
            raise _TryAgainError(_reason(error)) from None
        except self._openai.APIStatusError as error:
            if error.status_code in _FATAL:
                raise self._fatal(error) from None
            if error.status_code in _BUSY or error.status_code >= 500:
                raise _TryAgainError(_reason(error), _retry_after_s(error)) from None
            raise DataError(_reason(error)) from None

    def _fatal(self, error: Any) -> TargetError:
        return TargetError(f"{self._url} refuses: {_reason(error)}; {_FATAL[error.status_code]}")

    def _read(self, body: bytes, dialogue: Dialogue) -> Answer:
        """The answer in a completion. Raises _TryAgainError for what is no completion."""
        try:
            choice = json.loads(body)["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text, calls = (message.get("content") or "").strip(), message.get("tool_calls")
            thoughts = message.get("reasoning_content") or message.get("reasoning")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _TryAgainError(f"not a chat completion: {body[:80]!r}") from None
        if reason in _BROKEN_OFF:
            raise DataError(f"the endpoint broke the answer off ({reason})")
        if reason == "length":
            if not text:
                raise DataError("the answer ran into --max-new-tokens before it said anything")
            text = trim_unfinished(text)
        answer: Answer = {"content": text}
        if isinstance(thoughts, str) and thoughts.strip():
            answer["reasoning_content"] = thoughts.strip()
        if calls:
            if dialogue.turns[len(dialogue.answers)] + 1 < len(dialogue.row["messages"]):
                raise DataError("the target calls a tool where the conversation goes on without its result")
            answer["tool_calls"] = calls
        return answer


def _base_url(endpoint: str) -> str:
    """The URL that OpenAI's clients expect. Raises UsageError for what is none."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"--endpoint expects a URL such as http://localhost:8000/v1, got {endpoint!r}")
    return endpoint.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _turn_seed(seed: int, dialogue: Dialogue) -> int:
    """Its own for every turn of every row, and the same after a resume; 31 bits, which all servers take."""
    text = f"{seed}:{dialogue.number}:{len(dialogue.answers)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _retry_after_s(error: Any) -> float | None:
    try:
        return float(error.response.headers.get("retry-after"))
    except (TypeError, ValueError):  # none, or a date
        return None


def _reason(error: Any) -> str:
    """An `openai` error in one line: the server's own words where it has some, else the cause."""
    status = getattr(error, "status_code", None)
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error", body)
        words = inner.get("message", inner) if isinstance(inner, dict) else inner
    else:
        words = body or error.__cause__ or error
    line = " ".join(str(words).split())[:300] or type(words).__name__
    return f"HTTP {status}: {line}" if status else line
