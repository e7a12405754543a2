"""Settings: what no run can have is one line before anything is loaded, and every field is explained."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config as configuration
from pipeline.errors import ConfigError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.runs import train_arguments
from train.config import TrainConfig
from train.draft import TABLES
from train.draft.blocks import attention
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.settings import PUBLISHED, DSparkConfig, DSparkLoss
from train.draft.settings import run_config
from train.runs.changes import flat_settings
from train.runs.directory import load_run_config
from train.trainer.setup import most_candidates, set_up


@pytest.mark.parametrize(
    ("setting", "code", "parts"),
    [
        ("draft.num_layer=3", 2, ["num_layer", "did you mean num_layers?"]),
        ("drafts.num_layers=3", 2, ["drafts", "did you mean draft?"]),
        ("draft.num_layers=two", 2, ["draft.num_layers", "expected int", "'two'"]),
        ("draft.block_size=0", 2, ["block_size must be at least 1, got 0"]),
        ("draft.markov_head=fancy", 2, [f"{', '.join(MARKOV_HEADS)}, none", "'fancy'"]),
        ("draft.markov_rank=0", 2, ["markov_rank", "none"]),
        ("draft.markov_head=none", 2, ["confidence_with_markov", "confidence_head to false"]),
        ("draft.mask_token_id=999", 2, ["draft.mask_token_id", "[0, 325)", "got 999"]),
        ("draft.target_layer_ids=[0,3]", 1, ["holds layers [0, 2, 4]", "asks for 3", "--layers"]),
        ("draft.target_layer_ids=[4,0]", 2, ["strictly increasing"]),
        ("draft.sliding_window=2", 2, ["sliding_window must be at least block_size = 3", "got 2"]),
        ("draft.layer_types=[]", 2, ["layer_types must have num_layers = 1 entries, got 0"]),
        ("draft.layer_types=['full']", 2, ["sliding_attention, full_attention", "'full'"]),
        ("draft.init_from=nowhere", 1, ["init_from", "no draft at nowhere", "safetensors"]),
        ("train.held_out=0.0001", 2, ["held_out"]),
        ("train.data_share=0", 2, ["data_share must be above 0 and at most 1", "got 0"]),
        ("train.data_share=1e-9", 2, ["train.data_share = 1e-09 leaves no sample", "raise it"]),
        ("train.batch_tokens=16", 2, ["batch_tokens = 16", "longest sample", "at least"]),
        ("train.anchors_per_batch=257", 2, ["anchors_per_batch = 257", "256 tokens", "at most"]),
        ("train.micro_batches_per_step=0", 2, ["micro_batches_per_step must be at least 1"]),
        ("train.early_stopping_patience=2", 2, ["eval_every"]),
        ("train.checkpoint_minutes=-1", 2, ["checkpoint_minutes must not be negative"]),
        ("train.keep_checkpoints=0", 2, ["keep_checkpoints must be at least 1"]),
        ("train.report_to=['paper']", 2, ["tensorboard, wandb, trackio", "'paper'"]),
        ("train.optimizer=sgd", 2, ["adamw, muon"]),
        ("train.parallelism=tp", 2, ["ddp, fsdp"]),
        ("draft.attention=flex", 2, ["needs CUDA", "auto"]),
        ("loss.kernel=triton", 2, ["loss.kernel", "NVIDIA GPU, got device cpu", "auto"]),
        ("loss.kernel=cuda", 2, ["auto, triton, torch"]),
        ("train.compile=yes", 2, ["auto, on, off"]),
        ("nonsense", 2, ["table.key=value"]),
    ],
)
def test_a_bad_setting_is_one_line(
    tmp_path: Path, cache_dir: Path, monkeypatch, setting, code, parts
) -> None:
    from train.draft.dspark.model import Qwen3DSparkModel

    def refuse(*_args, **_kwargs):
        raise AssertionError("a draft was built")

    monkeypatch.setattr(Qwen3DSparkModel, "__init__", refuse)
    result = run_cli(*train_arguments(cache_dir, tmp_path / "r"), "--set", setting)
    assert_refused(result, code, *parts)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("window", "types", "message"),
    [
        (None, ("sliding_attention",), "sliding_window is not set"),
        (9, ("full_attention",), "no sliding_attention: remove one"),
    ],
)
def test_a_window_without_a_layer_or_a_layer_without_a_window(window, types, message) -> None:
    with pytest.raises(ConfigError, match=message):
        DSparkConfig(num_layers=1, sliding_window=window, layer_types=types)


def test_a_set_up_tries_no_kernels(cache_dir: Path, monkeypatch) -> None:
    """The draft's own trial follows, in its precision; a second warning would name another cost."""
    tried: list[str] = []
    monkeypatch.setattr(attention, "flex_block_mask", lambda *_: tried.append("flex"))
    train = TrainConfig(batch_tokens=256, anchors_per_batch=64, held_out=0.2)
    config = run_config({"draft": {"num_layers": 1, "block_size": 3}, "train": train})
    set_up(cache_dir, config, torch.device("cuda"))  # a warning would be an error
    assert not tried


def test_muon_where_torch_lacks_it(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    monkeypatch.delattr("torch.optim.Muon")
    result = run_cli(*train_arguments(cache_dir, tmp_path / "r", train__optimizer="muon"))
    assert_refused(result, 2, "torch 2.9", "adamw")


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 8)), min_size=1, max_size=6), st.integers(9, 20))
def test_no_batch_has_more_candidates_than_the_bound(pairs: list[tuple[int, int]], room: int) -> None:
    lengths = np.array([length for length, _ in pairs])
    candidates = np.array([min(count, length - 1) for length, count in pairs])
    best = max(
        candidates[list(chosen)].sum()
        for size in range(len(pairs) + 1)
        for chosen in itertools.combinations(range(len(pairs)), size)
        if lengths[list(chosen)].sum() <= room
    )
    bound = most_candidates(lengths, candidates, room)
    assert best <= bound
    if lengths.sum() <= room:
        assert bound == candidates.sum()


def test_the_config_is_printed_and_saved_resolved(tmp_path: Path, cache_dir: Path) -> None:
    shown = run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=1))
    saved = load_run_config(tmp_path / "r")
    text = (tmp_path / "r" / "config.toml").read_text()
    assert shown.startswith(text)
    assert saved.draft.target_layer_ids == (0, 2, 4)
    assert saved.draft.mask_token_id == 320
    assert (saved.draft.num_attention_heads, saved.draft.num_key_value_heads) == (4, 2)
    assert (saved.draft.head_dim, saved.draft.intermediate_size) == (8, 48)
    assert saved.train.lr == 3e-3
    # What was printed starts the same run again.
    (tmp_path / "again.toml").write_text(text)
    again = run_cli(
        *("train", "--cache", cache_dir, "--run", tmp_path / "r"),
        *("--config", tmp_path / "again.toml", "--device", "cpu"),
    )
    assert "complete" in again.stdout


@pytest.mark.parametrize("name", ["example", "dflash2-example", "qwen3-4b", "dflash-qwen3-4b"])
def test_shipped_configs_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{name}.toml"
    run_config(configuration.load_toml(path), str(path))


def test_a_run_remembers_settings_that_are_none() -> None:
    wanted = run_config({"loss": DSparkLoss(decay_gamma=None)})
    assert run_config(tomllib.loads(configuration.to_toml(wanted))) == wanted


def test_every_setting_is_explained() -> None:
    shown = run_ok("train", "--explain")
    lines = [line for line in shown.splitlines() if line[0] != " "]
    tables = [
        (n, table) for kind in TABLES.values() for n, table in (("draft", kind.draft), ("loss", kind.loss))
    ]
    tables.append(("train", TrainConfig))
    names = [f"{name}.{field.name}" for name, table in tables for field in dataclasses.fields(table)]
    assert [line.split()[0] for line in lines[1:]] == names
    explained = iter(lines[1:])
    for _, table in tables:
        docs = configuration.field_docs(table)
        assert list(docs) == [field.name for field in dataclasses.fields(table)]
        for text in docs.values():
            assert text.split()[0] in next(explained)
    lines = {line.split()[0]: line for line in reversed(lines)}  # of the first kind
    assert lines["draft.block_size"].split()[:3] == ["draft.block_size", "7", "7"]
    assert lines["train.lr"].split()[:3] == ["train.lr", "0.0006", "6e-4"]
    assert f"{', '.join(MARKOV_HEADS)}, none" in " ".join(shown.split())
    assert "Any of tensorboard, wandb, trackio." in " ".join(shown.split())


def test_the_defaults_are_the_papers() -> None:
    values = flat_settings(run_config({}))
    assert set(PUBLISHED) <= set(values)
    for name, text in PUBLISHED.items():
        first = text.split()[0]
        if name == "train.micro_batches_per_step":  # of 4,096 tokens, a sequence being of about 1,000
            assert values[name] * 4 == int(first)
        elif isinstance(values[name], str):
            assert values[name] == first
        else:
            assert values[name] == float(first), name
