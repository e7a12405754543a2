"""The plain pass of the loss, compiled by Inductor for an H100 that is not there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_less.mocked.preload import environment

pytestmark = pytest.mark.gpu_less
ROOT = Path(__file__).parents[2]
CHUNKS = [(1664, 900), (1408, 760), (1300, 1300), (1792, 1001)]


def run(module: str, *arguments: str) -> Any:
    command = [sys.executable, "-m", f"tests.gpu_less.mocked.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kernels = str(tmp_path_factory.mktemp("kernels") / "loss")
    found = run("loss", json.dumps({"chunks": CHUNKS, "kernels": kernels}))
    return found | {"needs": run("machine_code", kernels, "h100", "")}


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
