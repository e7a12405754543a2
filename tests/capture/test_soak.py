"""The parts of the soak (`make soak`) say what is so; the soak itself runs by hand."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import FP32, run_ok
from tests.soak.checks import check_rows
from tests.soak.rows import GOOD, STATES, make_rows, write_rows
from tests.soak.target import MAX_LENGTH, TOO_LARGE, make_soak_target
from tests.soak.watch import Watch


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A folder with the soak's target, and its tokenizer."""
    folder = tmp_path_factory.mktemp("soak") / "target"
    return folder, make_soak_target(folder)


@pytest.fixture(scope="module")
def sources(target):
    return make_rows(target[1], 60)


def test_each_row_of_the_soak_is_what_it_says(tmp_path, target, sources, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "tokens"))
    words = ["plan", "--target", target[0], "--cache", tmp_path / "cache", "--bad-rows", "skip", *FP32]
    for path in write_rows(tmp_path, sources):
        words += ["--data", path]
    run_ok(*words, "--max-length", MAX_LENGTH)
    counts = check_rows(tmp_path / "tokens", sources)
    assert counts[GOOD] == 42 + 40 + 40
    kinds = Counter(row.kind for rows in sources for row in rows)
    assert len(kinds) >= 18
    assert {number for kind, number in kinds.items() if kind not in ("good", "a duplicate")} == {1}
    first = next(i for i, row in enumerate(sources[1]) if row.reason != GOOD)
    lost = [sources[0], sources[1][:first] + sources[1][first + 1 :], sources[2]]
    with pytest.raises(AssertionError):
        check_rows(tmp_path / "tokens", lost)


@torch.no_grad()
def test_the_target_spoils_the_rows_that_say_so(target, sources):
    model = AutoModelForCausalLM.from_pretrained(target[0])
    spoiled = [row for rows in sources for row in rows if row.reason in STATES]
    assert Counter(row.reason for row in spoiled) == {STATES[0]: 2, STATES[1]: 1, STATES[2]: 1}
    for row in [row for row in sources[0] if row.reason == GOOD][:3] + spoiled:
        if row.reason == STATES[2]:
            assert TOO_LARGE <= len(row.input_ids) <= MAX_LENGTH
            continue
        states = model.model(torch.tensor([row.input_ids])).last_hidden_state
        assert bool(states.isfinite().all()) == (row.reason != STATES[0]), row.kind
        assert bool(states.any()) == (row.reason != STATES[1]), row.kind


def watch_of(memory: list[int]) -> Watch:
    """A watch that saw these sizes, one a second."""
    watch = Watch("a process")
    watch.looks = [
        SimpleNamespace(at=float(i), memory=size, files=9, threads=2) for i, size in enumerate(memory)
    ]
    return watch


def test_a_watch_sees_this_process_and_growth():
    watch = Watch("this process")
    watch.look([os.getpid()])
    (look,) = watch.looks
    assert look.memory > 2**24
    assert look.files >= 3
    assert look.threads >= 1
    limits = {"memory": 2000, "files": 10, "threads": 4}
    watch_of([1000] * 20).check(**limits, growth=100)
    watch_of(list(range(1000, 1400, 20))).check(**limits)
    with pytest.raises(AssertionError, match="grows"):
        watch_of(list(range(1000, 1400, 20))).check(**limits, growth=100)
    with pytest.raises(AssertionError, match="at most"):
        watch_of([1000] * 19 + [2001]).check(**limits)
