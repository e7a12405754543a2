"""Skipped samples (rule 19.2): lists that lie are refused, and every tool knows the true ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader, held_out, read_manifest
from pipeline.cache.manifest import shard_file
from pipeline.cache.skipped import counted, skipped_samples, uncounted
from pipeline.cache.tools.sample import find_sample
from pipeline.errors import UsageError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.handmade import HandCache, name_of, seal
from tests.pipeline.hostile import assert_refuses
from tests.pipeline.written import Writing, make_identity, make_sample
from tests.train.runs import train_arguments

# Sample 1 of the hand's cache: 4 tokens and 2 label rows, from row 2 of the first source.
LIST = {
    "sample": [1],
    "source": [0],
    "source_row": [2],
    "tokens": [4],
    "last_rows": [2],
    "reason": ["states not finite"],
}


def hand(skipped: Any, *, blank: bool = True, **others: Any) -> HandCache:
    """The hand's cache with a list; the states of sample 1 are zero bytes if `blank`."""
    cache = HandCache()
    for name, _, shape, data in cache.shards[0].entries:
        first, rows = (3, 2) if name == "last_hidden" else (5, 4)
        if blank and name not in ("input_ids", "loss_mask"):
            size = len(data) // shape[0]
            zeroed = data[: first * size] + bytes(rows * size) + data[(first + rows) * size :]
            cache.shards[0].entry(name)[3] = zeroed
    cache.edit_manifest = lambda manifest: {**manifest, "skipped": skipped, **others}
    return cache


def test_a_true_list_is_obeyed(tmp_path):
    reader = CacheReader(hand(LIST).save(tmp_path))
    assert len(reader) == 2
    assert [reader.sample_id(i) for i in range(2)] == [name_of(0).hex(), name_of(2).hex()]
    assert reader.read(1).input_ids.tolist() == [3, 5]
    assert reader.source_rows.tolist() == [0, 0]
    assert (reader.manifest.num_samples, reader.manifest.num_tokens) == (2, 7)
    assert reader.manifest.num_last_rows == 4
    for mode in ((), ("--fast",)):
        assert run_ok("verify", tmp_path, *mode).endswith("good\n")


def changed(**columns: list) -> dict[str, list]:
    return {**LIST, **columns}


BOTH = {name: value * 2 for name, value in LIST.items()}
LIES = {
    "outside": changed(sample=[3]),
    "negative": changed(sample=[-1]),
    "far outside": changed(sample=[2**70]),
    "another source": changed(source=[1]),
    "no such source": changed(source=[7]),
    "another row": changed(source_row=[3]),
    "a huge row": changed(source_row=[2**80]),
    "other tokens": changed(tokens=[3]),
    "other labels": changed(last_rows=[1]),
    "negative tokens": changed(tokens=[-4]),
    "unknown reason": changed(reason=["bad luck"]),
    "long reason": changed(reason=["states not finite" * 10**5]),
    "unprintable reason": changed(reason=["states not finite\x1b[2J"]),
    "twice": BOTH,
    "unsorted": {**BOTH, "sample": [1, 0]},
    "unequal columns": changed(reason=LIST["reason"] * 2),
    "missing column": {name: value for name, value in LIST.items() if name != "tokens"},
    "unknown column": changed(surprise=[1]),
    "numbers as text": changed(sample=["1"]),
    "a float": changed(sample=[1.0]),
    "true": changed(sample=[True]),
    "a list": [1],
    "every sample": {
        "sample": [0, 1, 2],
        "source": [0, 0, 1],
        "source_row": [0, 2, 0],
        "tokens": [5, 4, 2],
        "last_rows": [3, 2, 1],
        "reason": LIST["reason"] * 3,
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_a_list_that_lies_is_refused_by_everyone(tmp_path, lie):
    cache = hand(LIES[lie]).save(tmp_path / "cache")
    assert "is damaged" in assert_refuses(cache)
    for mode in ((), ("--fast",)):
        result = run_cli("verify", cache, *mode)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        assert "manifest.json" in result.output
    assert_refused(run_cli("inspect", cache), 1, "manifest.json", "is damaged")
    assert_refused(run_cli("convert", cache, tmp_path / "new"), 1, "manifest.json", "is damaged")


def test_an_incomplete_cache_has_no_list(tmp_path):
    cache = hand(LIST, status="incomplete").save(tmp_path)
    assert_refused(run_cli("inspect", cache), 1, "is damaged", "incomplete")


def test_states_of_a_skipped_sample_that_are_not_zeros_are_found(tmp_path):
    cache = hand(LIST, blank=False).save(tmp_path / "cache")
    result = run_cli("verify", cache)
    assert result.exit_code == 1
    assert "sample 1 is skipped, and its context." in result.output
    assert run_ok("verify", cache, "--fast").endswith("structure good\n")
    result = run_cli("convert", cache, tmp_path / "new", "--context-codec", "fp8")
    assert_refused(result, 1, "sample 1 is skipped")


def test_a_version_that_does_not_know_the_key_refuses_it_and_only_it(tmp_path):
    """As with any key that it does not know."""
    cache = hand(LIST)
    cache.edit_json = lambda text: text.replace(b'"skipped"', b'"skipper"')
    assert "unknown key 'skipper'" in assert_refuses(cache.save(tmp_path / "new"))
    assert b"skipped" not in read_manifest(HandCache().save(tmp_path / "old")).to_json()


def test_counts_are_restored():
    samples = [make_sample([1, 1, 1], (0,), 4, seed=i) for i in range(5)]
    table = Writing(samples, make_identity((0,))).index
    skipped = skipped_samples({3: "states all zero", 1: "states not finite"}, table)
    assert (skipped.sample, skipped.reason) == ((1, 3), ("states not finite", "states all zero"))
    rows = {"read": 7, "captured": 5, "dropped: a duplicate": 2}
    found = counted(rows, skipped)
    assert found["captured"] == 3
    assert found["read"] == sum(n for name, n in found.items() if name != "read")
    assert uncounted(found, skipped) == rows


# Tools, on a cache of the project's own writer


def blanked(path: Path, count: int = 60, bad: tuple[int, ...] = (4, 13, 40)) -> Path:
    """A cache that skips some samples."""
    samples = [make_sample([0] + [1] * (4 + i % 5), (0, 2), 4, seed=i) for i in range(count)]
    made = make_identity((0, 2), hidden=4, shard_tokens=40)
    writing = Writing(samples, made)
    content = hashlib.sha256(b"".join(sample.name for sample in samples)).hexdigest()
    made = make_identity((0, 2), hidden=4, shard_tokens=40)
    object.__setattr__(made.data, "sha256", content)
    writing = Writing(samples, made)
    for i in bad:
        for states in (*samples[i].context.values(), samples[i].last):
            states.zero_()
    writer = writing.open(path)
    writer.write_target({"config.json": b"{}"}, writing.frozen())
    for shard in writer.pending():
        buffer = writer.new_shard(shard)
        for name, tensor in writing.tensors(shard).items():
            buffer.tensors[name].copy_(tensor)
        members = list(writing.shards[shard])
        local = [i - members[0] for i in bad if i in members]
        writer.write_shard(shard, buffer, {}, skipped={"states all zero": local} if local else {})
    assert writer.finalise() is not None
    return path


@pytest.fixture(scope="module")
def skipping(tmp_path_factory) -> Path:
    return blanked(tmp_path_factory.mktemp("skipping") / "cache")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return blanked(tmp_path_factory.mktemp("sound") / "cache", bad=())


def test_inspect_shows_them(skipping):
    said = run_ok("inspect", skipping)
    assert "skipped   3 samples, which no reader returns: 3 states all zero" in said
    assert "#4 (row 5 of chats.jsonl), #13 (row 14 of chats.jsonl), #40 (row 41 of chats.jsonl)" in said
    facts = json.loads(run_ok("inspect", skipping, "--json"))
    assert facts["skipped"]["reasons"] == {"states all zero": 3}
    assert [s["source_row"] for s in facts["skipped"]["samples"]] == [4, 13, 40]
    reader = CacheReader(skipping)
    assert facts["samples"] == facts["sources"][0]["samples"] == len(reader) == 57
    assert facts["tokens"] == int(reader.lengths.sum())
    held = held_out(reader.sample_ids, facts["held_out"]["fraction"])
    assert facts["held_out"]["samples"] == int(held.sum())
    assert facts["held_out"]["tokens"] == int(reader.lengths[held].sum())
    assert facts["labels"] == sum(reader.num_last_rows(i) for i in range(len(reader)))


def test_a_skipped_sample_that_is_asked_for_says_why(skipping, sound):
    reader, whole = CacheReader(skipping), CacheReader(sound)
    for text in ("#13", whole.sample_id(13), whole.sample_id(13)[:9]):
        with pytest.raises(UsageError, match=r"sample #13 \(row 14 of chats.jsonl\) .* states all zero"):
            find_sample(reader, text)
    for number in (0, 3, 5, 12, 14, 59):  # a sample keeps its number, whatever is skipped before it
        found = find_sample(reader, f"#{number}")
        assert reader.sample_id(found) == whole.sample_id(number)
        assert find_sample(reader, whole.sample_id(number)) == found
    with pytest.raises(UsageError, match="#0 to #59"):
        find_sample(reader, "#60")


def raw(cache: Path) -> dict[str, torch.Tensor]:
    """Each tensor of all shards, one after the other."""
    shards = [load_file(cache / shard_file(i)) for i in range(len(read_manifest(cache).plan))]
    return {
        name: torch.cat(
            [
                s[name].view(torch.uint8).flatten(1)
                if s[name].dim() > 1
                else s[name].view(torch.uint8).view(len(s[name]), -1)
                for s in shards
            ]
        )
        for name in shards[0]
    }


@pytest.mark.parametrize("codec", ["fp8", "fp32", "bf16"])
def test_convert_carries_the_list_and_the_zeros(tmp_path, skipping, sound, codec):
    words = ("--context-codec", codec, "--last-codec", codec, "--layers", "2")
    for name, cache in (("skipping", skipping), ("sound", sound)):
        run_ok("convert", cache, tmp_path / name, *words)
    ours, theirs = read_manifest(tmp_path / "skipping"), read_manifest(skipping)
    assert ours.skipped == theirs.skipped
    assert ours.rows == theirs.rows
    assert "all good" in run_ok("verify", tmp_path / "skipping")
    got, want = raw(tmp_path / "skipping"), raw(tmp_path / "sound")
    lengths = [5 + i % 5 for i in range(60)]
    for name in got:
        rows = [n - 1 if name.startswith("last") else n for n in lengths]
        ends = np.cumsum(rows)
        for i, (end, n) in enumerate(zip(ends.tolist(), rows, strict=True)):
            part = slice(end - n, end)
            if i in (4, 13, 40) and name not in ("input_ids", "loss_mask"):
                assert not got[name][part].any(), (name, i)
            else:
                assert torch.equal(got[name][part], want[name][part]), (name, i)


def test_convert_measures_statistics_without_them(tmp_path, skipping):
    run_ok("convert", skipping, tmp_path / "new", "--context-codec", "nf4", "--last-codec", "int8")
    assert "all good" in run_ok("verify", tmp_path / "new")
    reader, whole = CacheReader(skipping), np.unique(np.linspace(0, 59, 48).round().astype(int))
    chosen = [int(np.flatnonzero(reader.numbers == i)[0]) for i in whole if i not in (4, 13, 40)]
    assert len(chosen) < len(whole)
    rows = torch.cat([reader.layer_view(i, 0)[1:] for i in chosen]).double()
    found = load_file(tmp_path / "new/statistics.safetensors")["context.0.mean"].double()
    torch.testing.assert_close(found, rows.mean(0), rtol=1e-5, atol=1e-6)
    got = raw(tmp_path / "new")
    ends = np.cumsum([5 + i % 5 for i in range(60)])
    for name in ("context.0", "context.0.scale"):
        assert not got[name][ends[12] : ends[13]].any()


def list_skipped(cache: Path, sound: CacheReader, bad: list[int]) -> None:
    """Put samples of a whole cache on the list of its manifest."""
    values = json.loads((cache / "manifest.json").read_text())
    values["skipped"] = {
        "sample": bad,
        "source": sound.sources[bad].tolist(),
        "source_row": sound.source_rows[bad].tolist(),
        "tokens": sound.lengths[bad].tolist(),
        "last_rows": [sound.num_last_rows(i) for i in bad],
        "reason": ["states not finite"] * len(bad),
    }
    values["checksum"] = "0" * 64
    (cache / "manifest.json").write_bytes(seal(json.dumps(values).encode()))


@pytest.mark.parametrize("before", [[2, 5], []])
def test_a_run_continues_only_with_the_list_that_it_began_with(tmp_path, cache_dir, before):
    """Captures of one identity may skip other samples, and then samples have other numbers."""
    sound, caches = CacheReader(cache_dir), [tmp_path / "before", tmp_path / "after"]
    for cache, bad in zip(caches, (before, [2, 7]), strict=True):
        shutil.copytree(cache_dir, cache)
        if bad:
            list_skipped(cache, sound, bad)
    run_ok(*train_arguments(caches[0], tmp_path / "run", train__max_steps=2))
    longer = {"train__max_steps": 4}
    result = run_cli(*train_arguments(caches[1], tmp_path / "run", **longer))
    assert_refused(result, 1, f"cache skipped samples: {len(before)} against 2, not the same ones", "--fresh")
    run_ok(*train_arguments(caches[0], tmp_path / "run", **longer))
    run_ok(*train_arguments(caches[1], tmp_path / "run", **longer), "--fresh")


def test_training_never_sees_one(tmp_path, cache_dir, monkeypatch):
    """The captured cache, with two of its samples on a list: one of either side of the split."""
    sound = CacheReader(cache_dir)
    held = held_out(sound.sample_ids, 0.2)
    bad = sorted([int(np.flatnonzero(held)[0]), int(np.flatnonzero(~held)[0])])
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    list_skipped(cache, sound, bad)
    seen: set[str] = set()
    real = CacheReader.tokens

    def tokens(self: CacheReader, i: int):
        seen.add(self.sample_id(i))
        return real(self, i)

    monkeypatch.setattr(CacheReader, "tokens", tokens)
    run_ok(*train_arguments(cache, tmp_path / "run", train__max_steps=20))
    run_ok("evaluate", "--run", tmp_path / "run", "--cache", cache, "--device", "cpu")
    ids = {sound.sample_id(i) for i in range(len(sound)) if i not in bad}
    assert seen == ids, "every other sample is seen, and no skipped one"
    result = json.loads(next((tmp_path / "run").rglob("evaluation.json")).read_text())
    assert result["cache"]["samples"] == len(sound) - 2
    assert result["cache"]["tokens"] == int(sound.lengths.sum() - sound.lengths[bad].sum())
