"""A run of an EAGLE 3.1 draft with a reduced vocabulary, from the cache to the target's own text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.cache import CacheReader
from tests.conftest import FP32, assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.train.runs import figures_of, train_arguments, weights_of
from train.draft.vocabulary import kept_tokens
from train.runs.open import open_draft
from train.runs.results import read_evaluation, read_speculation

KIND = {
    **dict.fromkeys(("draft__markov_rank", "draft__block_size", "draft__num_layers")),
    "draft__kind": "eagle3",
    "draft__ttt_steps": 3,
    "draft__fc_norm": "true",
    "draft__norm_output": "true",
    "draft__draft_vocab_size": 60,
    "train__max_steps": 4,
    "train__log_every": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("eagle3") / "run"
    run_ok(*train_arguments(cache_dir, path, **KIND))
    return path


def test_it_learns_and_a_continued_run_is_the_same(run: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Stopped after two steps and continued: the same weights and log, bit for bit."""
    broken = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, broken, **KIND | {"train__activation_checkpointing": "true"}))
    same = weights_of(run)
    for name, weight in weights_of(broken).items():
        torch.testing.assert_close(weight, same[name])
    stopped, settings = tmp_path / "stopped", KIND | {"train__checkpoint_every": 2}
    run_ok(*train_arguments(cache_dir, stopped, **settings))
    shutil.rmtree(stopped / "checkpoints" / "step-000004")  # as if it had been killed before the last step
    run_ok(*train_arguments(cache_dir, stopped, **settings))
    found = weights_of(stopped)
    assert found.keys() == same.keys()
    assert all(torch.equal(found[name], same[name]) for name in same)
    losses = [line["soft_ce_loss"] for line in figures_of(run) if "soft_ce_loss" in line]
    assert losses[-1] < losses[0]


def test_it_is_measured_decodes_and_comes_back(
    run: Path, cache_dir: Path, target_dir: Path, tmp_path: Path
) -> None:
    """Drafts of 60 tokens leave the target's text as it is; an import gives the same figures."""
    run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu")
    measured = read_evaluation(open_draft(run).folder)
    options = ("--target", target_dir, "--cache", cache_dir, "--num-prompts", "2", "--max-new-tokens", "12")
    run_ok("speculate", *options, "--run", run, "--temperature", "0", "--temperature", "1", *FP32)
    greedy, sampling = read_speculation(open_draft(run).folder).runs
    assert greedy.identical == 2
    assert len(sampling.accept_given_prefix) == 3
    run_ok("export", run, tmp_path / "export", "--to", "vllm", "--dtype", "float32")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert values["draft_vocab_size"] == 60
    assert values["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    values = ("train.held_out=0.2", "train.precision=fp32", "train.batch_tokens=256")
    values += ("train.anchors_per_batch=64",)
    settings = [text for value in values for text in ("--set", value)]
    run_ok("import", tmp_path / "export", "--cache", cache_dir, "--run", tmp_path / "back", *settings)
    for name, weight in weights_of(run).items():
        assert torch.equal(weights_of(tmp_path / "back")[name], weight), name
    run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "back", "--device", "cpu")
    again = read_evaluation(open_draft(tmp_path / "back").folder)
    assert again.accept_by_position == measured.accept_by_position
    assert again.tau == measured.tau


def test_settings_of_other_kinds_are_refused(cache_dir: Path, tmp_path: Path) -> None:
    result = run_cli(*train_arguments(cache_dir, tmp_path / "run", **KIND, draft__mask_token_id=3))
    assert_refused(result, 2, "config.draft: unknown key 'mask_token_id'")


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_ranks_do_what_one_does(run: Path, cache_dir: Path, tmp_path: Path, parallelism: str) -> None:
    """The step is shared; the unroll, the trained head and the kept tokens are the same on each rank."""
    shared = KIND | {"train__micro_batches_per_step": 3}
    run_ok(*train_arguments(cache_dir, tmp_path / "one", **shared))
    two = train_arguments(cache_dir, tmp_path / "two", **shared, train__parallelism=parallelism)
    for process in start_ranks(tmp_path / "out", 2, *two):
        assert process.wait() == 0, process.err
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=5e-5, msg=name)
    assert torch.equal(ours["d2t"], weights_of(run)["d2t"])
    whole = CacheReader(cache_dir).frozen()["lm_head.weight"]
    assert not torch.equal(ours["lm_head.weight"], whole[kept_tokens(ours["d2t"])])
