"""The target's predictions before the first shard: what is measured, what warns, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from capture.data.conversations import TokenizedSample
from capture.engines.huggingface import HuggingFaceEngine
from capture.shards import prediction
from capture.shards.evidence import CANDIDATES, predicted_rows
from capture.shards.prediction import Prediction, judge, measure_prediction
from pipeline.cache import read_manifest
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments
from tests.capture.test_fill import after_each_forward
from tests.capture.test_lengths import prepared
from tests.conftest import assert_refused, run_cli, run_ok
from tests.tiny import make_target


def samples_of(count: int, length: int = 40) -> list[TokenizedSample]:
    found = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        mask = (generator.random(length) < 0.6).astype(np.uint8)
        found.append(TokenizedSample(seed, generator.integers(3, 250, length).astype(np.int32), mask))
    return found


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_figures_are_those_of_transformers(tmp_path, family, monkeypatch):
    """Perplexity and ranks from the model's own logits; in parts of seven rows, for memory's sake."""
    folder = make_target(tmp_path / "t", family, dtype=torch.float32)
    opened = open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu"))
    samples = samples_of(3)
    monkeypatch.setattr(prediction, "_ROWS_AT_ONCE", 7)
    rows = []
    real = prediction.head_logits

    def noted(hidden: Tensor, *rest: Any) -> Tensor:
        rows.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(prediction, "head_logits", noted)
    target = HuggingFaceEngine(opened.model(), (0, 1))
    found = measure_prediction(target, opened.identity(hash_weights=False), samples)
    assert max(rows) == 7

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses, first = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for t in range(1, len(ids)):
            if sample.loss_mask[t]:
                losses.append(-logits[t - 1].log_softmax(-1)[ids[t]].item())
                first.append(int(logits[t - 1].argmax()) == int(ids[t]))
    assert found.tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found.top1 == pytest.approx(np.mean(first))


def test_shuffling_is_what_spoils_a_model_that_knows_its_text(tmp_path):
    """A model whose head repeats the token's own embedding knows constant rows, shuffled or not."""
    folder = make_target(tmp_path / "t", "llama", dtype=torch.float32, tie_word_embeddings=True)
    opened = open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu"))
    model, facts = opened.model(), opened.identity(hash_weights=False)
    with torch.no_grad():
        for layer in model.model.layers:  # the states are the embeddings
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.randn(model.model.embed_tokens.weight.shape) * 3)
    target = HuggingFaceEngine(model, (0, 1))
    pairs = np.repeat(np.arange(3, 203, dtype=np.int32), 3)  # a token follows itself twice of three times
    found = measure_prediction(target, facts, [TokenizedSample(0, pairs, np.ones(600, np.uint8))])
    assert found.top1 == pytest.approx(400 / 599, abs=0.01)
    assert found.shuffled > 20 * found.perplexity
    again = measure_prediction(target, facts, [TokenizedSample(0, pairs, np.ones(600, np.uint8))])
    assert again == found  # the shuffle has a seed


@pytest.mark.parametrize(
    ("figures", "vocabulary", "verdict"),
    [
        ((926, 2.4, 2777, 0.91), 49152, "good"),
        ((926, 75.0, 7975, 0.22), 49152, "good"),
        ((926, 8.6, 13.5, 0.2), 49152, "good"),  # digits
        ((926, 473, 22700, 0.17), 49152, "suspicious"),
        ((926, 6696, 8e8, 0.15), 49152, "suspicious"),
        ((926, 62290, 57000, 0.0), 49152, "suspicious"),  # all random: no worse than guessing
        ((926, 50, 60, 0.3), 49152, "suspicious"),
        ((926, 3.4e6, 5e6, 0.03), 49152, "impossible"),
        ((926, math.inf, math.inf, 0.0), 49152, "impossible"),
        ((926, math.nan, 5.0, 0.0), 49152, "impossible"),
        ((49, math.inf, math.inf, 0.0), 49152, "good"),  # too few to tell
        ((926, 3300, 3300, 0.0), 325, "impossible"),  # of bytes, or a few words: ten times worse is the same
        ((926, 3200, 3200, 0.0), 325, "suspicious"),
    ],
)
def test_verdicts(figures, vocabulary, verdict):
    found = judge(Prediction(*figures), vocabulary)
    assert found.verdict == verdict
    assert f"{figures[0]} supervised tokens" in found.line
    assert "\n" not in found.line


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A random target that is surer of its wrong answers than guessing is."""
    folder = tmp_path_factory.mktemp("wide") / "t"
    values = {"hidden_size": 256, "head_dim": 64, "initializer_range": 1.0, "num_hidden_layers": 3}
    return make_target(folder, "qwen3", dtype=torch.float32, **values)


def test_an_impossible_target_is_refused_unless_told_otherwise(tmp_path, wide, few):
    command = arguments(wide, few, tmp_path / "cache", layers="0,1")
    assert_refused(run_cli(*command), 1, "worse than guessing among its 325 tokens", "--no-proof")
    assert not list((tmp_path / "cache" / "shards").iterdir())
    result = run_cli(*command, "--no-proof")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "perplexity" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: the target predicts the data far worse")
    assert read_manifest(tmp_path / "cache").fidelity["proof.perplexity"] > 3250


def test_a_suspicious_target_is_captured_with_one_warning(tmp_path, fp32_target, few):
    result = run_cli(*arguments(fp32_target, few, tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "perplexity" in line]
    assert len(lines) == 1
    assert "warning: the target predicts the data badly" in lines[0]


def test_no_proof_changes_no_bytes(tmp_path, fp32_target, few):
    run_ok(*arguments(fp32_target, few, tmp_path / "one"))
    run_ok(*arguments(fp32_target, few, tmp_path / "two"), "--no-proof")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


# Rows whose states can't be used


def spoil(ids_of_bad: list[np.ndarray]):
    def change(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
        for row, found in enumerate(input_ids):
            for bad in ids_of_bad:
                width = min(len(bad), len(found))
                if np.array_equal(found[:width].numpy(), bad[:width]):
                    for state in states.values():
                        state[row, 0] = float("nan")

    return change


def test_a_bad_row_gives_its_place_in_the_proof_to_another(tmp_path, fp32_target, few, monkeypatch):
    plan = prepared(fp32_target, few, tmp_path / "cache", batch_tokens=256)
    first = plan.batching.batches[0]
    bad = [plan.data[int(plan.batching.order[i])].input_ids for i in (first[0], first[-1])]
    after_each_forward(monkeypatch, spoil(bad))
    result = run_cli(*arguments(fp32_target, few, tmp_path / "cache"))
    assert "perplexity" in result.stderr  # the proof is over; the shards deal with the rows
    assert "every one of" not in result.stderr


def test_a_target_whose_every_row_is_bad_is_refused(tmp_path, fp32_target, few, monkeypatch):
    def change(_ids: Tensor, states: dict[int | str, Tensor]) -> None:
        for state in states.values():
            state.fill_(float("nan"))

    after_each_forward(monkeypatch, change)
    result = run_cli(*arguments(fp32_target, few, tmp_path / "cache"), "--no-proof")
    assert_refused(result, 1, "states can't be used for every one of", "NaN", "--dtype float32")


def test_the_rows_are_few_and_bounded(tmp_path, fp32_target):
    data = tmp_path / "long.jsonl"
    rows = [{"input_ids": [5 + n] * 500, "loss_mask": [1] * 500} for n in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = predicted_rows(prepared(fp32_target, data, tmp_path / "cache"))
    assert len(found) <= CANDIDATES
    assert sum(len(sample.input_ids) for sample in found) == 2048
