"""Training on a cache without last hidden states: a kind that can do it, and one that can't."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train.draft
from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.drafts import small_model
from tests.train.runs import figures_of, progress_of, train_arguments, weights_of
from train.data.loader import load_batch, load_encoded_batch
from train.data.sampling import random_anchors
from train.draft import DRAFTS
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.ridge import ridge_initialise
from train.runs.state import Best

SAMPLES, LAYERS, TOKENS = [7, 0, 21], (4, 0), 512
NO_TEACHER = {"l1_loss", "confidence_loss", "accept_rate", "tau"}
# Of a kind that learns from the data's tokens alone, in a DSpark draft.
CROSS_ENTROPY = {"loss__ce_alpha": 1.0, "loss__l1_alpha": 0.0, "loss__confidence_alpha": 0.0}


@pytest.fixture(scope="module")
def without(tmp_path_factory, cache_dir: Path) -> Path:
    cache = tmp_path_factory.mktemp("without") / "cache"
    run_ok("convert", cache_dir, cache, "--last-hidden", "none")
    return cache


@pytest.fixture
def undemanding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that needs no last hidden states, under the name of the only kind."""
    kind = dataclasses.replace(DRAFTS["dspark"], needs_last_hidden=lambda config: config.loss.l1_alpha > 0)
    monkeypatch.setitem(train.draft.DRAFTS, "dspark", kind)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_batch_has_none_and_all_else(cache_dir: Path, without: Path, encoded: bool) -> None:
    collate = collate_anchors(random_anchors(6, 0, 0))

    def load(cache: Path):
        reader = CacheReader(cache)
        if encoded:
            batch = load_encoded_batch(reader, SAMPLES, LAYERS, TOKENS, collate, pin=False)
            return batch.to(torch.device("cpu"))
        return load_batch(reader, SAMPLES, LAYERS, TOKENS, collate)

    full, batch = load(cache_dir), load(without)
    assert batch.target_last_hidden_states is None
    expected, got = full.tensors(), batch.tensors()
    assert expected.keys() - got.keys() == {"target_last_hidden_states"}
    for name, value in got.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[name])), name


def test_the_kind_that_needs_them_refuses_by_name(without: Path, tmp_path: Path) -> None:
    for options in ({}, CROSS_ENTROPY):
        result = run_cli(*train_arguments(without, tmp_path / "run", **options))
        assert_refused(result, 1, "draft.kind = dspark needs", str(without), "without --last-hidden none")
    assert not (tmp_path / "run").exists()


def test_ridge_needs_them(without: Path, undemanding: None, tmp_path: Path) -> None:
    reader = CacheReader(without)
    with pytest.raises(CacheError, match=r"draft\.init = ridge needs"):
        ridge_initialise(small_model(), reader, np.arange(3))
    arguments = train_arguments(without, tmp_path / "run", draft__init="ridge", **CROSS_ENTROPY)
    assert_refused(run_cli(*arguments), 1, "draft.init = ridge needs", str(without))


def test_measuring_acceptance_needs_them(cache_dir: Path, without: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1))
    for command in ("evaluate", "calibrate"):
        result = run_cli(command, "--cache", without, "--run", run, "--device", "cpu")
        assert_refused(result, 1, "measuring the acceptance of a draft needs", str(without))


def test_such_a_run_knows_the_cross_entropy_alone(
    cache_dir: Path, without: Path, undemanding: None, tmp_path: Path
) -> None:
    """It learns the same weights as beside a teacher that has no weight, and says nothing of acceptance."""
    options = {**CROSS_ENTROPY, "train__max_steps": 6, "train__eval_every": 2, "train__log_every": 2}
    full, run = tmp_path / "full", tmp_path / "run"
    run_ok(*train_arguments(cache_dir, full, **options))
    shown = run_ok(*train_arguments(without, run, **options))
    (told,) = [line for line in shown.splitlines() if line.startswith("held-out ")]
    assert told.startswith("held-out cross entropy ")
    assert "tau" not in told
    expected, weights = weights_of(full), weights_of(run)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    lines, others = figures_of(run), figures_of(full)
    assert len(lines) == len(others) == 6
    for line, other in zip(lines, others, strict=True):
        got, wanted = line.get("held_out", line), other.get("held_out", other)
        gone = (NO_TEACHER | {"accept_by_position"}) & wanted.keys()
        assert gone >= NO_TEACHER
        assert all(got[name] is None for name in gone)
        assert {k: v for k, v in got.items() if k not in gone} == {
            k: v for k, v in wanted.items() if k not in gone
        }
    evaluations = [line["held_out"] for line in lines if "held_out" in line]
    best = min(evaluations, key=lambda each: each["ce_loss"])
    assert progress_of(run)["best"] == {"step": best["step"], "tau": None, "ce_loss": best["ce_loss"]}
    assert (run / "best").resolve().name == f"step-{best['step']:06d}"
    assert json.loads(run_ok("compare", run, "--format", "json"))[0]["tau"] is None
    assert run.name in run_ok("compare", run, full)
    run_ok("report", run, full, "--out", tmp_path / "report.html")


def test_the_best_by_hand() -> None:
    def best(step: int, tau: float | None, ce_loss: float) -> Best:
        return Best.of({"step": step, "tau": tau, "ce_loss": ce_loss})

    assert best(1, 1.5, 3.0) == Best(1, tau=1.5)
    assert best(2, 1.6, 9.0).beats(best(1, 1.5, 3.0))
    assert not best(2, 1.5, 1.0).beats(best(1, 1.5, 3.0))
    assert best(2, None, 2.9).beats(best(1, None, 3.0))
    assert not best(2, None, 3.1).beats(best(1, None, 3.0))
    assert best(1, None, 3.0).beats(None)
    assert not best(1, None, math.nan).beats(None)
    assert not best(1, math.inf, 3.0).beats(None)
