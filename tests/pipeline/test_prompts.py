"""Shards of a cache whose prompts are being answered."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pipeline.cache.manifest import ShardPlan
from pipeline.cache.prompts import held_plan
from pipeline.errors import CacheError

OF_PROMPTS = SimpleNamespace(data=SimpleNamespace(of_prompts=True))
PLANNED = ShardPlan(samples=2, tokens=8, last_rows=8)


def made(path, tokens, last):
    parts = {"last_hidden": torch.ones(last, 4), "last_hidden.scale": torch.ones(last)}
    save_file({"input_ids": torch.ones(tokens)} | (parts if last else {}), path)
    return path


def test_it_holds_what_its_header_has(tmp_path):
    path = made(tmp_path / "00000.safetensors", 5, 3)
    assert held_plan(path, OF_PROMPTS, PLANNED) == ShardPlan(samples=2, tokens=5, last_rows=3)
    path = made(tmp_path / "00001.safetensors", 5, 0)
    assert held_plan(path, OF_PROMPTS, PLANNED).last_rows == 0


def test_any_other_cache_holds_what_was_planned(tmp_path):
    other = SimpleNamespace(data=SimpleNamespace(of_prompts=False))
    assert held_plan(tmp_path / "none", other, PLANNED) == PLANNED


@pytest.mark.parametrize(("tokens", "last"), [(9, 3), (5, 6)])
def test_more_than_was_planned_is_damage(tmp_path, tokens, last):
    with pytest.raises(CacheError, match="is damaged"):
        held_plan(made(tmp_path / "00000.safetensors", tokens, last), OF_PROMPTS, PLANNED)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}"])
def test_a_damaged_header(tmp_path, data):
    (tmp_path / "00000.safetensors").write_bytes(data)
    if data.endswith(b"{}"):  # a file of nothing
        assert held_plan(tmp_path / "00000.safetensors", OF_PROMPTS, PLANNED).tokens == 0
        return
    with pytest.raises(CacheError, match="is damaged"):
        held_plan(tmp_path / "00000.safetensors", OF_PROMPTS, PLANNED)
