"""What a draft is tried on live: prompts from a file, or the beginnings of a cache's held-out samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, DataError

_SHAREGPT = {"human": "user", "gpt": "assistant"}
# Of a sample in which everything is supervised, as plain text is, this many tokens are the prompt.
_TEXT_PROMPT = 16


def held_out_prompts(reader: CacheReader, samples: np.ndarray, count: int) -> list[list[int]]:
    """Token ids up to each sample's first supervised one: what the target was asked.

    Args:
        samples: of the held-out split; taken evenly from it.

    Raises:
        ConfigError: nothing was held out.
    """
    if not len(samples):
        raise ConfigError("the run held nothing out (train.held_out = 0): give --prompts FILE instead")
    chosen = samples[np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)]
    prompts = []
    for i in chosen.tolist():
        ids, mask = reader.tokens(i)
        first = int(mask.argmax())
        prompts.append(ids[: first or min(_TEXT_PROMPT, len(ids) // 2)].tolist())
    return prompts


def read_prompts(path: Path, tokenizer: Any, vocab_size: int, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of a file.

    A `.txt` file holds one a line. A JSON Lines file holds rows with `messages` (or `conversations`), of
    which everything before the last answer is the prompt, or with `prompt`, `text` or `input_ids`. What is
    said to an assistant goes through the tokenizer's chat template, where it has one.

    Args:
        vocab_size: V; token ids are below it.

    Raises:
        DataError: the file can't be read, holds no prompt, or a line of it is none, with its number.
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
                raise ValueError(f"token ids are integers from 0 to {vocab_size - 1}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number} is no prompt ({error}): expected an object with messages, "
                "conversations, prompt, text or input_ids; in a .txt file a prompt a line"
            ) from None
        except Exception as error:  # whatever a chat template raises
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path}, line {number} can't be rendered ({reason})") from None
        prompts.append(ids)
    if not prompts:
        raise DataError(f"--prompts {path} holds no prompt: expected one a line")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, empty ones left out; only a line feed ends one, as in JSON Lines."""
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
        raise ValueError("nobody asks anything in it")
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(_text(message["content"]) for message in messages))["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _messages(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """OpenAI's form of a conversation, from that or ShareGPT's."""
    name = next((name for name in ("messages", "conversations", "prompt") if name in row), None)
    if name is None:
        raise ValueError(f"it has {', '.join(sorted(row)) or 'nothing'}")
    for turn in row[name]:
        if "from" in turn:
            yield {"role": _SHAREGPT.get(turn["from"], turn["from"]), "content": _text(turn["value"])}
        else:
            yield {**turn, "role": _text(turn["role"])}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {type(value).__name__}")
    return value
