"""Everything that differs between kinds of drafts is asked of the kind: nobody goes past it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import train.draft
from pipeline.errors import ConfigError
from tests.conftest import FP32, run_cli, run_ok
from tests.train.runs import train_arguments
from train.draft import DRAFTS
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.settings import DSparkConfig
from train.draft.settings import run_config


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what is asked of the kind."""
    calls: Counter[str] = Counter()
    kind = DRAFTS["dspark"]

    def counted(name: str):
        real = getattr(kind, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    names = [field.name for field in dataclasses.fields(kind) if callable(getattr(kind, field.name))]
    names.remove("config_class")
    watched = dataclasses.replace(kind, **{name: counted(name) for name in names})
    monkeypatch.setitem(train.draft.DRAFTS, "dspark", watched)
    return calls


def test_every_part_of_a_kind_is_used(
    tmp_path: Path, cache_dir: Path, target_dir: Path, asked: Counter[str]
) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=2, draft__attention="sdpa"))
    trained = {
        "config",
        "build",
        "initialise",
        "module",
        "attention",
        "anchors",
        "collate",
        "flops",
        "lr_scales",
        "needs_last_hidden",
    }
    assert {name for name, count in asked.items() if count} == trained
    asked.clear()
    run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu")
    assert set(asked) == {"build", "module", "collate"}
    assert asked["build"] == 3  # to check the weights, the draft, and an untrained one beside it
    asked.clear()
    options = ("--target", target_dir, "--cache", cache_dir, "--num-prompts", "1", "--max-new-tokens", "4")
    run_ok("speculate", *options, "--run", run, *FP32)
    assert asked["decoder"] == 1
    asked.clear()
    again = train_arguments(cache_dir, tmp_path / "again", train__max_steps=1, draft__init_from=run)
    run_ok(*again)
    assert asked["weight_fields"] == 2
    run_ok("export", run, tmp_path / "export", "--to", "hf")
    assert asked["describe"] == asked["exported"] == 1
    asked.clear()
    held_out = ("--set", "train.held_out=0.2")
    run_ok("import", tmp_path / "export", "--cache", cache_dir, "--run", tmp_path / "imported", *held_out)
    assert asked["check_released"] == asked["released_settings"] == 1


def test_the_kind_of_a_run_is_a_setting() -> None:
    for name, kind in DRAFTS.items():
        assert name == kind.name == kind.tables.draft().kind
        assert get_args(get_type_hints(kind.tables.draft)["kind"]) == (name,)
        assert type(run_config({"draft": {"kind": name}}).loss) is kind.tables.loss
    assert run_config({}).draft.kind == "dspark"


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path, cache_dir: Path) -> None:
    result = run_cli(*train_arguments(cache_dir, tmp_path / "r", draft__kind="medusa"))
    assert result.exit_code == 2
    assert "expected one of dspark" in result.stderr


def test_heads_are_settings() -> None:
    assert set(get_args(get_type_hints(DSparkConfig)["markov_head"])) == {*MARKOV_HEADS, "none"}


@pytest.mark.parametrize(
    ("kind", "table", "key", "owners"),
    [
        ("dflash", "draft", "markov_rank", "dspark"),
        ("dflash", "draft", "selector_rank", "dflash2"),
        ("eagle3", "draft", "block_size", "dspark, dflash, dflash2"),
        ("dflash", "loss", "confidence_alpha", "dspark"),
        ("dspark", "loss", "step_decay", "eagle3"),
    ],
)
def test_a_setting_of_another_kind_is_refused_as_such(kind: str, table: str, key: str, owners: str) -> None:
    """And not by the nearest name of the run's own kind."""
    tables = {"draft": {"kind": kind}}
    tables[table] = tables.get(table, {}) | {key: 1}
    message = rf"config\.{table}: unknown key '{key}'; draft.kind is {kind}, and it is a setting of {owners}$"
    with pytest.raises(ConfigError, match=message):
        run_config(tables)
    with pytest.raises(ConfigError, match=f"unknown key '{key}x'; (did you mean|known keys)"):
        run_config({table: {f"{key}x": 1}})
