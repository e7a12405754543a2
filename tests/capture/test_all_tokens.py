"""`dspark capture --hidden all-tokens`: the target's rows, the manifest, the price, and what stays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, tree
from tests.capture.test_bad_states import NAN, write_rows
from tests.capture.test_fill import after_each_forward
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, one_thread

ALL = ("--hidden", "all-tokens")
INT8 = {"context_codec": "int8", "last_codec": "int8"}


def captured(folder: Path, target: Path, data: Path, **options: str) -> tuple[Path, Path]:
    run_ok(*arguments(target, data, folder / "labels", **options))
    run_ok(*arguments(target, data, folder / "every", **options), *ALL)
    return folder / "labels", folder / "every"


@pytest.fixture(scope="module")
def both(tmp_path_factory, fp32_target, few) -> tuple[Path, Path]:
    """The same capture of label rows and of all tokens, by a codec with statistics."""
    return captured(tmp_path_factory.mktemp("both"), fp32_target, few, **INT8)


@pytest.fixture(scope="module")
def exact(tmp_path_factory, fp32_target, few) -> tuple[Path, Path]:
    return captured(tmp_path_factory.mktemp("exact"), fp32_target, few, last_codec="fp32")


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").iterdir())


def last_positions(tensors: dict[str, Tensor], index: list[dict], shard: int) -> list[int]:
    """Row of the token tensors of every label row of a shard, by looking at each position."""
    found = []
    for row in index:
        if row["shard"] == shard:
            mask = tensors["loss_mask"][row["token_start"] : row["token_start"] + row["length"]].tolist()
            found += [row["token_start"] + t - 1 for t in range(1, len(mask)) if mask[t]]
    return found


def index_of(cache: Path) -> list[dict]:
    import pyarrow as pa

    with pa.memory_map(str(cache / "samples.arrow")) as mapped:
        return pa.ipc.open_file(mapped).read_all().to_pylist()


def test_every_row_is_the_targets(exact, fp32_target) -> None:
    """Against a plain loop over the samples, each alone, from the files by the index alone."""
    _, every = exact
    model = AutoModelForCausalLM.from_pretrained(fp32_target)
    stored = [load_file(path) for path in shards(every)]
    rows = prompts = 0
    for row in index_of(every):
        place = slice(row["token_start"], row["token_start"] + row["length"])
        shard = stored[row["shard"]]
        with torch.no_grad():
            states = model(shard["input_ids"][place].long()[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(shard["last_hidden"][place], states[-1][0], rtol=1e-4, atol=1e-4)
        rows += row["length"]
        prompts += row["length"] - row["last_rows"]
    assert sum(len(tensors["last_hidden"]) for tensors in stored) == rows
    assert prompts > rows / 10, "rows that no label needs"


@pytest.mark.parametrize("codec", ["exact", "both"])
def test_everything_else_is_as_in_a_cache_of_label_rows(codec, request) -> None:
    """Every other byte is the same, and so are the label rows among all."""
    labels, every = request.getfixturevalue(codec)
    index = index_of(labels)
    assert len(shards(labels)) == len(shards(every)) > 1
    for number, (one, other) in enumerate(zip(shards(labels), shards(every), strict=True)):
        expected, got = load_file(one), load_file(other)
        assert got.keys() == expected.keys()
        places = last_positions(got, index, number)
        for name in got:
            rows = got[name][places] if name.startswith("last_hidden") else got[name]
            assert torch.equal(rows, expected[name]), name
    one, other = tree(labels), tree(every)
    same = [name for name in one if not name.startswith(("shards/", "manifest"))]
    assert len(same) > 5
    assert {name: other[name] for name in same} == {name: one[name] for name in same}


def test_the_manifest_records_it_and_no_other_does(both) -> None:
    labels, every = (json.loads((cache / "manifest.json").read_text()) for cache in both)
    assert every["identity"]["features"].pop("hidden") == "all-tokens"
    assert every["identity"] == labels["identity"]
    assert every["plan"] == labels["plan"]
    assert every["fidelity"].keys() == labels["fidelity"].keys()
    assert every["fidelity"]["teacher_tv_mean"] < 0.05


def test_a_directory_of_the_other_is_refused_by_the_name_of_the_field(both, fp32_target, few) -> None:
    labels, every = both
    result = run_cli(*arguments(fp32_target, few, labels, **INT8), *ALL)
    assert_refused(result, 1, "holds another capture", "features.hidden: labels against all-tokens")
    result = run_cli(*arguments(fp32_target, few, every, **INT8))
    assert_refused(result, 1, "holds another capture", "features.hidden: all-tokens against labels")


def test_states_that_are_left_out_have_no_rows(tmp_path, fp32_target, few) -> None:
    wanted = arguments(fp32_target, few, tmp_path / "cache", **INT8)
    place = wanted.index("--last-codec")
    result = run_cli(*wanted[:place], *wanted[place + 2 :], *ALL, "--last-hidden", "none")
    assert_refused(result, 2, "--last-hidden none", "--hidden all-tokens", "give one of them")
    assert not (tmp_path / "cache").exists()


def test_plan_knows_the_size(both, fp32_target, few, tmp_path) -> None:
    """To the byte, of both kinds of cache."""
    shown = run_ok("plan", *arguments(fp32_target, few, tmp_path / "x", **INT8)[1:], *ALL)
    sizes = []
    for cache in both:
        manifest = read_manifest(cache)
        size = sum(path.stat().st_size for path in shards(cache)) / manifest.num_tokens
        sizes.append(f"{size:,.0f}")
    own = re.search(r"^int8 +([\d,]+) .*\(this capture's\)$", shown, re.MULTILINE)
    assert [own[1]] == sizes[1:]
    line = (
        f"last hidden states of all {manifest.num_tokens:,} tokens; --hidden labels stores the "
        f"{manifest.num_last_rows:,} that training needs: {sizes[0]} bytes per token"
    )
    assert line in shown.splitlines()
    assert sizes[0] != sizes[1]
    assert "--hidden labels" not in run_ok("plan", *arguments(fp32_target, few, tmp_path / "x", **INT8)[1:])


def test_conversion_gives_the_captured_label_rows(both, tmp_path) -> None:
    labels, every = both
    run_ok("convert", every, tmp_path / "new", "--hidden", "labels")
    ours, theirs = tree(tmp_path / "new"), tree(labels)
    del ours["manifest.json"], theirs["manifest.json"]
    assert ours == theirs


def test_killed_and_repaired_it_gives_the_same_cache(both, fp32_target, few, tmp_path) -> None:
    _, every = both
    cache = tmp_path / "cache"
    wanted = [*arguments(fp32_target, few, cache, **INT8), *ALL]
    work = Dspark(tmp_path / "killed", *wanted, before=one_thread)
    if work.wait_until(lambda: (cache / "progress" / "00000.json").exists()):
        work.process.kill()
    work.wait()
    run_ok(*wanted)
    assert tree(cache) == tree(every)
    path = shards(cache)[0]
    path.write_bytes(path.read_bytes()[:-1])
    run_cli("verify", cache, "--repair")
    run_ok(*wanted)
    assert {name: data for name, data in tree(cache).items() if "damaged" not in name} == tree(every)


def spoil_prompt(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
    """Spoil position 1 of rows with a bad id; the first label row of `write_rows` is position 2."""
    (rows, _) = torch.where(input_ids == NAN)
    states["last_hidden"][rows, 1] = float("nan")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_bad_row_that_no_label_needs_makes_its_sample_bad(
    codec, fp32_target, tmp_path, monkeypatch
) -> None:
    """It is stored, so it must be sound; without the option it is as good as absent."""
    data = write_rows(tmp_path / "rows.jsonl", {3: NAN}, count=8)

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, spoil_prompt)
    options = {"last_codec": codec, "bad_states": "skip"}
    if codec == "bf16":  # statistics are measured from every row, also without the option
        labels = tmp_path / "labels"
        run_ok(*arguments(fp32_target, data, labels, **options))
        assert len(CacheReader(labels)) == 8
    every = tmp_path / "every"
    result = run_cli(*arguments(fp32_target, data, every, **{**options, "bad_states": "fail"}), *ALL)
    assert_refused(result, 1, "the last hidden state of the sample at row 4", "NaN")
    run_ok(*arguments(fp32_target, data, every, **options), *ALL)
    skipped = read_manifest(every).skipped
    assert skipped.source_row == (3,)
    row = index_of(every)[skipped.sample[0]]
    tensors = load_file(shards(every)[row["shard"]])
    place = slice(row["token_start"], row["token_start"] + row["length"])
    assert len(tensors["last_hidden"]) == len(tensors["input_ids"]) > row["length"]
    assert not tensors["last_hidden"][place].any()
    kept = torch.cat([tensors["last_hidden"][: place.start], tensors["last_hidden"][place.stop :]])
    assert kept.float().abs().sum(dim=1).min() > 0
    assert len(CacheReader(every, hidden="all-tokens")) == 7
    assert "all good" in run_ok("verify", every)


def test_statistics_are_measured_without_a_sample_that_such_a_row_makes_bad(
    fp32_target, tmp_path, monkeypatch
) -> None:
    """Of states that only the sample's last hidden states spoil."""
    data, rest = write_rows(tmp_path / "rows.jsonl", {3: NAN}, count=8), tmp_path / "rest.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    rest.write_text("".join(lines[:3] + lines[4:]))
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, spoil_prompt)
    means = {}
    for name, rows, options in (("every", data, ALL), ("rest", rest, ALL), ("labels", data, ())):
        codecs = {"context_codec": "int8", "bad_states": "skip"}
        run_ok(*arguments(fp32_target, rows, tmp_path / name, **codecs), *options)
        means[name] = load_file(tmp_path / name / "statistics.safetensors")["context.2.mean"]
    torch.testing.assert_close(means["every"], means["rest"], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(means["labels"], means["rest"], rtol=1e-3)


def test_the_end_of_a_capture_says_so(both) -> None:
    assert "int8 context, int8 last hidden of every token" in run_ok("capture", "--cache", both[1])
