"""`dspark evaluate`: every figure against a naive loop over the cache's own samples, in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import CacheReader
from tests import reference
from tests.conftest import EXACT, FP32, assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.tiny import make_conversations
from tests.train.drafts import spec_of
from tests.train.runs import train_arguments
from train.data.sampling import drawn_anchors
from train.data.split import split
from train.runs.directory import load_run_config
from train.runs.open import find_checkpoint, open_draft


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Path:
    """A cache of two files."""
    folder = tmp_path_factory.mktemp("sources")
    files = [make_conversations(folder / f"{name}.jsonl", 20, seed) for seed, name in enumerate("ab")]
    arguments = ["capture", "--target", target_dir, "--cache", folder / "cache", "--layers", "0,2,4", *EXACT]
    run_ok(*arguments, *FP32, *(word for file in files for word in ("--data", file)))
    return folder / "cache"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, two_sources: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    settings = {"train__held_out": 0.3, "train__eval_anchors": 10000}
    run_ok(*train_arguments(two_sources, run, train__max_steps=40, **settings))
    return run


def evaluated(cache: Path, run: Path, *options: str) -> dict:
    return json.loads(run_ok("evaluate", "--cache", cache, "--run", run, "--json", *options))


def expected_blocks(cache: Path, run: Path, anchors: int | None, seed: int) -> list[dict]:
    """Each block's sample, acceptances and greedy matches by the naive loop, and the naive loss of all."""
    reader, config = CacheReader(cache), load_run_config(run)
    model = open_draft(run).model(reader)
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    spec = spec_of(model)
    _, held_out = split(reader, config.train.held_out)
    blocks, samples, all_anchors = [], [], []
    for i in held_out.tolist():
        cached = reader.read(i, model.config.target_layer_ids)
        last = torch.zeros(len(cached.input_ids), reader.hidden_size, dtype=torch.float64)
        last[cached.last_positions] = cached.last_hidden.double()
        sample = reference.Sample(
            input_ids=cached.input_ids.tolist(),
            loss_mask=cached.loss_mask.tolist(),
            context=cached.context.double(),
            last_hidden=last,
        )
        candidates = np.array(reference.candidates(sample))
        (chosen,) = drawn_anchors(anchors, seed)([candidates], [reader.sample_ids[i].tobytes()])
        samples.append(sample)
        all_anchors.append(chosen.tolist())
        for anchor in chosen.tolist():
            hidden = reference.block_hidden(weights, spec, sample, anchor)
            logits, _ = reference.block_logits(weights, spec, sample, anchor, hidden)
            accept, match = [], []
            for k in range(reference.supervised_slots(sample, anchor, spec.block_size)):
                teacher = reference.base_logits(weights, spec, sample.last_hidden[anchor + k])
                accept.append(1 - float(reference.total_variation_l1(logits[k], teacher)) / 2)
                match.append(int(logits[k].argmax() == teacher.argmax()))
            length = len(sample.input_ids)
            blocks.append({"sample": i, "length": length, "context": anchor, "a": accept, "m": match})
    loss = reference.loss(weights, spec, samples, all_anchors, 4.0, 0.1, 0.9, 1.0)
    return [{"loss": loss}, *blocks]


def test_every_figure_against_the_naive_loop(two_sources: Path, run_dir: Path) -> None:
    got = evaluated(two_sources, run_dir, "--anchors", "5", "--seed", "3")
    head, *blocks = expected_blocks(two_sources, run_dir, 5, 3)
    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss", "accept_rate", "tau"):
        assert got[name] == pytest.approx(float(head["loss"][name]), rel=1e-4), name
    assert got["accept_by_position"] == pytest.approx(head["loss"]["accept_by_position"], rel=1e-4)
    assert got["blocks"] == len(blocks)
    greedy = [sum(np.cumprod(block["m"])) for block in blocks]
    assert got["greedy_tau"] == pytest.approx(1 + np.mean(greedy))
    assert 1 < got["greedy_tau"] < 4
    reader = CacheReader(two_sources)
    for name in ("a.jsonl", "b.jsonl"):
        own = [b for b in blocks if reader.sources[b["sample"]] == "ab".index(name[0])]
        group = got["by_source"][name]
        assert (group["samples"], group["blocks"]) == (len({b["sample"] for b in own}), len(own))
        assert group["tau"] == pytest.approx(1 + np.mean([np.cumprod(b["a"]).sum() for b in own]), rel=1e-4)
    for bucket, group in got["by_length"].items():
        low, high = map(int, bucket.split("-"))
        assert group["blocks"] == sum(low <= b["length"] <= high for b in blocks)
    assert sum(group["blocks"] for group in got["by_length"].values()) == len(blocks)
    assert len(got["by_context"]) > 1
    for bucket, group in got["by_context"].items():
        low, high = map(int, bucket.split("-"))
        own = [b for b in blocks if low <= b["context"] <= high]
        assert (group["samples"], group["blocks"]) == (len({b["sample"] for b in own}), len(own))
        assert group["tau"] == pytest.approx(1 + np.mean([np.cumprod(b["a"]).sum() for b in own]), rel=1e-4)
    assert sum(group["blocks"] for group in got["by_context"].values()) == len(blocks)


def test_every_candidate_is_an_anchor_unless_fewer_are_asked_for(two_sources: Path, run_dir: Path) -> None:
    got = evaluated(two_sources, run_dir)
    reader = CacheReader(two_sources)
    _, held_out = split(reader, 0.3)
    assert got["blocks"] == reader.candidates[held_out].sum()
    assert got["anchors"] == "all"
    assert got == evaluated(two_sources, run_dir), "not the same twice"
    assert got == json.loads((find_checkpoint(run_dir) / "evaluation.json").read_text())
    some = evaluated(two_sources, run_dir, "--anchors", "3")
    assert some["blocks"] == np.minimum(reader.candidates[held_out], 3).sum()
    assert some["tau"] != evaluated(two_sources, run_dir, "--anchors", "3", "--seed", "1")["tau"]
    assert got["untrained"]["tau"] < got["tau"] - 0.05
    assert got["cache"]["bytes"] == reader.manifest.num_bytes
    identity = reader.manifest.identity
    assert got["cache"]["data_sha256"] == identity.data.sha256
    assert got["cache"]["target_weights"] == identity.target.weights


def test_batches_and_anchor_groups_change_nothing(two_sources: Path, run_dir: Path, tmp_path: Path) -> None:
    """A run that packs other batches and takes its anchors a few at a time gets the same figures."""
    other = tmp_path / "other"
    shutil.copytree(run_dir, other, symlinks=True)
    config = (other / "config.toml").read_text()
    assert "batch_tokens = 256" in config
    config = config.replace("batch_tokens = 256", "batch_tokens = 1024")
    (other / "config.toml").write_text(config.replace("anchors_per_batch = 64", "anchors_per_batch = 7"))
    want, got = evaluated(two_sources, run_dir), evaluated(two_sources, other)
    for name in ("loss", "tau", "greedy_tau", "accept_by_position", "accept_given_prefix"):
        assert got[name] == pytest.approx(want[name], rel=1e-6), name
    assert got["confidence"]["prefix"]["ece"] == pytest.approx(want["confidence"]["prefix"]["ece"], rel=1e-5)


def test_training_says_the_same_of_the_same_anchors(two_sources: Path, run_dir: Path) -> None:
    page = json.loads((run_dir / "latest" / "training.json").read_text())
    quick, full = page["progress"]["evaluation"], evaluated(two_sources, run_dir)
    for name in quick.keys() - {"step"}:
        assert quick[name] == pytest.approx(full[name], rel=1e-5), name


def test_kernels_of_training_need_not_run_here(two_sources: Path, run_dir: Path, tmp_path: Path) -> None:
    """A run that asked for a GPU's kernels is evaluated on a CPU."""
    run = shutil.copytree(run_dir, tmp_path / "gpu", symlinks=True)
    settings = (run / "config.toml").read_text()
    assert (settings.count('attention = "auto"'), settings.count('kernel = "auto"')) == (1, 1)
    settings = settings.replace('attention = "auto"', 'attention = "flex"')
    (run / "config.toml").write_text(settings.replace('kernel = "auto"', 'kernel = "triton"'))
    assert evaluated(two_sources, run) == evaluated(two_sources, run_dir)


def test_a_draft_without_a_confidence_head(two_sources: Path, tmp_path: Path) -> None:
    run = tmp_path / "plain"
    settings = {"draft__confidence_head": "false", "draft__markov_head": "none"}
    settings |= {"draft__confidence_with_markov": "false", "train__max_steps": 2}
    run_ok(*train_arguments(two_sources, run, **settings))
    result = evaluated(two_sources, run)
    assert result["confidence"] is None
    assert result["thresholds"] is None
    text = run_ok("evaluate", "--cache", two_sources, "--run", run)
    assert "confidence, calibration" not in text
    assert_refused(
        run_cli("calibrate", "--cache", two_sources, "--run", run),
        1,
        "no confidence head",
        "draft.confidence",
    )


def test_the_table_says_the_same(two_sources: Path, run_dir: Path) -> None:
    text, result = (
        run_ok("evaluate", "--cache", two_sources, "--run", run_dir),
        evaluated(two_sources, run_dir),
    )
    assert f"held-out tau {result['tau']:.3f} sampling, {result['greedy_tau']:.3f} greedy" in text
    line = next(line for line in text.splitlines() if line.startswith("  acceptance, sampling"))
    assert line.split()[-3:] == [f"{a:.3f}" for a in result["accept_by_position"]]
    assert "a.jsonl" in text


def test_two_processes_say_what_one_says(two_sources: Path, run_dir: Path, tmp_path: Path) -> None:
    want = evaluated(two_sources, run_dir)
    arguments = ("evaluate", "--cache", two_sources, "--run", run_dir, "--json")
    first, second = start_ranks(tmp_path, 2, *arguments)
    assert (first.wait(), second.wait()) == (0, 0), first.err
    got = json.loads(first.out)
    assert second.out == ""
    for name in ("blocks", "tau", "greedy_tau", "accept_by_position"):
        assert got[name] == pytest.approx(want[name], rel=1e-6), name
    assert got["untrained"]["tau"] == pytest.approx(want["untrained"]["tau"], rel=1e-6)


def test_refusals(two_sources: Path, run_dir: Path, tmp_path: Path) -> None:
    command = ("evaluate", "--cache", two_sources)
    assert_refused(run_cli(*command, "--run", tmp_path / "none"), 1, "no run at")
    refused = run_cli(*command, "--run", run_dir, "--checkpoint", "step-000001")
    assert_refused(refused, 1, "no finished checkpoint", "step-000040")
    empty = tmp_path / "empty"
    run_ok(*train_arguments(two_sources, empty, train__max_steps=1, train__held_out=0))
    assert_refused(run_cli(*command, "--run", empty), 2, "nothing was held out")
