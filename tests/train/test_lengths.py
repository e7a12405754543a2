"""`dspark speculate --measure`: the recommended length by hand, from times that are given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import FP32, assert_refused, run_cli, run_ok
from tests.train.runs import train_arguments
from train.decode import lengths as measured
from train.decode.benchmark import format_speculation
from train.decode.lengths import StepTimes, expected_tokens, measure_steps, recommend
from train.decode.speculative import Decoded
from train.runs.figures import Rounds, SpeculationRun
from train.runs.names import SPECULATION
from train.runs.open import find_checkpoint
from train.runs.results import read_speculation

TIMES = StepTimes(plain_ms=10.0, draft_ms=(2.0, 3.0, 4.0), verify_ms=(10.0, 11.0, 20.0))
LIVE = SpeculationRun(
    temperature=0.0,
    tokens=10,
    rounds=5,
    tokens_per_round=2.0,
    accept_given_prefix=(0.5, 0.5, 0.5),
    verified_per_round=3.0,
    draft_ms=1.0,
    verify_ms=1.0,
    plain_ms=1.0,
    speculative_ms=1.0,
    speedup=1.0,
    identical=1,
)


def test_the_speed_up_by_hand() -> None:
    """Acceptances .8, .5 and .5: rounds of 1.8, 2.2 and 2.4 tokens in 1.2, 1.4 and 2.4 plain steps."""
    offline = Rounds(tokens_per_round=9.0, accept_given_prefix=(0.8, 0.5, 0.5))
    found = recommend(TIMES, LIVE, offline)
    assert [row.length for row in found.rows] == [1, 2, 3]
    assert [row.tokens_per_round for row in found.rows] == pytest.approx([1.8, 2.2, 2.4])
    assert [row.speedup for row in found.rows] == pytest.approx([1.5, 2.2 / 1.4, 1.0])
    assert (found.num_speculative_tokens, found.acceptance, found.plain_ms) == (2, "held out", 10.0)
    live = recommend(TIMES, LIVE, None)  # 1.5, 1.75 and 1.875 tokens
    assert [row.speedup for row in live.rows] == pytest.approx([1.25, 1.25, 0.78125])
    assert (live.num_speculative_tokens, live.acceptance) == (1, "live")  # the shortest of equals


def test_no_length_is_recommended_where_none_is_faster() -> None:
    slow = StepTimes(10.0, (5.0, 5.0, 5.0), (10.0, 15.0, 20.0))
    found = recommend(slow, LIVE, None)
    assert found.rows[0].speedup == pytest.approx(1.0)
    assert found.num_speculative_tokens == 0


def test_what_was_not_measured_is_not_recommended() -> None:
    """An acceptance that nobody saw; where nothing gets that far it does not matter."""
    assert list(expected_tokens((0.5, None, 0.5))) == [1.5, None, None]
    assert list(expected_tokens((0.5, 0.0, None))) == [1.5, 1.5, 1.5]
    assert list(expected_tokens((None,))) == [None]
    found = recommend(TIMES, replace(LIVE, accept_given_prefix=(0.3, None, None)), None)
    assert [row.speedup for row in found.rows] == [pytest.approx(1.3 / 1.2), None, None]
    assert found.num_speculative_tokens == 1


class Counter:
    """A decoder of three slots, and what was asked of it and of the target."""

    slots = 3


def test_each_length_is_timed_in_turn_and_the_median_counts(monkeypatch) -> None:
    """Decodings that take what is given: round after round, the first turn and one outlier do not count."""
    asked: list[tuple[int, int]] = []
    turn = {"now": -1}
    slow = {0: 1000.0, 3: 50.0}

    def plain(_target, prompt, limit, **_options) -> Decoded:
        turn["now"] += 1
        asked.append((0, limit))
        steps = limit - 1
        return Decoded([1] * limit, seconds=0.010 * steps * slow.get(turn["now"], 1.0))

    def fast(_target, decoder, prompt, limit, **_options) -> Decoded:
        asked.append((decoder.slots, limit))
        extra = slow.get(turn["now"], 1.0)
        rounds = 4
        times = {"draft_seconds": 0.001 * decoder.slots, "verify_seconds": 0.012 + 0.001 * decoder.slots}
        return Decoded([], rounds=rounds, **{name: rounds * extra * each for name, each in times.items()})

    class Still:
        device = torch.device("cpu")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(measured, "decode_plain", plain)
    monkeypatch.setattr(measured, "decode_speculative", fast)
    decoder = Counter()
    times = measure_steps(Still(), Still(), decoder, [[1], [2]], 64, 0.0)
    assert times.plain_ms == pytest.approx(10.0)
    assert times.draft_ms == pytest.approx((1.0, 2.0, 3.0))
    assert times.verify_ms == pytest.approx((13.0, 14.0, 15.0))
    assert asked == [(length, 17) for length in range(4)] * 6
    assert decoder.slots == 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=20))
    return run


def test_it_is_kept_beside_the_draft_and_printed(
    run_dir: Path, cache_dir: Path, target_dir: Path, monkeypatch
) -> None:
    """From given times: the command's figures are the formula's, of the acceptance that it printed."""
    monkeypatch.setattr("train.decode.benchmark.measure_steps", lambda *_: TIMES)
    command = ("speculate", "--target", target_dir, "--run", run_dir, "--cache", cache_dir, *FP32)
    command += ("--num-prompts", "2", "--max-new-tokens", "16", "--temperature", "0")
    result = json.loads(run_ok(*command, "--measure", "--json"))
    (run,) = result["runs"]
    reached, tokens, expected = 1.0, 1.0, []
    for accept, draft, verify in zip(
        run["accept_given_prefix"], TIMES.draft_ms, TIMES.verify_ms, strict=True
    ):
        reached *= accept or 0.0
        tokens += reached
        expected.append(tokens / ((draft + verify) / 10.0))
    found = run["lengths"]
    assert [row["speedup"] for row in found["rows"] if row["speedup"]] == pytest.approx(
        expected[: sum(row["speedup"] is not None for row in found["rows"])]
    )
    assert found["acceptance"] == "live"
    folder = find_checkpoint(run_dir)
    assert json.loads((folder / SPECULATION).read_text()) == result
    kept = read_speculation(folder)
    assert kept is not None
    assert kept.runs[0].lengths.plain_ms == 10.0
    text = format_speculation(kept)
    assert "a step of the target alone takes 10.0 ms; by drafted tokens a round (live acceptance)" in text
    assert f"{found['rows'][0]['speedup']:.3f}" in text
    assert "recommended: " in text
    assert "lengths" not in json.loads(run_ok(*command, "--json"))["runs"][0]  # as earlier versions wrote it


def test_the_times_of_a_real_target(run_dir: Path, cache_dir: Path, target_dir: Path) -> None:
    """All there, all positive; what they are is the machine's."""
    command = ("speculate", "--target", target_dir, "--run", run_dir, "--cache", cache_dir, *FP32)
    command += ("--num-prompts", "2", "--max-new-tokens", "8", "--temperature", "1", "--measure", "--json")
    (run,) = json.loads(run_ok(*command))["runs"]
    rows = run["lengths"]["rows"]
    assert [row["length"] for row in rows] == [1, 2, 3]
    assert min(min(row["draft_ms"], row["verify_ms"]) for row in rows) > 0
    assert run["lengths"]["plain_ms"] > 0


def test_a_threshold_beside_it_is_refused(run_dir: Path, target_dir: Path, cache_dir: Path) -> None:
    command = ("speculate", "--target", target_dir, "--run", run_dir, "--cache", cache_dir, *FP32)
    refused = run_cli(*command, "--measure", "--threshold", "0.5", "--max-new-tokens", "4")
    assert_refused(refused, 2, "--measure", "leave --threshold out")
