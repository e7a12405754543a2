"""Sequential temperature scaling: a known truth is found again, and each half is what it says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import CacheReader
from tests.conftest import FP32, assert_refused, capture_arguments, run_cli, run_ok
from tests.train.runs import train_arguments
from train.data.sampling import drawn_anchors
from train.data.split import split
from train.eval.calibrate import GRID, cut_unreached, fit_temperatures, halves
from train.eval.heldout import Blocks, measure
from train.eval.metrics import calibration
from train.runs.names import CALIBRATION
from train.runs.open import find_checkpoint, open_on_cache
from train.runs.results import read_calibration, read_temperatures
from train.runtime.distributed import open_ranks

K = 3
WRONG = ('{"temperatures": [1, 2]}', '{"temperatures": [1, Infinity, 1]}', '{"temperatures": [1, true, 1]}')


def blocks_of(accept: np.ndarray, confidence: np.ndarray, valid: np.ndarray | None = None) -> Blocks:
    n = len(accept)
    valid = np.ones(accept.shape, bool) if valid is None else valid
    junk = np.zeros(accept.shape)
    return Blocks(np.arange(n), np.arange(n), valid, junk, accept, junk.astype(bool), confidence)


def test_it_finds_the_temperatures_that_made_the_confidences() -> None:
    """Confidences that are the true acceptances but for a known temperature a position."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0.5, 1.5, (20000, K))
    truth = GRID[[28, 14, 20]]  # 2.5, 0.5 and 1
    blocks = blocks_of(1 / (1 + np.exp(-logits)), logits * truth)
    assert fit_temperatures(blocks).tolist() == pytest.approx(truth.tolist())


def slow_ece(predicted: list[float], outcomes: list[float]) -> float:
    sums: dict[int, float] = {}
    for p, y in zip(predicted, outcomes, strict=True):
        place = min(int(p * 15), 14)
        sums[place] = sums.get(place, 0.0) + p - y
    return sum(abs(total) for total in sums.values()) / len(predicted)


def test_each_position_is_fitted_behind_those_before_it_against_a_slow_search() -> None:
    rng = np.random.default_rng(1)
    accept, logits = rng.random((300, K)), rng.normal(1, 2, (300, K))
    valid = np.arange(K) < rng.integers(1, K + 1, 300)[:, None]
    got = fit_temperatures(blocks_of(accept, logits, valid))
    chosen: list[float] = []
    for k in range(K):
        best = None
        for temperature in sorted(GRID.tolist(), key=lambda t: abs(np.log(t))):
            predicted, outcomes = [], []
            for i in range(300):
                if valid[i, k]:
                    scales = [*chosen, temperature]
                    each = [1 / (1 + np.exp(-logits[i, j] / scales[j])) for j in range(k + 1)]
                    predicted.append(float(np.prod(each)))
                    outcomes.append(float(np.prod(accept[i, : k + 1])))
            error = slow_ece(predicted, outcomes)
            if best is None or error < best[0]:
                best = (error, temperature)
        assert best is not None
        chosen.append(best[1])
    assert got.tolist() == pytest.approx(chosen)


def test_a_position_that_nothing_reaches_keeps_its_confidences() -> None:
    valid = np.zeros((50, K), bool)
    valid[:, 0] = True
    rng = np.random.default_rng(2)
    temperatures = fit_temperatures(blocks_of(rng.random((50, K)), rng.normal(size=(50, K)), valid))
    assert temperatures[1:].tolist() == [1, 1]


def test_of_temperatures_equally_good_the_one_nearest_to_1_is_taken() -> None:
    accept = np.full((40, K), 0.5)
    assert fit_temperatures(blocks_of(accept, np.zeros((40, K)))).tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=40, train__held_out=0.4))
    return run


def test_what_the_command_writes_beside_the_draft(run_dir: Path, cache_dir: Path) -> None:
    command = ("calibrate", "--cache", cache_dir, "--run", run_dir)
    result = json.loads(run_ok(*command, "--json"))
    folder = find_checkpoint(run_dir)
    assert json.loads((folder / CALIBRATION).read_text()) == result
    # What SGLang reads of it.
    types = {"temperatures": float, "ece_before": float, "ece_after": float}
    assert all(isinstance(x, kind) for name, kind in types.items() for x in result[name])
    assert [len(result[name]) for name in types] == [3, 3, 3]
    assert isinstance(result["dataset"], str)
    assert isinstance(result["num_samples"], int)
    assert read_temperatures(folder, 3) == tuple(result["temperatures"])
    read = read_calibration(folder)
    assert read is not None
    assert json.loads(json.dumps(asdict(read))) == result
    reader = CacheReader(cache_dir)
    _, held_out = split(reader, 0.4)
    fitted, reported = halves(reader, held_out)
    assert set(fitted) | set(reported) == set(held_out)
    assert not set(fitted) & set(reported)
    assert (result["fit"]["samples"], result["report"]["samples"]) == (len(fitted), len(reported))
    for part, samples in (("fit", fitted), ("report", reported)):
        assert result[part]["blocks"] == reader.candidates[samples].sum()
    before, after = (result["report"][name]["prefix"] for name in ("before", "after"))
    assert result["ece_before"] == before["ece_by_position"]
    assert result["ece_after"] == after["ece_by_position"]
    assert f"{before['ece']:.4f} before, {after['ece']:.4f} after" in run_ok(*command)


def test_errors_stay_at_their_positions_where_no_block_reaches_the_last_ones(
    tmp_path: Path, target_dir: Path
) -> None:
    """Answers of four supervised tokens: anchors at the first three, so blocks of three slots at most."""
    rng = np.random.default_rng(5)
    rows = [
        {"input_ids": rng.integers(3, 300, 9).tolist(), "loss_mask": [0] * 5 + [1] * 4} for _ in range(40)
    ]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache, run = tmp_path / "cache", tmp_path / "run"
    run_ok(*capture_arguments(target_dir, tmp_path / "short.jsonl", cache))
    settings = {"train__held_out": 0.5, "train__anchors_per_batch": 32, "draft__block_size": 5}
    run_ok(*train_arguments(cache, run, train__max_steps=2, **settings))
    result = json.loads(run_ok("calibrate", "--cache", cache, "--run", run, "--json"))
    assert len(result["temperatures"]) == 5
    assert result["temperatures"][3:] == [1, 1]
    for name in ("before", "after"):
        by_position = result["report"][name]["prefix"]["ece_by_position"]
        assert [error is None for error in by_position] == [False, False, False, True, True]
        assert result[f"ece_{name}"] == by_position[:3]


def test_positions_that_no_block_reaches_are_the_last_ones() -> None:
    """Of prefixes of any lengths, as a block's supervised slots are; nothing else can come from a draft."""
    assert cut_unreached((0.5, 0.0, None, None)) == (0.5, 0.0)
    assert cut_unreached(()) == cut_unreached((None,)) == ()
    with pytest.raises(AssertionError, match="skipped"):
        cut_unreached((0.5, None, 0.25))
    rng = np.random.default_rng(3)
    for longest in range(1, K + 1):
        valid = np.arange(K) < rng.integers(1, longest + 1, 30)[:, None]
        valid[0] = np.arange(K) < longest
        told = calibration(blocks_of(rng.random((30, K)), rng.normal(size=(30, K)), valid))
        assert told is not None
        errors = told.prefix.ece_by_position
        assert cut_unreached(errors) == errors[:longest]
        assert None not in errors[:longest]


def test_the_blocks_of_a_draft_are_prefixes(run_dir: Path, cache_dir: Path) -> None:
    """Premise of the two tests above, on measured blocks: supervised slots are a prefix."""
    with open_ranks("cpu") as ranks:
        draft = open_on_cache(cache_dir, run_dir, ranks)
        every = drawn_anchors(None, 0)
        blocks = measure(draft.module, draft.reader, draft.held_out, draft.config, ranks, every)
    assert blocks.valid[:, 0].all()
    assert (blocks.valid[:, 1:] <= blocks.valid[:, :-1]).all()
    assert not blocks.valid.all()


def test_temperatures_that_are_none_are_refused(run_dir: Path, cache_dir: Path, target_dir: Path) -> None:
    path = find_checkpoint(run_dir) / CALIBRATION
    for content in ('{"temperatures": [1, -1, 2]}', '{"temperatures": "1"}', "{}", "[1]", "{", *WRONG):
        path.write_text(content)
        speculate = ("speculate", "--target", target_dir, "--run", run_dir, "--cache", cache_dir, *FP32)
        refused = run_cli(*speculate, "--threshold", "0.5", "--max-new-tokens", "2", "--num-prompts", "1")
        assert_refused(refused, 1, str(path))
    run_ok("calibrate", "--cache", cache_dir, "--run", run_dir)


def test_too_few_held_out_samples_are_refused(cache_dir: Path, tmp_path: Path) -> None:
    reader = CacheReader(cache_dir)
    leading = np.sort(reader.sample_ids[:, 0])
    one = float(leading[0] + 1) / 256  # the smallest id, or the few that share its byte
    run_ok(*train_arguments(cache_dir, tmp_path / "run", train__max_steps=1, train__held_out=one))
    refused = run_cli("calibrate", "--cache", cache_dir, "--run", tmp_path / "run")
    assert_refused(refused, 2, "can't be halved", "train.held_out")
