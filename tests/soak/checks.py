"""Every row accounted for: by its place under its reason, or with its tokens and states in the cache."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from pipeline import files
from pipeline.cache import CacheReader
from tests.soak.rows import GOOD, STATES, Row

RTOL, ATOL = 2**-7, 1e-3
"""One step of bf16, for sums of another batch may round otherwise; and nothing beside states of about 1."""


def check_rows(tokens: Path, sources: list[list[Row]]) -> Counter[str]:
    """Check the tokenised data: each row has its place, its reason or its tokens. Return counts by reason.

    Args:
        tokens: folder of tokenised data, with one file.
    """
    (path,) = tokens.glob("*.arrow")
    with pa.memory_map(str(path)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    counts: Counter[str] = Counter()
    found = iter(table.select(["source", "source_row", "dropped"]).to_pylist())
    for number, rows in enumerate(sources):
        for i, row in enumerate(rows):
            got = next(found)
            expected = row.reason if row.reason not in STATES else GOOD
            assert got == {"source": number, "source_row": i, "dropped": expected}, (
                got,
                row.kind,
                row.reason,
            )
            counts[row.reason] += 1
    assert next(found, None) is None, "more rows than the sources have"
    files.remove_partials(tokens)  # as the next tokenising does
    assert list(tokens.iterdir()) == [path], "a killed process left something behind for ever"
    return counts


def check_manifest(reader: CacheReader, sources: list[list[Row]], counts: Counter[str]) -> None:
    """Check the counts of the manifest, and each skipped sample by its place."""
    total = sum(map(len, sources))
    expected = {"read": total, "captured": counts[GOOD]}
    expected |= {f"dropped: {reason}": number for reason, number in counts.items() if reason != GOOD}
    rows = dict(reader.manifest.rows)
    assert rows == expected, (rows, expected)
    assert rows["read"] == sum(number for name, number in rows.items() if name != "read")
    skipped = reader.manifest.skipped
    found = set(zip(skipped.source, skipped.source_row, skipped.reason, strict=True))
    assert found == {
        (number, i, row.reason)
        for number, rows_ in enumerate(sources)
        for i, row in enumerate(rows_)
        if row.reason in STATES
    }
    assert len(skipped) == len(found)


def check_tokens(reader: CacheReader, sources: list[list[Row]]) -> None:
    """Check that the cache holds the tokens of each good row, worked out by hand, and no other sample."""
    expected = {
        (number, i): row
        for number, rows in enumerate(sources)
        for i, row in enumerate(rows)
        if row.reason == GOOD
    }
    for i in range(len(reader)):
        row = expected.pop((int(reader.sources[i]), int(reader.source_rows[i])))
        ids, mask = reader.tokens(i)
        assert tuple(ids.tolist()) == row.input_ids, row.line[:200]
        assert tuple(mask.tolist()) == row.loss_mask, row.line[:200]
    assert not expected, f"{len(expected)} good rows are not in the cache"


@torch.no_grad()
def check_states(reader: CacheReader, target: Path, number: int, seed: int) -> float:
    """Compare the states of random samples with the target's over each row alone. Return the largest error.

    Returns:
        The largest difference, in units of what is allowed.
    """
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, attn_implementation="eager")
    chosen = random.Random(seed).sample(range(len(reader)), min(number, len(reader)))
    worst = 0.0
    for i in chosen:
        sample = reader.read(i)
        states = model.model(sample.input_ids[None].long(), output_hidden_states=True).hidden_states
        context = torch.cat([states[layer + 1][0] for layer in reader.layer_ids], dim=1)
        last = states[-1][0, sample.last_positions]
        for got, want in ((sample.context, context), (sample.last_hidden, last)):
            allowed = ATOL + RTOL * want.abs()
            worst = max(worst, float(((got.float() - want).abs() / allowed).max()))
    assert worst <= 1, f"states differ from the row's own by {worst:.2f} times what is allowed"
    return worst


def digests(cache: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a cache."""
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }
