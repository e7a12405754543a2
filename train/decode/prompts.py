"""Prompts for decoding: from a file, or the beginnings of a cache's held-out samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, DataError
from pipeline.remote.address import Place
from pipeline.text import one_line
from train.data.split import split
from train.data.store import open_cache
from train.runs.directory import load_run_config
from train.runs.open import TrainedDraft

_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Tokens of the prompt, if a sample is supervised from its first token on, as plain text is.
_TEXT_PROMPT = 16


def choose_prompts(
    prompts: Path | None, cache: Place | None, count: int, *, run: Path, draft: TrainedDraft, tokenizer: Any
) -> list[list[int]]:
    """Return the token ids of up to `count` prompts for a draft's target, from a file or a cache.

    Args:
        prompts: a file, as in `read_prompts`.
        cache: instead of that, a cache of the target; its samples that the run held out.
        run: the draft's.

    Raises:
        RunError: the cache is of another target.
        DSparkError: see `read_prompts` and `held_out_prompts`; or the cache can't be read.
    """
    if prompts is not None:
        return read_prompts(prompts, tokenizer, draft.target.vocab_size, count)
    assert cache is not None
    train = load_run_config(run).train
    reader = open_cache(cache, train)
    draft.require_target_of(reader)
    _, held_out = split(reader, train.held_out)
    reader.alone(held_out)
    with reader.tokens_only():
        return held_out_prompts(reader, held_out, count)


def held_out_prompts(reader: CacheReader, samples: np.ndarray, count: int) -> list[list[int]]:
    """Return the token ids of up to `count` samples, each up to its first supervised token.

    Args:
        samples: numbers of the held-out samples; `count` of them are taken, evenly spread.

    Raises:
        ConfigError: nothing was held out.
    """
    if not len(samples):
        raise ConfigError("the run held out no samples (train.held_out = 0): pass --prompts FILE instead")
    chosen = samples[np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)]
    prompts = []
    for i in chosen.tolist():
        ids, mask = reader.tokens(i)
        first = int(mask.argmax())
        prompts.append(ids[: first or min(_TEXT_PROMPT, len(ids) // 2)].tolist())
    return prompts


def read_prompts(path: Path, tokenizer: Any, vocab_size: int, count: int) -> list[list[int]]:
    """Return the token ids of the first `count` prompts of a file.

    A `.txt` file has one prompt per line. A JSON Lines file has rows with `messages` (or `conversations`),
    whose prompt is everything before the last answer, or with `prompt`, `text` or `input_ids`. Messages and
    prompts are rendered with the tokenizer's chat template, if it has one.

    Args:
        vocab_size: V; token ids must be below it.

    Raises:
        DataError: the file can't be read or has no prompt, or a line is not a prompt; the message has its
            number.
    """
    prompts: list[list[int]] = []
    for number, line in _lines(path):
        if len(prompts) == count:
            break
        try:
            ids = _encode(line if path.suffix == ".txt" else json.loads(line), tokenizer)
            if not ids:
                raise ValueError("it has no tokens")
            if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
                raise ValueError(f"token ids must be integers from 0 to {vocab_size - 1}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is not a prompt ({error}): expected an object with messages, "
                "conversations, prompt, text or input_ids, or in a .txt file one prompt per line"
            ) from None
        except Exception as error:  # chat templates raise anything
            reason = one_line(error)
            raise DataError(f"{path}, line {number} can't be rendered ({reason}): fix or remove it") from None
        prompts.append(ids)
    if not prompts:
        raise DataError(f"--prompts {path} has no prompt: expected one per line")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield non-empty lines with their numbers. Only a line feed ends a line, as in JSON Lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} can't be read ({getattr(error, 'strerror', error)})") from None


def _encode(row: Any, tokenizer: Any) -> list[int]:
    if isinstance(row, str):
        row = {"prompt": row}
    if "input_ids" in row:
        return list(row["input_ids"])
    if "text" in row:
        return tokenizer(_text(row["text"]))["input_ids"]
    if "prompt" in row and isinstance(row["prompt"], str):
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = list(_messages(row))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("it has no message before the last answer")
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(_text(message["content"]) for message in messages))["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _messages(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a conversation in OpenAI's form, from that form or ShareGPT's."""
    name = next((name for name in ("messages", "conversations", "prompt") if name in row), None)
    if name is None:
        raise ValueError(f"it has the keys {', '.join(sorted(row)) or 'none'}")
    for turn in row[name]:
        if "from" in turn:
            yield {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": _text(turn["value"])}
        else:
            yield {**turn, "role": _text(turn["role"])}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    return value
