"""`dspark schedule`: tables of both engines, the simulation by hand and against exact expectations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.runs import train_arguments
from train.cli.schedule import drafts_of
from train.decode.simulation import (
    Drafts,
    PolicyFigures,
    algorithm_1,
    best_length,
    fixed,
    simulate,
    simulate_all,
    tensorrt_llm,
)
from train.decode.sps import read_sps
from train.eval.heldout import Blocks
from train.runs.names import CALIBRATION
from train.runs.open import find_checkpoint

SGLANG = {
    "sample_batch_tokens": [2, 8, 64],
    "sample_steps_per_sec": [100.0, 80.0, 40.0],
    "max_batch_tokens": 128,
}
ADDITIVE = {
    "bias_seconds": 0.004,
    "bs_probes": [1, 4],
    "alpha_seconds": [0.0, 0.003],
    "m_probes": [4, 8, 64],
    "theta_seconds": [-0.001, 0.001, 0.015],
}
TENSORRT = {
    "token_counts": [0, 8, 64],
    "step_time_ms": [4.0, 6.0, 20.0],
    "fixed_overhead_ms": 1.0,
    "batch_sizes": [2, 4],
    "batch_overhead_ms": [1.0, 3.0],
}


def written(folder: Path, values: Any) -> Path:
    path = folder / "sps.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_sglangs_table_is_a_staircase(tmp_path: Path) -> None:
    """Between measured batches it is as fast as at the smaller one; below the first, as at the first."""
    table = read_sps(written(tmp_path, SGLANG))
    found = [table.rate(3, tokens) for tokens in (1, 2, 7, 8, 63, 64)]
    assert found == [100, 100, 100, 80, 80, 40]
    assert (table.most_tokens, table.most_requests) == (64, None)


def test_sums_of_times_are_straight_between_measured_batches(tmp_path: Path) -> None:
    """By hand: 4 ms + 1 ms at two of four requests + 0 halfway from 4 to 8 tokens, and so on."""
    table = read_sps(written(tmp_path, ADDITIVE))
    assert [1 / table.rate(*at) for at in ((1, 4), (2, 6), (4, 64), (4, 36))] == pytest.approx(
        [0.003, 0.005, 0.022, 0.015]
    )
    assert (table.most_tokens, table.most_requests) == (64, 4)
    table = read_sps(written(tmp_path, TENSORRT))
    assert [1 / table.rate(*at) for at in ((1, 4), (3, 8), (4, 36))] == pytest.approx([0.007, 0.009, 0.017])
    few = {"token_counts": [1, 64], "step_time_ms": [5, 5], "batch_sizes": [], "_meta": {"device": "x"}}
    table = read_sps(written(tmp_path, few))
    assert table.rate(9, 40) == pytest.approx(200)
    assert table.most_requests is None


BAD: list[tuple[Any, str]] = [
    ("{", "Expecting"),
    ("[1]", "it is no JSON object"),
    ("[" * 100_000, "recursion"),
    ({}, "none of the keys"),
    ({"schema_version": 2, "cost_tables": {}}, "none of the keys"),
    ({"sample_batch_tokens": [1]}, "sample_steps_per_sec expects a list of numbers, got nothing"),
    ({**SGLANG, "sample_batch_tokens": []}, "sample_batch_tokens expects a list of numbers, got []"),
    (
        {**SGLANG, "sample_batch_tokens": [2, 8]},
        "sample_batch_tokens has 2 numbers, and sample_steps_per_sec 3",
    ),
    ({**SGLANG, "sample_batch_tokens": [2, 8, 8]}, "sample_batch_tokens does not rise"),
    ({**SGLANG, "sample_batch_tokens": [0, 8, 9]}, "whole numbers from 1, got 0"),
    ({**SGLANG, "sample_batch_tokens": [2, 8, 9.5]}, "whole numbers from 1, got 9.5"),
    ({**SGLANG, "sample_batch_tokens": [2, 8, True]}, "got True"),
    ({**SGLANG, "sample_steps_per_sec": [1, 0, 1]}, "sample_steps_per_sec expects numbers above 0, got 0"),
    ({**SGLANG, "sample_steps_per_sec": [1, float("nan"), 1]}, "got 'NaN'"),
    ({**SGLANG, "sample_steps_per_sec": [1, "2", 1]}, "got '2'"),
    ({**SGLANG, "sample_steps_per_sec": [1, 10**400, 1]}, "got 1000000"),
    ({**ADDITIVE, "bias_seconds": 0}, "bias_seconds expects numbers above 0, got 0"),
    ({**ADDITIVE, "bias_seconds": 0.001}, "add up to steps that take no time"),
    ({**ADDITIVE, "alpha_seconds": None}, "alpha_seconds expects a list of numbers, got nothing"),
    ({**TENSORRT, "step_time_ms": [0, 1, 2]}, "step_time_ms expects numbers above 0"),
    ({**TENSORRT, "batch_overhead_ms": [-1, 0]}, "batch_overhead_ms expects numbers from 0, got -1"),
    ({**TENSORRT, "fixed_overhead_ms": None}, "fixed_overhead_ms expects numbers from 0, got nothing"),
    ({**TENSORRT, "batch_sizes": [1]}, "batch_sizes has 1 numbers, and batch_overhead_ms 2"),
]


@pytest.mark.parametrize(("values", "said"), BAD)
def test_a_bad_table_is_one_line_before_any_work(
    tmp_path: Path, run_dir: Path, values: Any, said: str
) -> None:
    path = written(tmp_path, values)
    refused = run_cli("schedule", "--cache", tmp_path / "none", "--run", run_dir, "--sps", path)
    assert_refused(refused, 2, f"--sps {path} is no steps-per-second table", said, "dspark_sps_profiler")


def walk(accept: list[list[float]], answers: list[int], confidence: Any = None) -> Drafts:
    """Blocks of some answers, each of a length; what lies beyond an answer's end is cut off."""
    k = len(accept[0])
    left = np.concatenate([np.arange(length, 0, -1) for length in answers])
    slots = np.minimum(left, k)
    kept = np.arange(k) < slots[:, None]
    starts = np.cumsum([0, *answers[:-1]])
    sure = None if confidence is None else np.where(kept, confidence, 0.0)
    return Drafts(np.where(kept, accept, 0.0), slots, left, starts, sure)


def test_certain_acceptances_by_hand() -> None:
    """One answer of six tokens, K = 2; acceptances are 0 or 1, so nothing is left to chance.

    Positions 0 to 5 accept 2, 0, 0, 1, 0 and 0 tokens. Whole blocks: 0 -> 3 -> 5 -> end, which are 3 steps of
    3, 3 and 2 tokens (the last block has one slot). Blocks of one: 0 -> 2 -> 3 -> 5 -> end, 4 steps of 2. No
    draft: 6 steps of 1. A step over n tokens takes n + 1 seconds.
    """
    accept = [[1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [0, 0]]
    sure = [[0.9, 0.9], [0, 0], [0, 0], [0.9, 0], [0, 0], [0, 0]]
    drafts = walk(accept, [6], sure)

    def speed(batch: int) -> float:
        return 1 / (batch + 1)

    for length, steps, seconds, verified in ((2, 3, 11, 5), (1, 4, 12, 4), (0, 6, 12, 0)):
        found = simulate(drafts, fixed(length), speed, requests=1, steps=5 * steps)
        assert found == pytest.approx((6 / seconds, 6 / steps, verified / steps))
    # Algorithm 1: (1 + .9) / 3 < 1 / 2 is false, 2.71 / 4 is more still; then nothing, nothing, and one.
    found = simulate(drafts, algorithm_1(speed), speed, requests=1, steps=9)
    assert found == pytest.approx((6 / 9, 6 / 3, 3 / 3))  # 4 + 3 + 2 seconds


def test_tensorrt_llms_confidences_are_two_steps_old() -> None:
    """Confidences that say hopeless at positions 0 to 2 and sure at 3 to 5, all accepted never.

    The steps go through the answer one by one. The first two have nothing to go by and verify everything;
    then each goes by the position two before: 0, 1 and 2 verify one token, which is the least, at 2, 3 and 4.
    Position 5 would verify all that is left, one.
    """
    drafts = walk([[0, 0, 0]] * 8, [8], [[0.01] * 3] * 3 + [[0.99] * 3] * 5)
    seen: list[int] = []

    def speed(batch: int) -> float:
        return 1 / batch**0.5

    policy = tensorrt_llm(speed)

    def watched(batch):
        lengths = policy(batch)
        seen.extend(lengths.tolist())
        return lengths

    simulate(drafts, watched, speed, requests=1, steps=10)
    assert seen == [3, 3, 1, 1, 1, 3, 2, 1, 3, 3]  # 5 goes by 3; 6 and 7 have two and one left; then anew


def exact_rounds(accept: np.ndarray, length: int) -> float:
    """Expected steps of one answer, over all ways through it."""
    n, k = accept.shape

    def rounds(at: int) -> float:
        if at >= n:
            return 0.0
        total, slots = 1.0, min(length, k, n - at)
        for outcome in itertools.product((True, False), repeat=slots):
            chance = np.prod([a if kept else 1 - a for kept, a in zip(outcome, accept[at], strict=False)])
            accepted = next((i for i, kept in enumerate(outcome) if not kept), slots)
            total += chance * rounds(at + accepted + 1)
        return total

    return rounds(0)


def test_drawn_acceptances_have_their_expectation() -> None:
    """Against all outcomes of a short answer, enumerated: 6,000 steps and more tell two digits."""
    accept = np.random.default_rng(3).random((5, 3))
    drafts = walk(accept.tolist(), [5])
    for length in range(4):
        per_round = simulate(drafts, fixed(length), lambda _: 1.0, requests=50, steps=400, seed=1)[1]
        assert per_round == pytest.approx(5 / exact_rounds(accept, length), rel=0.01)


def test_every_answer_takes_part_and_the_seed_decides() -> None:
    """Of two answers one is accepted whole, the other never."""
    drafts = walk([[1.0]] * 4 + [[0.0]] * 4, [4, 4])
    runs = [
        simulate(drafts, fixed(1), lambda _: 1.0, requests=8, steps=300, seed=seed)[1] for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0] == pytest.approx(8 / (2 + 4), rel=0.05)


def test_the_recommended_length_is_the_fastest_fixed_one(tmp_path: Path) -> None:
    """Free verification wants whole blocks; verification by the token wants none."""
    drafts = walk([[0.9, 0.8]] * 6, [6])
    free, dear = (
        read_sps(written(tmp_path, {"token_counts": [1, 64], "step_time_ms": times}))
        for times in ([5, 5], [1, 64])
    )
    rows = simulate_all(drafts, free, requests=4, num_steps=50)
    assert [(row.policy, row.length) for row in rows] == [("none", None), ("fixed", 1), ("fixed", 2)]
    assert best_length(rows) == 2
    assert best_length(simulate_all(drafts, dear, requests=4, num_steps=50)) == 0
    sure = walk([[0.9, 0.8]] * 6, [6], [[0.9, 0.8]] * 6)
    names = [row.policy for row in simulate_all(sure, free, requests=4, num_steps=5)]
    assert names[3:] == ["algorithm 1", "global"]
    even = PolicyFigures(
        policy="fixed", length=2, tokens_per_second=2, tokens_per_round=1, verified_per_round=2
    )
    fewer = PolicyFigures(
        policy="fixed", length=1, tokens_per_second=2, tokens_per_round=1, verified_per_round=1
    )
    assert best_length([even, fewer]) == 1


def test_drafting_is_paid_by_those_who_draft_and_reckoned_with(tmp_path: Path) -> None:
    """A step takes a quarter of a millisecond a token. Four requests, each sure by 0.9 of its one token.

    Without drafting 4 / 1 ms is better than 4.9 / 1.25 ms, so Algorithm 1 verifies nothing. With 5 ms of it
    4.9 / 6.25 ms is better than 4 / 6 ms, and so on up to 7.6 / 7 ms.
    """
    drafts = walk([[0.9]] * 400, [400], [[0.9]] * 400)
    table = read_sps(written(tmp_path, {"token_counts": [4, 8], "step_time_ms": [1, 2]}))
    free, paid = (
        {row.policy: row for row in simulate_all(drafts, table, requests=4, num_steps=50, draft_seconds=each)}
        for each in (0.0, 0.005)
    )
    assert free["none"] == paid["none"]
    assert free["none"].tokens_per_second == pytest.approx(4000)
    for found, milliseconds in ((free, 2), (paid, 7)):
        per_second = 1000 * 4 * found["fixed"].tokens_per_round / milliseconds
        assert found["fixed"].tokens_per_second == pytest.approx(per_second)
    assert (free["algorithm 1"].verified_per_round, paid["algorithm 1"].verified_per_round) == (0, 1)


def test_blocks_are_laid_out_by_answer() -> None:
    """Two answers of one sample and one of another: each ends where its anchors end."""
    valid = np.array([[1, 1], [1, 0], [1, 0], [1, 1], [1, 1], [1, 0]], bool)
    accept = np.full((6, 2), 0.5)
    logits = np.zeros((6, 2))
    blocks = Blocks(
        np.array([3, 3, 3, 4, 4, 4]), np.array([5, 6, 9, 2, 3, 4]), valid, accept, accept, valid, logits + 2.0
    )
    drafts = drafts_of(blocks, [1.0, 2.0])
    assert drafts.starts.tolist() == [0, 2, 3]
    assert drafts.left.tolist() == [2, 1, 1, 3, 2, 1]
    assert drafts.slots.tolist() == [2, 1, 1, 2, 2, 1]
    assert drafts.accept.tolist() == np.where(valid, 0.5, 0.0).tolist()
    sure = 1 / (1 + np.exp(-np.array([2.0, 1.0])))  # the second position's logit is halved
    assert drafts.confidence == pytest.approx(np.where(valid, sure, 0.0))
    assert drafts_of(blocks, None).confidence[0].tolist() == pytest.approx([sure[0], sure[0]])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=20))
    return run


def test_the_command(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    path = written(tmp_path, SGLANG)
    command = ("schedule", "--cache", cache_dir, "--run", run_dir, "--device", "cpu", "--sps", path)
    result = json.loads(run_ok(*command, "--json", "--requests", "4", "--steps", "40", "--seed", "3"))
    again = json.loads(run_ok(*command, "--json", "--requests", "4", "--steps", "40", "--seed", "3"))
    assert result == again
    rows = result.pop("policies")
    names = [(row["policy"], row["length"]) for row in rows]
    lengths = [("fixed", 1), ("fixed", 2), ("fixed", 3)]
    assert names == [("none", None), *lengths, ("algorithm 1", None), ("global", None)]
    assert rows[0]["tokens_per_second"] == pytest.approx(400)
    assert rows[0]["tokens_per_round"] == 1
    assert {key: result[key] for key in ("requests", "steps", "seed", "table", "calibrated", "draft_ms")} == {
        "requests": 4,
        "steps": 40,
        "seed": 3,
        "table": "SGLang",
        "calibrated": False,
        "draft_ms": 0.0,
    }
    folder = find_checkpoint(run_dir)
    (folder / CALIBRATION).write_text('{"temperatures": [0.01, 0.01, 0.01]}')
    other = json.loads(run_ok(*command, "--json", "--requests", "4", "--steps", "40", "--seed", "3"))
    (folder / CALIBRATION).unlink()
    assert other["calibrated"] is True
    assert other["policies"][:4] == rows[:4]
    assert other["policies"][4] != rows[4]
    text = run_ok(*command, "--requests", "4", "--steps", "40", "--seed", "3")
    assert "confidences as trained" in text
    assert f"{rows[2]['tokens_per_second']:,.1f}" in text
    assert "TensorRT-LLM's" in text


def test_a_draft_without_confidences_has_fixed_lengths_only(cache_dir: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run", written(tmp_path, TENSORRT)
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1, draft__confidence_head="false"))
    command = ("schedule", "--cache", cache_dir, "--run", run, "--device", "cpu", "--sps", path)
    result = json.loads(run_ok(*command, "--json", "--requests", "2", "--steps", "9"))
    assert [row["policy"] for row in result["policies"]] == ["none", "fixed", "fixed", "fixed"]
    assert result["calibrated"] is None
    text = run_ok(*command, "--requests", "2", "--steps", "9", "--draft-ms", "2.5")
    assert "The draft has no confidence head, so fixed lengths are all that there is to choose." in text
    assert "and 2.5 ms of drafting" in text
    assert "Algorithm 1" not in text


def test_batches_beyond_the_table_are_refused(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Engines take what is beyond as free."""
    command = ("schedule", "--cache", cache_dir, "--run", run_dir, "--device", "cpu", "--sps")
    path = written(tmp_path, SGLANG)
    refused = run_cli(*command, path, "--requests", "17")
    assert_refused(
        refused, 2, "ends at 64 tokens", "17 requests make batches of up to 68", "lower --requests"
    )
    path = written(tmp_path, TENSORRT)
    assert_refused(run_cli(*command, path, "--requests", "5"), 2, "ends at 4 requests", "5 requests")
    assert_refused(run_cli(*command, tmp_path / "none.json"), 2, "none.json", "No such file")
    assert_refused(run_cli(*command[:-1]), 2, "--sps")
