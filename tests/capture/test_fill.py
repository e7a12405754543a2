"""From the target's forward to a shard's bytes: memory that runs out, bad states, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from capture.target import HFDSparkTargetModel
from pipeline.cache import CacheReader, fidelity, read_manifest
from tests.capture.conftest import arguments, in_data_order, places, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_conversations, make_target

Patch = Callable[[Tensor, dict[int | str, Tensor]], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=30, seed=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, fp32_target, data) -> Path:
    path = tmp_path_factory.mktemp("cache") / "whole"
    run_ok(*arguments(fp32_target, data, path))
    return path


def after_each_forward(monkeypatch: pytest.MonkeyPatch, change: Patch) -> None:
    """Let `change(input_ids, states)` look at every forward of the capture, and break it."""
    real = HFDSparkTargetModel.states

    def states(
        self: HFDSparkTargetModel, input_ids: Tensor, *rest: Any, **more: Any
    ) -> dict[int | str, Tensor]:
        found = real(self, input_ids, *rest, **more)
        change(input_ids, found)
        return found

    monkeypatch.setattr(HFDSparkTargetModel, "states", states)


def assert_same_content(one: Path, other: Path) -> None:
    """The same samples in the same places; states may differ as sums in another order do."""
    first, second = CacheReader(one), CacheReader(other)
    assert len(first) == len(second)
    for i, j in zip(in_data_order(one), in_data_order(other), strict=True):
        a, b = first.read(i), second.read(j)
        assert (a.sample_id, a.input_ids.tolist()) == (b.sample_id, b.input_ids.tolist())
        assert a.loss_mask.tolist() == b.loss_mask.tolist()
        assert a.last_positions.tolist() == b.last_positions.tolist()
        for got, want in ((a.context, b.context), (a.last_hidden, b.last_hidden)):
            # A neighbouring bf16 number where another sum moved it across.
            torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-5)


# Memory that runs out


def memory_for(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """A device where no more than so many padded tokens fit; lists the sizes of what fitted."""
    sizes = []

    def change(input_ids: Tensor, _states: dict) -> None:
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        sizes.append(input_ids.numel())

    after_each_forward(monkeypatch, change)
    return sizes


def test_batches_that_do_not_fit_are_split_with_one_warning(tmp_path, fp32_target, data, monkeypatch):
    run_ok(*arguments(fp32_target, data, tmp_path / "small", batch_tokens=270, shard_tokens=300))
    sizes = memory_for(monkeypatch, 270)
    options = {"batch_tokens": 1000, "shard_tokens": 1000}
    result = run_cli(*arguments(fp32_target, data, tmp_path / "split", **options))
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if "do not fit" in line]
    assert len(warnings) == 1
    assert "do not fit the memory of cpu" in warnings[0]
    assert "split from now on" in warnings[0]
    assert max(sizes) <= 270
    assert_same_content(tmp_path / "split", tmp_path / "small")
    assert "all good" in run_ok("verify", tmp_path / "split")


def test_a_size_that_did_not_fit_is_not_tried_again(tmp_path, fp32_target, data, monkeypatch):
    tried = []
    memory_for(monkeypatch, 270)
    real = HFDSparkTargetModel.states

    def states(self: HFDSparkTargetModel, input_ids: Tensor) -> dict[int | str, Tensor]:
        tried.append(input_ids.numel())
        return real(self, input_ids)

    monkeypatch.setattr(HFDSparkTargetModel, "states", states)
    run_ok(*arguments(fp32_target, data, tmp_path / "split", batch_tokens=1000, shard_tokens=1000))
    failed = [size for size in tried if size > 270]
    assert failed
    assert all(a > b for a, b in pairwise(failed)), "smaller each time, never as large again"


def test_memory_that_runs_out_while_a_batch_is_encoded_counts_nothing_twice(
    tmp_path, fp32_target, data, monkeypatch
):
    options = {"batch_tokens": 1000, "shard_tokens": 1000}
    run_ok(*arguments(fp32_target, data, tmp_path / "whole", **options))
    real, failed = fidelity.teacher_variation, []

    def teacher_variation(*given: Any) -> Tensor:
        if len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(fidelity, "teacher_variation", teacher_variation)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "split", **options))
    assert result.exit_code == 0, result.output
    assert len(failed) == 2
    assert result.stderr.count("split from now on") == 1
    assert_same_content(tmp_path / "split", tmp_path / "whole")
    figures, expected = (read_manifest(tmp_path / name).fidelity for name in ("split", "whole"))
    assert figures == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_a_row_that_does_not_fit_by_itself_is_refused_by_name(
    tmp_path, fp32_target, data, cache, monkeypatch
):
    reader = CacheReader(cache)
    longest = int(reader.lengths.argmax())
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    memory_for(monkeypatch, int(reader.lengths.max()) - 1)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache"))
    (_, row), length = places(cache)[longest], reader.lengths[longest]
    assert_refused(result, 1, f"row {row + 1} of {data.name}", f"{length} tokens", "--max-length")


def test_rows_that_fit_one_by_one_only_are_proved_and_captured(
    tmp_path, fp32_target, data, cache, monkeypatch
):
    """The proof's batches do not fit either, and say nothing about the target."""
    reader = CacheReader(cache)
    memory_for(monkeypatch, int(reader.lengths.max()))
    run_ok(*arguments(fp32_target, data, tmp_path / "cache"))
    assert tree(tmp_path / "cache").keys() == tree(cache).keys()
    assert len(CacheReader(tmp_path / "cache")) == len(reader)


def test_a_row_that_fits_nowhere_leaves_other_batches_whole(tmp_path, fp32_target, data, cache, monkeypatch):
    """Halving its batch says nothing about the others, whose figures then do not depend on it."""
    whole = CacheReader(cache)
    huge = whole.tokens(0)[0].long()
    shapes: list[tuple[int, ...]] = []
    options = {"batch_tokens": 1000, "shard_tokens": 1000}

    def change(input_ids: Tensor, _states: dict) -> None:
        if any(torch.equal(row, huge) for row in input_ids[:, : len(huge)]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        shapes.append(tuple(input_ids.shape))

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    with monkeypatch.context() as patch:
        after_each_forward(patch, lambda input_ids, _states: shapes.append(tuple(input_ids.shape)))
        run_ok(*arguments(fp32_target, data, tmp_path / "sound", **options))
    (first, *others), _ = list(shapes), shapes.clear()
    assert first[0] > 1, "the row shares its batch"
    after_each_forward(monkeypatch, change)
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", bad_states="skip", **options))
    assert shapes[-len(others) :] == others
    assert sum(rows for rows, _ in shapes) == sum(rows for rows, _ in others) + first[0] - 1


# States that no draft should learn from

SPOIL = {
    "NaN": ("NaN", lambda rows: rows[len(rows) // 2, 3].fill_(float("nan"))),
    "infinity": ("infinity", lambda rows: rows[-1, 0].fill_(float("-inf"))),
    "zeros": ("all zero", lambda rows: rows.zero_()),
}


@pytest.mark.parametrize("kind", SPOIL)
@pytest.mark.parametrize(
    ("key", "name"), [(0, "layer 0"), (2, "layer 2"), ("last_hidden", "last hidden state")], ids=str
)
@pytest.mark.parametrize("where", ["first", "middle", "later shard"])
def test_bad_states_are_refused_naming_row_and_state(
    tmp_path, fp32_target, data, cache, monkeypatch, kind, key, name, where
):
    word, spoil = SPOIL[kind]
    reader = CacheReader(cache)
    last_shard = len(reader.manifest.plan) - 1
    # The proof looks at the ends of the first batches; these are others.
    sample = {"first": 0, "middle": 1, "later shard": len(reader) - 2}[where]
    assert (reader.shards[sample] == last_shard) == (where == "later shard")
    ids = reader.read(sample).input_ids.long()
    masks = reader.read(sample).loss_mask[1:].bool()

    def change(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
        for row, found in enumerate(input_ids[:, : len(ids)]):
            if torch.equal(found, ids):
                rows = states[key][row, : len(ids)]
                if key == "last_hidden":  # of which only rows before a label are kept
                    index = masks.nonzero()[:, 0]
                    kept = rows[index]
                    spoil(kept)
                    rows[index] = kept
                else:
                    spoil(rows)

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache"))
    _, row = places(cache)[sample]
    assert_refused(result, 1, f"row {row + 1} of {data.name}", name, word, "--bad-states skip")
    assert read_manifest(tmp_path / "cache").status == "incomplete"
    bad = int(reader.shards[sample])
    assert f"{bad:05d}.json" not in finished_shards(tmp_path / "cache")
    assert not (tmp_path / "cache/shards" / f"{bad:05d}.safetensors").exists()


def test_bad_states_of_rows_that_are_not_kept_do_not_matter(tmp_path, fp32_target, data, cache, monkeypatch):
    """Padding, and last hidden states that no label needs: what they hold is nobody's business."""

    def change(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
        for row, found in enumerate(input_ids):
            end = int(found.nonzero().max()) + 1  # padding is zeros
            for state in states.values():
                state[row, end:] = float("nan")
            states["last_hidden"][row, end - 1] = float("nan")

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    run_ok(*arguments(fp32_target, data, tmp_path / "cache"))
    assert tree(tmp_path / "cache/shards") == tree(cache / "shards")


def test_a_teacher_that_storing_spoils_is_refused(tmp_path, fp32_target, data, monkeypatch):
    monkeypatch.setattr(
        fidelity, "teacher_variation", lambda head, identity, one, other: torch.full((len(one),), 0.3)
    )
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache"))
    assert_refused(result, 1, "stored teacher", "0.300", "at most 0.25")
    assert finished_shards(tmp_path / "cache") == []


# What was measured


@torch.no_grad()
def measured(path: Path, target: Path) -> dict[str, list[np.ndarray]]:
    """Of every label row of a cache: what storing did to the states, by Hugging Face's own hidden states."""
    reader, model = CacheReader(path), AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    found: dict[str, list[np.ndarray]] = {}

    def compare(name: str, stored: Tensor, own: Tensor) -> None:
        error = (stored.double() - own.double()).norm(dim=-1) / own.double().norm(dim=-1)
        found.setdefault(f"relative_error.{name}", []).append(error.numpy())

    for i in range(len(reader)):
        sample = reader.read(i)
        ids, rows = sample.input_ids.long()[None], sample.last_positions
        output = model(input_ids=ids, output_hidden_states=True)
        contexts = sample.context.split(reader.hidden_size, dim=-1)
        for layer_id, stored in zip(reader.layer_ids, contexts, strict=True):
            compare(f"context.{layer_id}", stored[rows], output.hidden_states[layer_id + 1][0, rows])
        own = output.hidden_states[-1][0, rows]
        compare("last_hidden", sample.last_hidden, own)
        head = model.get_output_embeddings().weight.double()
        stored, expected = ((x.double() @ head.T).softmax(-1) for x in (sample.last_hidden, own))
        found.setdefault("teacher_tv", []).append(((stored - expected).abs().sum(-1) / 2).numpy())
    return found


def test_the_manifests_figures_are_those_of_the_cache_and_the_model(tmp_path, fp32_target):
    """So few labels a shard that every one is looked at."""
    generator = np.random.default_rng(0)
    data = tmp_path / "data.jsonl"
    rows = [{"input_ids": generator.integers(3, 250, 9).tolist(), "loss_mask": [0] * 5 + [1] * 4}] * 1
    rows += [
        {"input_ids": generator.integers(3, 250, n).tolist(), "loss_mask": [0] * (n - 4) + [1] * 4}
        for n in (5, 7, 12, 20, 33, 40, 41)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", shard_tokens=2, batch_tokens=2))
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.plan.last_rows == (4,) * len(rows)
    expected = {"teacher_tv_rows": 4.0 * len(rows)}
    for name, values in measured(tmp_path / "cache", fp32_target).items():
        every = np.concatenate(values)
        expected |= {f"{name}_mean": every.mean(), f"{name}_p99": np.percentile(every, 99)}
    figures = {k: v for k, v in manifest.fidelity.items() if not k.startswith("proof.")}
    assert figures == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert set(figures) == {
        *("teacher_tv_mean", "teacher_tv_p99", "teacher_tv_rows"),
        *(
            f"relative_error.{state}_{figure}"
            for state in ("context.0", "context.2", "context.4", "last_hidden")
            for figure in ("mean", "p99")
        ),
    }
    # bf16 keeps 8 bits: a value is off by 2^-9 of itself at most, and not by nothing.
    assert all(
        1e-4 < figures[f"relative_error.context.{layer}_{figure}"] < 2**-8
        for layer in (0, 2, 4)
        for figure in ("mean", "p99")
    )


def test_some_rows_of_every_shard_are_looked_at(cache, fp32_target):
    manifest = read_manifest(cache)
    assert manifest.fidelity["teacher_tv_rows"] == sum(min(4, rows) for rows in manifest.plan.last_rows)
    every = np.concatenate(measured(cache, fp32_target)["teacher_tv"])
    assert every.min() <= manifest.fidelity["teacher_tv_mean"] <= manifest.fidelity["teacher_tv_p99"]
    assert manifest.fidelity["teacher_tv_p99"] <= every.max() * 1.001
    assert manifest.fidelity["teacher_tv_mean"] == pytest.approx(every.mean(), rel=0.5)


# Memory


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """Were the states of 1,800 more samples kept, they would take 236 MB."""
    width, layers, length = 1024, 4, 16
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 16}
    target = make_target(tmp_path / "wide", "llama", **shape, initializer_range=0.02)
    generator = np.random.default_rng(0)
    peaks = {}
    for count in (200, 2000):
        data = tmp_path / f"{count}.jsonl"
        rows = generator.integers(3, 250, (count, length)).tolist()
        lines = (json.dumps({"input_ids": ids, "loss_mask": [0] * 4 + [1] * 12}) for ids in rows)
        data.write_text("\n".join(lines))
        options = {"layers": "0,1,2", "shard_tokens": 1024, "batch_tokens": 512, "dtype": "float32"}
        cache = tmp_path / f"cache{count}"
        dspark = Dspark(tmp_path / f"out{count}", *arguments(target, data, cache, **options))
        assert dspark.wait() == 0, dspark.err
        peaks[count] = dspark.peak_bytes
        assert read_manifest(cache).num_samples == count
    kept = (2000 - 200) * length * 4 * width * 2
    assert kept > 200e6
    assert peaks[2000] - peaks[200] < kept / 5, peaks
