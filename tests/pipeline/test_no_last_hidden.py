"""Caches without last hidden states: made by hand, and converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.verify import verify_cache
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.handmade import HIDDEN, LAYERS, TOKENS, HandCache, context_value
from tests.pipeline.written import every_byte

WITHOUT = ("--last-hidden", "none")


def hand_cache() -> HandCache:
    cache = HandCache()
    cache.manifest["identity"]["features"].update(last_hidden="none", last_codec="none")
    for shard in cache.shards:
        shard.entries.remove(shard.entry("last_hidden"))
    return cache


def test_one_made_by_hand_reads_back_exactly(tmp_path) -> None:
    path = hand_cache().save(tmp_path)
    assert verify_cache(path).problems == []
    reader = CacheReader(path)
    assert not reader.has_last_hidden
    for sample, tokens in enumerate(TOKENS):
        got = reader.read(sample)
        assert got.last_hidden is None
        expected = [
            [context_value(sample, layer, p, h) for layer in LAYERS for h in range(HIDDEN)]
            for p in range(len(tokens))
        ]
        assert got.context.tolist() == expected


def shards(cache: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((cache / "shards").iterdir())]


def test_convert_leaves_them_out(cache_dir, tmp_path) -> None:
    shown = run_ok("convert", cache_dir, tmp_path / "a", *WITHOUT)
    assert "bf16 context, no last hidden" in shown
    assert "teacher" not in shown.splitlines()[-1]
    for old, new in zip(shards(cache_dir), shards(tmp_path / "a"), strict=True):
        assert old.keys() - new.keys() == {"last_hidden"}
        assert all(torch.equal(new[name], old[name]) for name in new)
    old, new = read_manifest(cache_dir), read_manifest(tmp_path / "a")
    assert (new.identity.features.last_hidden, new.identity.features.last_codec) == ("none", "none")
    assert new.history[-1]["last_codec"] == "bf16"
    assert new.fidelity["source.teacher_tv_mean"] == old.fidelity["teacher_tv_mean"]
    assert not [name for name in new.fidelity if name.startswith(("teacher_tv", "relative_error.last"))]
    # A cache without them is a source like any other, and stays without.
    run_ok("convert", tmp_path / "a", tmp_path / "b", "--context-codec", "nf4", "--layers", "0,2")
    run_ok("convert", cache_dir, tmp_path / "c", "--context-codec", "nf4", "--layers", "0,2")
    for via, direct in zip(shards(tmp_path / "b"), shards(tmp_path / "c"), strict=True):
        assert direct.keys() - via.keys() == {"last_hidden"}
        assert all(torch.equal(via[name], direct[name]) for name in via)
    history = [line for line in run_ok("inspect", tmp_path / "b").splitlines() if "converted from" in line]
    assert history[0].endswith("bf16 context, bf16 last hidden")
    assert history[1].endswith("bf16 context, no last hidden")
    assert "all good" in run_ok("verify", tmp_path / "b")


def test_convert_makes_no_states_from_nothing(cache_dir, tmp_path) -> None:
    source = hand_cache().save(tmp_path / "source")
    before = every_byte(source)
    for options in (("--last-codec", "int8"), ("--last-hidden", "post_norm")):
        result = run_cli("convert", source, tmp_path / "new", *options)
        assert_refused(result, 1, "has no last hidden states", f"leave out {options[0]}")
    result = run_cli("convert", cache_dir, tmp_path / "new", *WITHOUT, "--last-codec", "bf16")
    assert_refused(result, 2, "--last-hidden none", "give one of them")
    assert not (tmp_path / "new").exists()
    assert every_byte(source) == before


@pytest.mark.parametrize("first", [(), WITHOUT], ids=["with", "without"])
def test_a_conversion_does_not_continue_the_other(cache_dir, tmp_path, first) -> None:
    run_ok("convert", cache_dir, tmp_path / "new", *first)
    other = () if first else WITHOUT
    result = run_cli("convert", cache_dir, tmp_path / "new", *other)
    assert_refused(result, 1, "holds another capture", "features.last_hidden")
