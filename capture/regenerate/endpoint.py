"""Engine for servers with OpenAI's chat completions API: `vllm serve`, SGLang, llama.cpp, ..."""

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
from capture.regenerate.engine import Outcome, Report, trim_unfinished
from capture.sampling import Sampling
from pipeline.errors import DataError, TargetError, UsageError
from pipeline.text import one_line

# Waits between tries double from the first to the longest. Jitter reduces each by up to half.
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_CHECK_TIMEOUT_S = 15.0

# Statuses that concern the endpoint, the key or the model, so that every row would fail.
_FATAL = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check --endpoint and --model"}
_BUSY = {408, 409, 425, 429}
# Finish reasons of an incomplete answer.
_BROKEN_OFF = {"abort", "content_filter", "error"}


class _TryAgainError(Exception):
    """A failed try that may succeed later."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s
        """Seconds that the server asks to wait."""


class EndpointEngine:
    """Answer dialogues through an endpoint, up to `concurrency` at once."""

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
            endpoint: URL, with or without the path that OpenAI's clients expect (`/v1`).
            model: its served name; optional if the endpoint serves only one model.

        Raises:
            UsageError: not a URL, or no model is given and the endpoint does not serve exactly one.
            TargetError: the `openai` package is missing, or the endpoint does not answer.
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
        """Served name of the model."""

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        """See `Engine.answer`. Raises TargetError if the endpoint stops answering."""
        try:
            asyncio.run(self._converse_with_all(dialogues, report))
        except BaseExceptionGroup as group:  # the first is enough; the others were cancelled or are the same
            raise group.exceptions[0] from None

    def _client(self, timeout_s: float) -> Any:
        return self._openai.AsyncOpenAI(
            base_url=self._url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers need none
            timeout=timeout_s,
            max_retries=0,  # our retries also cover truncated bodies and the time of a whole answer
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
            names = ", ".join(served) or "no model that it lists"
            raise UsageError(f"{self._url} serves {names}: choose a model with --model")
        return served[0]

    async def _served(self, client: Any, timeout_s: float) -> list[str]:
        """Return the models that the endpoint lists, if any. Raises _TryAgainError if it does not answer."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await client.models.with_raw_response.list()
            return [str(model["id"]) for model in json.loads(reply.http_response.content)["data"]]
        except (ValueError, KeyError, TypeError):
            return []  # it answers, but not with a list
        except TimeoutError:
            raise _TryAgainError(f"timed out after {timeout_s:g} s") from None
        except self._openai.APIConnectionError as error:
            raise _TryAgainError(_reason(error)) from None
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._fatal(error) from None
            if error.status_code >= 500:
                raise _TryAgainError(_reason(error)) from None
            return []  # it answers, but lists nothing

    async def _converse_with_all(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        waiting = iter([dialogue for dialogue in dialogues if not dialogue.finished])

        async def work(client: Any) -> None:
            for dialogue in waiting:  # shared: each worker takes the next
                await self._converse(client, dialogue, report)

        async with self._client(self._timeout_s) as client, asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(work(client))

    async def _converse(self, client: Any, dialogue: Dialogue, report: Report) -> None:
        """Answer the remaining turns of a dialogue."""
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
        """Raise TargetError if the endpoint no longer answers, so that every other row would fail too."""
        try:
            await self._served(client, min(self._timeout_s, _CHECK_TIMEOUT_S))
        except _TryAgainError:
            raise TargetError(
                f"{self._url} stopped answering ({last}): restart the server, then run this again (without "
                "--fresh) to continue"
            ) from None

    def _request(self, dialogue: Dialogue) -> dict[str, Any]:
        sampling = self._sampling
        extra: dict[str, Any] = {}
        if sampling.temperature > 0 and sampling.top_k:
            extra["top_k"] = sampling.top_k  # not in OpenAI's API, but in that of every open server
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
        """Try once. Raises _TryAgainError, DataError (this row fails) or TargetError (every row fails)."""
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
        """Return the answer in a completion.

        Raises:
            _TryAgainError: the body is not a completion.
            DataError: the answer was broken off, is empty, or calls a tool in mid-conversation.
        """
        try:
            choice = json.loads(body)["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text, calls = (message.get("content") or "").strip(), message.get("tool_calls")
            reasoning = message.get("reasoning_content") or message.get("reasoning")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _TryAgainError(f"not a chat completion: {body[:80]!r}") from None
        if reason in _BROKEN_OFF:
            raise DataError(f"the endpoint broke off the answer ({reason})")
        if reason == "length":
            if not text:
                raise DataError(
                    "the answer reached --max-new-tokens without any content: raise --max-new-tokens"
                )
            text = trim_unfinished(text)
        answer: Answer = {"content": text}
        if isinstance(reasoning, str) and reasoning.strip():
            answer["reasoning_content"] = reasoning.strip()
        if calls:
            if dialogue.turns[len(dialogue.answers)] + 1 < len(dialogue.row["messages"]):
                raise DataError("the target calls a tool, but the conversation continues without its result")
            answer["tool_calls"] = calls
        return answer


def _base_url(endpoint: str) -> str:
    """Return the URL that OpenAI's clients expect. Raises UsageError if the text is not a URL."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"--endpoint expects a URL such as http://localhost:8000/v1, got {endpoint!r}")
    return endpoint.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def _turn_seed(seed: int, dialogue: Dialogue) -> int:
    """Return a seed per turn and row that a resume does not change, of 31 bits, which all servers accept."""
    text = f"{seed}:{dialogue.number}:{len(dialogue.answers)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _retry_after_s(error: Any) -> float | None:
    try:
        return float(error.response.headers.get("retry-after"))
    except (TypeError, ValueError):  # no header, or a date
        return None


def _reason(error: Any) -> str:
    """Return an `openai` error in one line: the server's message if there is one, else the cause."""
    status = getattr(error, "status_code", None)
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error", body)
        words = inner.get("message", inner) if isinstance(inner, dict) else inner
    else:
        words = body or error.__cause__ or error
    line = one_line(words, limit=300)
    return f"HTTP {status}: {line}" if status else line
