"""`dspark train` and `dspark evaluate` end to end on the tiny target, and their first errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader
from tests import machine
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.processes import Dspark, one_thread
from tests.tiny import make_target
from tests.train.runs import SMALL, figures_of, lines_of, progress_of, train_arguments
from train.config import TrainConfig
from train.data.loader import loaded
from train.data.packing import count_steps, epoch_packs
from train.data.split import split
from train.runs.open import find_checkpoint
from train.trainer.setup import most_candidates


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    settings = {"train__eval_every": 30, "train__eval_anchors": 1000}
    run_ok(*train_arguments(cache_dir, run, train__max_steps=60, **settings))
    return run


def test_it_learns_and_writes_what_it_should(run_dir: Path) -> None:
    logged = [line for line in lines_of(run_dir) if "held_out" not in line]
    assert [line["step"] for line in logged] == list(range(5, 61, 5))
    keys = [
        "step",
        "loss",
        "ce_loss",
        "l1_loss",
        "confidence_loss",
        "accept_rate",
        "tau",
        "grad_norm",
        "lr",
        "epoch",
        "skipped_steps",
        "tokens_per_s",
        "blocks_per_s",
        "data_wait_percent",
        "model_flops_per_s",
        "peak_flops_percent",
        "peak_memory_bytes",
    ]
    assert list(logged[0]) == keys
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.1
    held = [line["held_out"] for line in lines_of(run_dir) if "held_out" in line]
    assert [line["step"] for line in held] == [30, 60]
    assert held[1]["tau"] > held[0]["tau"]
    assert progress_of(run_dir)["evaluation"] == held[1]
    for line in logged:
        parts = 0.1 * line["ce_loss"] + 0.9 * line["l1_loss"] + line["confidence_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_checkpoint_is_in_hugging_face_layout(run_dir: Path) -> None:
    config = json.loads((run_dir / "latest" / "config.json").read_text())
    expected = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "block_size": 3,
        "num_anchors": 64,
        "target_layer_ids": [0, 2, 4],
        "num_target_layers": 6,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "mask_token_id": 320,  # the first id behind the tokenizer's
    }
    assert {key: config[key] for key in expected} == expected
    weights = load_file(run_dir / "latest" / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in weights
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(weights)  # the target's, in every cache


def test_evaluate_recomputes_the_figures(run_dir: Path, cache_dir: Path) -> None:
    """No sample here has more candidates than training's `eval_anchors`, so the figures are the same."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    got = json.loads(run_ok("evaluate", "--cache", cache_dir, "--run", run_dir, "--json"))
    want = progress_of(run_dir)["evaluation"]
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-5), key
    assert f"held-out tau {want['tau']:.3f}" in run_ok("evaluate", "--cache", cache_dir, "--run", run_dir)
    written = find_checkpoint(run_dir) / "evaluation.json"
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert {path.resolve() for path in after.keys() - before.keys()} == {written}
    assert {path: content for path, content in after.items() if path in before} == before


def test_training_never_loads_the_target(tmp_path: Path, data_file: Path, monkeypatch) -> None:
    target = make_target(tmp_path / "target", seed=3)
    cache = tmp_path / "cache"
    run_ok(*capture_arguments(target, data_file, cache))
    shutil.rmtree(target)
    moved = cache.rename(tmp_path / "moved")  # and a cache can be moved
    import transformers

    def refuse(*_args, **_kwargs):
        raise AssertionError("training built a target model")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", refuse)
    run_ok(*train_arguments(moved, tmp_path / "run", train__max_steps=2))
    run_ok("evaluate", "--cache", moved, "--run", tmp_path / "run")


def test_another_experiment_on_the_same_cache(tmp_path: Path, cache_dir: Path) -> None:
    """Other settings, a subset of the layers, no new capture, and the cache is left as it was."""
    before = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    settings = {"draft__target_layer_ids": "[0,4]", "draft__markov_head": "rnn", "draft__num_layers": 2}
    run_ok(*train_arguments(cache_dir, tmp_path / "run", train__max_steps=3, **settings))
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    assert config["target_layer_ids"] == [0, 4]
    assert load_file(tmp_path / "run" / "latest" / "model.safetensors")["fc.weight"].shape == (32, 64)
    run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "run")
    assert before == {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, cache_dir: Path) -> None:
    for name in ("a", "b"):
        run_ok(*train_arguments(cache_dir, tmp_path / name, train__max_steps=6))
    run_ok(*train_arguments(cache_dir, tmp_path / "c", train__max_steps=6, train__seed=1))
    a, b, c = ((tmp_path / n / "latest" / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_accumulation_does_not_change_the_step(tmp_path: Path, cache_dir: Path) -> None:
    """A step over everything in one pack, and in many small ones with all their anchors."""
    reader = CacheReader(cache_dir)
    samples, _ = split(reader, SMALL["train.held_out"])
    for name, batch_tokens, batches in (("whole", 16384, 1), ("parts", 256, 64)):
        most = most_candidates(reader.lengths[samples], reader.candidates[samples], batch_tokens)
        shape = {"train__batch_tokens": batch_tokens, "train__micro_batches_per_step": batches}
        settings = {"train__max_steps": 3, "train__anchors_per_batch": most, **shape}
        run_ok(*train_arguments(cache_dir, tmp_path / name, **settings))
    whole, parts = (load_file(tmp_path / n / "latest" / "model.safetensors") for n in ("whole", "parts"))
    for name, weight in whole.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-3, atol=2e-5, msg=name)
    for a, b in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "parts"), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["tau"] == pytest.approx(b["tau"], rel=1e-4)


@pytest.mark.parametrize("shuffle_shards", [None, 1])
def test_an_epoch_visits_every_sample(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, shuffle_shards: int | None
) -> None:
    settings = {"train__max_steps": '"none"', "train__epochs": 2, "train__log_every": 1}
    if shuffle_shards:
        settings["train__shuffle_shards"] = shuffle_shards
    read: list[list[int]] = []

    def noted(reader, packs, *arguments):
        packs, ahead = itertools.tee(packs)
        read.extend(list(members) for members, _ in ahead)
        return loaded(reader, packs, *arguments)

    monkeypatch.setattr("train.trainer.trainer.loaded", noted)
    run_ok(*train_arguments(cache_dir, tmp_path / "r", **settings))
    reader = CacheReader(cache_dir)
    samples, _ = split(reader, SMALL["train.held_out"])
    lengths, shards = reader.lengths[samples], reader.shards[samples]
    config = TrainConfig(batch_tokens=256, epochs=2, micro_batches_per_step=1, shuffle_shards=shuffle_shards)
    logged = [line["step"] for line in lines_of(tmp_path / "r") if "held_out" not in line]
    assert logged == list(range(1, count_steps(lengths, shards, config) + 1))
    orders = [epoch_packs(lengths, 256, 0, epoch, shards, shuffle_shards) for epoch in range(2)]
    assert read == [samples[members].tolist() for packs in orders for members in packs]
    for packs in read[: len(orders[0])], read[len(orders[0]) :]:
        visited = [i for members in packs for i in members]
        assert sorted(visited) == samples.tolist()
        by_turns = [shard for shard, _ in itertools.groupby(reader.shards[visited])]
        assert len(set(by_turns)) > 2
        assert (len(by_turns) == len(set(by_turns))) == bool(shuffle_shards)


def test_a_profile_of_some_steps(tmp_path: Path, cache_dir: Path) -> None:
    run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=8), "--profile", "2")
    events = json.loads((tmp_path / "r" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#5", "ProfilerStep#6"}
    short = run_cli(*train_arguments(cache_dir, tmp_path / "s", train__max_steps=2), "--profile", "2")
    assert_refused(short, 2, "--profile 2", "2 steps", "at most 1")
    assert not (tmp_path / "s").exists()


def test_what_a_newcomer_forgets_is_one_line(tmp_path: Path, cache_dir: Path) -> None:
    missing = run_cli("train", "--cache", tmp_path / "no", "--run", tmp_path / "r")
    assert_refused(missing, 1, "no cache at", "dspark capture")
    config = run_cli("train", "--cache", cache_dir, "--run", tmp_path / "r", "--config", tmp_path / "no.toml")
    assert_refused(config, 2, "no config file at", "no.toml")
    (tmp_path / "bad.toml").write_text("[draft\n")
    broken = run_cli(
        "train", "--cache", cache_dir, "--run", tmp_path / "r", "--config", tmp_path / "bad.toml"
    )
    assert_refused(broken, 2, "bad.toml", "TOML")
    assert_refused(run_cli("evaluate", "--cache", cache_dir, "--run", tmp_path / "no"), 1, "no run at")
    device = run_cli(*train_arguments(cache_dir, tmp_path / "r"), "--device", "cuda:77")
    assert_refused(device, 2, "cuda:77")
    assert not (tmp_path / "r").exists()


def test_a_run_is_evaluated_on_its_own_target_only(tmp_path: Path, run_dir: Path, data_file: Path) -> None:
    other = tmp_path / "cache"
    run_ok(*capture_arguments(make_target(tmp_path / "other", seed=9), data_file, other))
    assert_refused(run_cli("evaluate", "--cache", other, "--run", run_dir), 1, "was trained for target")


def one_thread_of_nobody() -> None:
    """Root, too, may not write to what is read-only."""
    one_thread()
    machine.obey_permissions()


def test_runs_share_a_cache_that_nobody_may_write(tmp_path: Path, cache_dir: Path) -> None:
    """Three at once over a read-only copy; each is what it is alone."""
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        processes = [
            Dspark(
                tmp_path / f"out{seed}",
                *train_arguments(cache, tmp_path / f"run{seed}", train__seed=seed),
                before=one_thread_of_nobody,
            )
            for seed in range(3)
        ]
        assert [process.wait() for process in processes] == [0, 0, 0]
        run_ok(*train_arguments(cache_dir, tmp_path / "alone", train__seed=1))
        assert (
            figures_of(tmp_path / "run1") == figures_of(tmp_path / "alone") != figures_of(tmp_path / "run2")
        )
    finally:
        for path in (cache, *(path for path in cache.rglob("*") if path.is_dir())):
            path.chmod(0o755)
