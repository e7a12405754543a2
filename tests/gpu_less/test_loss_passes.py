"""The plain pass of the loss, compiled by Inductor for an H100 that is not there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.gpu_less.mocked.preload import run

pytestmark = pytest.mark.gpu_less
CHUNKS = [(1664, 900), (1408, 760), (1300, 1300), (1792, 1001)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run("loss", json.dumps({"chunks": CHUNKS}))


def test_other_numbers_of_slots_and_positions_compile_nothing(compiled: dict[str, Any]) -> None:
    first, *others = compiled["generated"]
    assert first > 0
    assert others == [0] * len(others)


def test_the_vocabulary_is_a_constant_and_rows_are_read_16_bytes_at_a_time(compiled) -> None:
    passes = compiled["needs"][0]
    assert passes["kind"] == "reduction"
    assert 16 in passes["loads"]
    assert passes["stores"] == [4, 16]  # a row's own figures, and rows
    for source in compiled["sources"]:
        assert "151936*x0" in source
        assert not re.search(r"ks\d\s*\*|\*\s*ks\d", source)  # sizes that are not constants have 64 bits


def test_three_passes_and_no_copy(compiled: dict[str, Any]) -> None:
    """Softmax; L1; gradient. The second leaves something to the third: one more of each."""
    passes, *rest = compiled["sources"]
    assert len(re.findall(r"for r0_offset in ", passes)) == 3
    whole = r"\(r0_1 \+ 151936\*x0\)"
    loads, stores = (re.findall(rf"tl\.{way}\((\w+) \+ {whole}", passes) for way in ("load", "store"))
    assert len(loads) <= 4
    assert len(stores) == 2
    # Nothing else reads or writes rows: only labels' own logits.
    assert not re.search(r"for r0_offset|r0_1|\+ \(x\d\), .*151936", "".join(rest))
    assert len(rest) == 1
