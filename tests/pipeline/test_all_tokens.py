"""Caches with the last hidden state of every token: made by hand, written, read both ways, converted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheError, ConfigError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.handmade import (
    CANDIDATES,
    HIDDEN,
    LABEL_ROWS,
    MASKS,
    SHARDS,
    TOKENS,
    HandCache,
    bf16,
    last_value,
)
from tests.pipeline.stored import Stored, stored_cache
from tests.pipeline.test_round_trip import masks
from tests.pipeline.test_skipped import LIST
from tests.pipeline.written import Writing, every_byte, make_writing, read_all

LAST_CODECS = ["bf16", "fp8", "int8"]  # plain, with scales, and with statistics


def every_row(sample: int) -> list[list[float]]:
    return [[last_value(sample, p, h) for h in range(HIDDEN)] for p in range(len(TOKENS[sample]))]


def hand_cache() -> HandCache:
    """Rule 7.2: rows for all tokens, and index and plan as in any other cache."""
    cache = HandCache()
    cache.manifest["identity"]["features"]["hidden"] = "all-tokens"
    for shard, samples in zip(cache.shards, SHARDS, strict=True):
        rows = [row for sample in samples for row in every_row(sample)]
        shard.entry("last_hidden")[2:] = [[len(rows), HIDDEN], bf16(rows)]
    return cache


def all_tokens_of(writing: Writing) -> Writing:
    """The same capture with the last hidden states of all tokens."""
    features = dataclasses.replace(writing.identity.features, hidden="all-tokens")
    writing.identity = dataclasses.replace(writing.identity, features=features)
    return writing


def test_one_made_by_hand_reads_back_exactly(tmp_path) -> None:
    path = hand_cache().save(tmp_path)
    assert verify_cache(path).problems == []
    labels, every = CacheReader(path), CacheReader(path, hidden="all-tokens")
    assert labels.has_last_hidden
    for sample, rows in enumerate(LABEL_ROWS):
        got = labels.read(sample)
        assert got.last_positions.tolist() == list(rows)
        assert got.last_hidden.tolist() == [every_row(sample)[p] for p in rows]
        assert labels.num_last_rows(sample) == len(rows)
        assert labels.candidates[sample] == CANDIDATES[sample]
        got = every.read(sample)
        assert got.last_positions.tolist() == list(range(len(TOKENS[sample])))
        assert got.last_hidden.tolist() == every_row(sample)
        assert every.num_last_rows(sample) == len(TOKENS[sample])
        assert got.loss_mask.tolist() == list(MASKS[sample])


def refused(**features: Any) -> Callable[[HandCache], None]:
    def change(cache: HandCache) -> None:
        cache.manifest["identity"]["features"].update(features)

    return change


@pytest.mark.parametrize(
    "change",
    [
        refused(hidden="all_tokens"),
        refused(hidden=None),
        refused(hidden="labels"),
        refused(last_hidden="none", last_codec="none"),
        lambda cache: cache.columns.update(last_start=[0, 5, 0], last_rows=[5, 4, 2]),
        lambda cache: cache.manifest["plan"].update(last_rows=[9, 2]),
    ],
    ids=["spelling", "null", "label rows", "no states", "index of tokens", "plan of tokens"],
)
def test_another_story_in_the_manifest_is_refused(tmp_path, change) -> None:
    cache = hand_cache()
    change(cache)
    path = cache.save(tmp_path)
    with pytest.raises(CacheError, match="damaged"):
        CacheReader(path).read(0)
    assert run_cli("verify", path).exit_code == 1


@settings(max_examples=5)
@given(masks)
def test_reads_of_every_kind_give_label_rows_or_all(tmp_path_factory, mask) -> None:
    writing = all_tokens_of(make_writing([mask, [0, 1, 1], mask]))
    path = writing.write(tmp_path_factory.mktemp("writer") / "cache")
    labels, every = CacheReader(path), CacheReader(path, hidden="all-tokens")
    for i, sample in enumerate(writing.samples):
        for reader, rows in ((labels, sample.rows), (every, list(range(len(sample.ids))))):
            wanted = sample.last[rows]
            assert torch.equal(reader.read(i).last_hidden, wanted)
            assert torch.equal(reader.parts(i, "last_hidden")[""], wanted)
            assert reader.last_positions(torch.tensor(sample.mask)).tolist() == rows
            out = torch.zeros(len(rows), 4, dtype=torch.bfloat16)
            reader.fetch(i, "last_hidden", {"": out})
            assert torch.equal(out, wanted)
            for start in range(len(rows)):
                some = torch.zeros(len(rows[start:]), 4, dtype=torch.bfloat16)
                reader.read_rows(i, "last_hidden", slice(start, None), some)
                assert torch.equal(some, wanted[start:])


@pytest.mark.parametrize("last", LAST_CODECS)
def test_conversion_to_label_rows_gives_the_bytes_of_their_capture(tmp_path, last) -> None:
    """Whatever the codec: the statistics are the capture's."""
    labels = stored_cache(tmp_path / "labels", "bf16", last)
    every = all_tokens_of(Stored("bf16", last)).write(tmp_path / "every")
    run_ok("convert", every, tmp_path / "kept")
    kept, source = read_manifest(tmp_path / "kept"), read_manifest(every)
    assert kept.identity == source.identity
    assert kept.shards == source.shards
    shown = run_ok("convert", every, tmp_path / "new", "--hidden", "labels")
    assert f"bf16 context, {last} last hidden\n" in shown
    new, old = read_manifest(tmp_path / "new"), read_manifest(labels)
    assert new.identity == old.identity
    assert new.shards == old.shards
    ours, theirs = every_byte(tmp_path / "new"), every_byte(labels)
    assert {n: d for n, d in ours.items() if n != "manifest.json"} == {
        n: d for n, d in theirs.items() if n != "manifest.json"
    }
    assert new.history[-1]["hidden"] == "all-tokens"
    assert set(new.fidelity) == set(kept.fidelity)
    assert read_all(tmp_path / "new") == read_all(every) == read_all(labels)


def test_conversion_encodes_the_rows_that_it_keeps(tmp_path) -> None:
    """Codec and rows changed at once give what one after the other gives."""
    every = all_tokens_of(Stored("bf16", "bf16")).write(tmp_path / "every")
    codec = ("--last-codec", "fp8")
    run_ok("convert", every, tmp_path / "fp8", *codec)
    run_ok("convert", tmp_path / "fp8", tmp_path / "later", "--hidden", "labels")
    run_ok("convert", every, tmp_path / "once", *codec, "--hidden", "labels")
    assert read_manifest(tmp_path / "once").shards == read_manifest(tmp_path / "later").shards
    read = read_all(tmp_path / "once")
    assert read == read_all(tmp_path / "fp8")
    assert read != read_all(every), "fp8 rounds"


@pytest.mark.parametrize("kept", [(), ("--hidden", "labels")], ids=["all", "labels"])
def test_conversion_measures_every_row_of_its_source(tmp_path, kept) -> None:
    """As a capture does, whose statistics do not depend on the option: all rows but those of position 0."""
    writing = all_tokens_of(Stored("bf16", "bf16"))
    run_ok("convert", writing.write(tmp_path / "every"), tmp_path / "new", "--last-codec", "int8", *kept)
    found = load_file(tmp_path / "new/statistics.safetensors")["last_hidden.mean"]
    rows = torch.cat([sample.last[1:] for sample in writing.samples]).double()
    torch.testing.assert_close(found, rows.mean(dim=0).float())


def test_conversion_makes_no_rows_from_nothing(tmp_path) -> None:
    labels, every = stored_cache(tmp_path / "labels", "bf16", "bf16"), tmp_path / "every"
    all_tokens_of(Stored("bf16", "bf16")).write(every)
    result = run_cli("convert", labels, tmp_path / "new", "--hidden", "all-tokens")
    assert_refused(result, 1, "label rows", "only a capture", "leave out --hidden all-tokens")
    result = run_cli("convert", every, tmp_path / "new", "--hidden", "all-tokens", "--last-hidden", "none")
    assert_refused(result, 2, "--last-hidden none", "--hidden all-tokens", "give one of them")
    assert not (tmp_path / "new").exists()
    run_ok("convert", every, tmp_path / "none", "--last-hidden", "none")
    assert "hidden" not in json.loads((tmp_path / "none/manifest.json").read_text())["identity"]["features"]
    for hidden in ("labels", "all-tokens"):
        result = run_cli("convert", tmp_path / "none", tmp_path / "new", "--hidden", hidden)
        assert_refused(result, 1, "has no last hidden states", "leave out --hidden")


def test_a_conversion_does_not_continue_the_other(tmp_path) -> None:
    every = all_tokens_of(Stored("bf16", "bf16")).write(tmp_path / "every")
    run_ok("convert", every, tmp_path / "new")
    result = run_cli("convert", every, tmp_path / "new", "--hidden", "labels")
    assert_refused(result, 1, "another capture", "features.hidden: all-tokens against labels")


def test_readers_that_ask_for_all_tokens_are_refused_others(tmp_path) -> None:
    labels = HandCache().save(tmp_path / "labels")
    with pytest.raises(
        CacheError, match="has those of label rows: capture it again with --hidden all-tokens"
    ):
        CacheReader(labels, hidden="all-tokens")
    every = hand_cache().save(tmp_path / "every")
    run_ok("convert", every, tmp_path / "none", "--last-hidden", "none")
    with pytest.raises(CacheError, match="the cache has none"):
        CacheReader(tmp_path / "none", hidden="all-tokens")
    with pytest.raises(CacheError, match="of tokens are asked for"):
        CacheReader(every, hidden="tokens")
    features = read_manifest(every).identity.features
    with pytest.raises(ConfigError, match="hidden 'all-tokens' contradicts last_hidden 'none'"):
        dataclasses.replace(features, last_hidden="none", last_codec="none")


def test_a_mask_that_lies_spoils_no_read(tmp_path) -> None:
    """Its rows are counted before they are read."""
    cache = hand_cache()
    cache.shards[0].entry("loss_mask")[3] = bytes([0, 0, 0, 0, 1, *MASKS[1]])
    reader = CacheReader(cache.save(tmp_path))
    for read in (reader.read, reader.tokens, lambda i: reader.parts(i, "last_hidden")):
        with pytest.raises(CacheError, match="sample 0 has a loss mask that contradicts the index"):
            read(0)


def test_every_command_says_so(tmp_path) -> None:
    every = all_tokens_of(Stored("nf4", "int8")).write(tmp_path / "every")
    shown = run_ok("inspect", every)
    assert "int8 last hidden of every token (8.229 bits per value)" in shown
    labels = sum(len(sample.rows) for sample in Stored("nf4", "int8").samples)
    assert f"{labels} of them supervised" in shown
    sample = run_ok("inspect", every, "--sample", "#2", "--json")
    assert '"rows": 5' in sample.partition('"last hidden"')[2].partition("}")[0]
    assert '"supervised": 3' in sample
    assert run_ok("verify", every).strip().endswith("all good; last hidden states of every token")
    again = run_ok("convert", every, tmp_path / "new", "--last-codec", "bf16")
    assert "nf4 context, bf16 last hidden of every token" in again
    history = [line for line in run_ok("inspect", tmp_path / "new").splitlines() if "converted from" in line]
    assert history[0].endswith("nf4 context, int8 last hidden of every token")


def blank(cache: HandCache) -> HandCache:
    """Zero bytes over the states of sample 1, rows 5 to 8 of every tensor, and the list of it."""
    for name, _, shape, data in cache.shards[0].entries:
        if name not in ("input_ids", "loss_mask"):
            size = len(data) // shape[0]
            cache.shards[0].entry(name)[3] = data[: 5 * size] + bytes(4 * size)
    cache.edit_manifest = lambda manifest: {**manifest, "skipped": LIST}
    return cache


def test_all_rows_of_a_skipped_sample_are_blank(tmp_path) -> None:
    path = blank(hand_cache()).save(tmp_path / "cache")
    assert "all good" in run_ok("verify", path)
    assert len(CacheReader(path, hidden="all-tokens")) == 2
    lying = blank(hand_cache())
    entry = lying.shards[0].entry("last_hidden")
    entry[3] = entry[3][:-1] + b"\1"  # of the last token, which is no label row
    result = run_cli("verify", lying.save(tmp_path / "lying"))
    assert "sample 1 is skipped, and its last_hidden is not zero bytes" in result.output


@pytest.mark.parametrize("codec", [(), ("--last-codec", "int8")], ids=["copied", "encoded"])
def test_conversion_keeps_skipped_samples_blank(tmp_path, codec) -> None:
    path = blank(hand_cache()).save(tmp_path / "cache")
    run_ok("convert", path, tmp_path / "new", "--hidden", "labels", *codec)
    assert "all good" in run_ok("verify", tmp_path / "new")
    shard = load_file(tmp_path / "new/shards/00000.safetensors")
    assert len(shard["last_hidden"]) == 5
    assert shard["last_hidden"][:3].any()
    for name, rows in shard.items():
        if name.startswith("last_hidden"):
            assert not rows[3:].view(torch.uint8).any(), name
    assert len(CacheReader(tmp_path / "new").read(0).last_hidden) == 3
