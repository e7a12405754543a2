"""One sample of a cache as text: supervised tokens marked, and figures of its states."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import CacheReader
from pipeline.errors import UsageError
from pipeline.text import marked_text, table


def find_sample(reader: CacheReader, text: str) -> int:
    """Return the reader's number of the sample that `text` names.

    Args:
        text: its id in hex or the first digits of it; or `#N`, N its row of the index.

    Raises:
        UsageError: it names none, several, or one that the cache skips.
    """
    if text.startswith("#"):
        number = int(text[1:]) if re.fullmatch(r"#[0-9]{1,18}", text) else -1
        last = len(reader) + len(reader.manifest.skipped) - 1
        if not 0 <= number <= last:
            raise UsageError(f"--sample {text}: {reader.place} has samples #0 to #{last}: name one of those")
        if number in reader.manifest.skipped.sample:
            raise _skipped(reader, text, reader.manifest.skipped.sample.index(number))
        return int(np.searchsorted(reader.numbers, number))
    if not re.fullmatch(r"[0-9a-f]{1,32}", text):
        raise UsageError(f"--sample expects the first digits of a sample's hash, in hex, or #N; got {text!r}")
    numbers, skipped = _starting_with(reader.sample_ids, text), _starting_with(reader.skipped_ids, text)
    if not len(numbers) and len(skipped):
        raise _skipped(reader, text, int(skipped[0]))
    if not len(numbers):
        raise UsageError(
            f"--sample {text}: no hash in {reader.place} starts with these digits: give others, or #N"
        )
    if len(numbers) > 1:
        raise UsageError(
            f"--sample {text}: the hashes of {len(numbers):,} samples start with these digits: give more "
            f"(#{reader.numbers[numbers[0]]} is {reader.sample_id(int(numbers[0]))})"
        )
    return int(numbers[0])


def _starting_with(ids: np.ndarray, text: str) -> np.ndarray:
    """Return the rows of `ids` `[n, 16]` uint8 that start with these hex digits."""
    whole = len(text) // 2
    found = (ids[:, :whole] == np.frombuffer(bytes.fromhex(text[: 2 * whole]), dtype=np.uint8)).all(axis=1)
    if len(text) % 2:
        found &= ids[:, whole] >> 4 == int(text[-1], 16)
    return np.flatnonzero(found)


def _skipped(reader: CacheReader, text: str, i: int) -> UsageError:
    """Return the error about the cache's `i`-th skipped sample."""
    skipped, names = reader.manifest.skipped, reader.manifest.identity.data.sources
    source = skipped.source[i]
    name = names[source] if source < len(names) else f"source {source}"
    return UsageError(
        f"--sample {text}: sample #{skipped.sample[i]} (row {skipped.source_row[i] + 1:,} of {name}) was "
        f"skipped by the capture: {skipped.reason[i]}; no reader returns it: name another"
    )


def sample_facts(reader: CacheReader, number: int) -> dict[str, Any]:
    """Collect a sample's source, place, tokens and figures of its states, in JSON's types.

    Raises:
        CacheError: its shard is damaged.
    """
    input_ids, loss_mask = reader.tokens(number)
    source, names = int(reader.sources[number]), reader.manifest.identity.data.sources
    facts = {
        "number": int(reader.numbers[number]),
        "sample_id": reader.sample_id(number),
        "source": names[source] if source < len(names) else f"source {source}",
        "source_row": int(reader.source_rows[number]),
        "shard": reader.shard_of(number),
        "tokens": len(input_ids),
        "supervised": int(loss_mask[1:].sum()),
        "input_ids": input_ids.tolist(),
        "loss_mask": loss_mask.tolist(),
    }
    states: dict[str, dict[str, float]] = {}
    out = torch.empty(len(input_ids), reader.hidden_size, dtype=torch.bfloat16)
    for layer_id in reader.layer_ids:
        reader.read_context(number, [layer_id], out)
        states[f"layer {layer_id}"] = statistics(out)
    if reader.has_last_hidden:
        out = torch.empty(reader.num_last_rows(number), reader.hidden_size, dtype=torch.bfloat16)
        reader.read_last_hidden(number, out)
        states["last hidden"] = statistics(out)
    return facts | {"states": states}


def statistics(rows: Tensor) -> dict[str, float]:
    """Compute figures over all values of rows `[n, H]`. The largest channel has the largest rms."""
    values = rows.double()
    channels = values.square().mean(dim=0).sqrt()
    return {
        "rows": len(values),
        "mean": values.mean().item(),
        "deviation": values.std(correction=0).item(),
        "rms": values.square().mean().sqrt().item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "largest_channel": int(channels.argmax()),
        "largest_channel_rms": channels.max().item(),
    }


def sample_lines(facts: dict[str, Any], decode: Callable[[list[int]], str] | None) -> Iterator[str]:
    """Format the facts of `sample_facts` for the terminal.

    Args:
        decode: from token ids to text; None shows the ids themselves.
    """
    yield click.style(f"== sample #{facts['number']:,} {facts['sample_id']}", bold=True)
    yield (
        f"row {facts['source_row'] + 1:,} of {facts['source']}, shard {facts['shard']:,}, "
        f"{facts['tokens']:,} tokens, {facts['supervised']:,} supervised "
        f"({facts['supervised'] / facts['tokens']:.0%})"
    )
    if decode is None:
        yield "the tokenizer can't be loaded from the cache: showing token ids instead"
    ids, mask = np.array(facts["input_ids"]), np.array(facts["loss_mask"])
    yield marked_text(ids, mask, decode or (lambda run: " ".join(map(str, run)) + " "))
    keys = ("mean", "deviation", "rms", "min", "max")
    rows = [("", *keys, "largest channel")]
    for name, s in facts["states"].items():
        channel = f"{s['largest_channel']} (rms {s['largest_channel_rms']:.4g})"
        rows.append((name, *(f"{s[key]:.4g}" for key in keys), channel))
    yield from table(rows, left={0, len(keys) + 1})


def cached_decoder(cache: Path) -> Callable[[list[int]], str] | None:
    """Return the decoder of the tokenizer in `cache/target`; None if it can't load without its own code."""
    from transformers import AutoTokenizer

    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            cache / "target", local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode([0])
    except Exception:  # tokenizers raise errors of many types
        return None
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
