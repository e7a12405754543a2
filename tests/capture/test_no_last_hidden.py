"""A cache without last hidden states: what is on disk, in the manifest and in every command's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader, read_manifest
from pipeline.errors import CacheError
from tests.capture.conftest import arguments, tree
from tests.capture.test_bad_states import NAN, spoil, write_rows
from tests.capture.test_fill import after_each_forward
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, one_thread

WITHOUT = ("--last-hidden", "none")


def command(target: Path, data: Path, cache: Path, **options: str) -> list[str | Path]:
    """`dspark capture` with the default codec of last hidden states, which no option names."""
    found = arguments(target, data, cache, **options)
    place = found.index("--last-codec")
    return [*found[:place], *found[place + 2 :]]


@pytest.fixture(scope="module")
def both(tmp_path_factory, fp32_target, few) -> tuple[Path, Path]:
    """The same capture with last hidden states and without."""
    folder = tmp_path_factory.mktemp("both")
    run_ok(*command(fp32_target, few, folder / "with", context_codec="int8"))
    run_ok(*command(fp32_target, few, folder / "without", context_codec="int8"), *WITHOUT)
    return folder / "with", folder / "without"


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def test_only_the_last_hidden_states_are_missing(both) -> None:
    """Every other tensor, the index and the target are the same, byte by byte."""
    full, without = both
    assert len(shards(full)) == len(shards(without)) > 1
    for one, other in zip(shards(full), shards(without), strict=True):
        expected, got = load_file(one), load_file(other)
        gone = {name for name in expected if name.startswith("last_hidden")}
        assert gone == {"last_hidden", "last_hidden.scale"}
        assert got.keys() == expected.keys() - gone
        assert all(torch.equal(got[name], expected[name]) for name in got)
    expected, got = load_file(full / "statistics.safetensors"), load_file(without / "statistics.safetensors")
    assert expected.keys() - got.keys() == {"last_hidden.mean", "last_hidden.deviation"}
    assert all(torch.equal(got[name], expected[name]) for name in got)
    one, other = tree(full), tree(without)
    same = [name for name in one if name.startswith("target/") or name == "samples.arrow"]
    assert len(same) > 4
    assert all(one[name] == other[name] for name in same)


def test_the_manifest_records_it(both) -> None:
    full, without = (json.loads((cache / "manifest.json").read_text()) for cache in both)
    features = without["identity"].pop("features")
    assert features == {
        "layer_ids": [0, 2, 4],
        "context_codec": "int8",
        "last_codec": "none",
        "last_hidden": "none",
    }
    assert full["identity"].pop("features")["last_hidden"] == "post_norm"
    assert without["identity"] == full["identity"]
    assert without["plan"] == full["plan"]
    # The target is proved as before; nothing is said about a teacher that is not stored.
    gone = {name for name in full["fidelity"] if "teacher_tv" in name or "last_hidden" in name}
    assert {name: v for name, v in full["fidelity"].items() if name not in gone} == without["fidelity"]
    assert "proof.perplexity" in without["fidelity"]
    assert "proof.padding_error" in without["fidelity"]


def test_the_reader_gives_all_but_them(both) -> None:
    full, without = map(CacheReader, both)
    assert full.has_last_hidden
    assert not without.has_last_hidden
    for i in range(len(full)):
        one, other = full.read(i), without.read(i)
        assert other.last_hidden is None
        assert one.last_hidden.shape == (full.num_last_rows(i), full.hidden_size)
        assert torch.equal(one.context, other.context)
        assert torch.equal(one.last_positions, other.last_positions)
    with pytest.raises(CacheError, match="made without them"):
        without.read_last_hidden(0, torch.empty(1, without.hidden_size))


def test_a_directory_of_the_other_is_refused_and_said(both, fp32_target, few) -> None:
    full, without = both
    result = run_cli(*command(fp32_target, few, full, context_codec="int8"), *WITHOUT)
    assert_refused(result, 1, "holds another capture", "features.last_hidden: post_norm against none")
    result = run_cli(*command(fp32_target, few, without, context_codec="int8"))
    assert_refused(result, 1, "holds another capture", "features.last_hidden: none against post_norm")
    result = run_cli("plan", *command(fp32_target, few, full, context_codec="int8")[1:], *WITHOUT)
    assert "warning: " in result.stderr
    assert "features.last_codec: int8 against none" in result.stderr


def test_a_codec_for_states_left_out_is_refused(tmp_path, fp32_target, few) -> None:
    given = ("--last-codec", "int8")
    result = run_cli(*command(fp32_target, few, tmp_path / "cache"), *WITHOUT, *given)
    assert_refused(result, 2, "--last-hidden none", "--last-codec int8", "give one of them")
    assert not (tmp_path / "cache").exists()


def test_plan_knows_the_size(both, fp32_target, few, tmp_path) -> None:
    """To the byte in the shards, and never the price of another cache."""
    _, without = both
    lines = run_ok("plan", *command(fp32_target, few, tmp_path / "x", context_codec="int8")[1:], *WITHOUT)
    rows = {line.split()[0]: line.split() for line in lines.splitlines() if "+none" in line}
    assert set(rows) == {f"{name}+none" for name in ("bf16", "fp16", "fp32", "fp8", "int8", "nf4", "lm3")}
    manifest = read_manifest(without)
    per_token = sum(path.stat().st_size for path in shards(without)) / manifest.num_tokens
    assert rows["int8+none"][1] == f"{per_token:,.0f}"
    assert rows["int8+none"][-2:] == ["(this", "capture's)"]
    assert "int8+int8" not in lines


def test_every_command_says_so(both, fp32_target, few) -> None:
    _, without = both
    assert "int8 context, no last hidden" in run_ok("capture", "--cache", without)
    again = run_ok(*command(fp32_target, few, without, context_codec="int8"), *WITHOUT)
    assert "already complete" in again
    assert "teacher total variation" not in again
    shown = run_ok("inspect", without)
    assert "int8 context (8.5 bits per value), no last hidden\n" in shown
    assert "teacher" not in shown
    sample = run_ok("inspect", without, "--sample", "#0")
    assert "layer 4" in sample
    assert "last hidden" not in sample
    assert "all good" in run_ok("verify", without)


def test_several_processes_and_a_repair_give_the_same_cache(both, fp32_target, few, tmp_path) -> None:
    _, without = both
    cache = tmp_path / "cache"
    wanted = [*command(fp32_target, few, cache, context_codec="int8"), *WITHOUT]
    folders = [tmp_path / str(rank) for rank in range(2)]
    workers = [Dspark(f, *wanted, "--worker", f"{f.name}/2", before=one_thread) for f in folders]
    assert [worker.wait() for worker in workers] == [0, 0], workers[0].err + workers[1].err
    assert tree(cache) == tree(without)
    shards(cache)[1].unlink()
    run_ok(*wanted)
    assert tree(cache) == tree(without)


def test_a_capture_killed_half_way_continues(both, fp32_target, few, tmp_path) -> None:
    _, without = both
    cache = tmp_path / "cache"
    wanted = [*command(fp32_target, few, cache, context_codec="int8"), *WITHOUT]
    work = Dspark(tmp_path / "killed", *wanted, before=one_thread)
    if work.wait_until(lambda: (cache / "progress" / "00000.json").exists()):
        work.process.kill()
    work.wait()
    run_ok(*wanted)
    assert tree(cache) == tree(without)


def test_a_state_that_is_not_stored_makes_no_sample_bad(
    both, fp32_target, few, tmp_path, monkeypatch
) -> None:
    """Nor does it spoil the statistics of the others."""
    _, without = both

    def spoil_last(_ids: torch.Tensor, states: dict[int | str, torch.Tensor]) -> None:
        states["last_hidden"].fill_(float("nan"))

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, spoil_last)
    result = run_cli(*command(fp32_target, few, tmp_path / "full", context_codec="int8"))
    assert_refused(result, 1, "the last hidden state", "NaN")
    run_ok(*command(fp32_target, few, tmp_path / "cache", context_codec="int8"), *WITHOUT)
    assert [path.read_bytes() for path in shards(tmp_path / "cache")] == [
        path.read_bytes() for path in shards(without)
    ]


def test_a_bad_sample_is_skipped_as_ever(fp32_target, tmp_path, monkeypatch) -> None:
    data = write_rows(tmp_path / "rows.jsonl", {3: NAN}, count=8)
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, spoil)
    cache = tmp_path / "cache"
    run_ok(*command(fp32_target, data, cache, bad_states="skip"), *WITHOUT)
    assert read_manifest(cache).skipped.source_row == (3,)
    assert len(CacheReader(cache)) == 7
    assert "all good" in run_ok("verify", cache)
