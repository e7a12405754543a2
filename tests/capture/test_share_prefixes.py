"""`dspark capture --share-prefixes`: rows of equal beginnings stored and computed once, and read as ever."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from capture.batching import Limits, plan_sharing
from capture.data.conversations import TokenizedSample
from capture.engines.huggingface import HuggingFaceEngine
from capture.prefixes import LEAST, equal_start
from capture.shards.fill import ShardFiller
from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.contents import SampleChecks
from pipeline.cache.index import index_bytes, open_index
from pipeline.cache.manifest import INDEX, MANIFEST, shard_file
from pipeline.errors import CacheError
from pipeline.rope import RopeLengths
from tests.capture.conftest import arguments, tree
from tests.capture.test_bad_states import HUGE, INFINITE, NAN, SKIP, spoil
from tests.capture.test_families import FAMILIES, V, make_model
from tests.capture.test_fill import after_each_forward
from tests.conftest import assert_refused, run_cli, run_ok

SHARE = "--share-prefixes"
EXACT = {"context_codec": "fp32", "last_codec": "fp32", "batch_tokens": 512}
SYSTEM = 80
# Families with layers that keep a state of all tokens, from which no other sample can carry on.
RECURRENT = ("qwen3_next", "falcon_h1", "lfm2", "qwen3_5_text", "recurrent_gemma")


def write_beginnings(path: Path, count: int = 40, spoiled: dict[int, int] | None = None) -> Path:
    """Rows with one of two long beginnings and one of a few questions, or with nothing in common.

    Args:
        spoiled: an id for the last token of some rows.
    """
    generator = np.random.default_rng(3)
    systems = [generator.integers(3, 190, SYSTEM).tolist() for _ in range(2)]
    questions = [generator.integers(3, 190, n).tolist() for n in (70, 9)]
    with path.open("w") as file:
        for row in range(count):
            system = systems[row % 2] if row % 5 else generator.integers(3, 190, 30).tolist()
            prompt = system + questions[row // 2 % 2]
            answer = generator.integers(3, 190, int(generator.integers(4, 30))).tolist()
            if row in (spoiled or {}):
                answer[-1] = spoiled[row]
            mask = [0] * len(prompt) + [1] * len(answer)
            file.write(json.dumps({"input_ids": prompt + answer, "loss_mask": mask}) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_beginnings(tmp_path_factory.mktemp("beginnings") / "rows.jsonl")


@pytest.fixture(scope="module")
def both(tmp_path_factory, fp32_target, data) -> tuple[Path, Path]:
    """The same data captured with rows of its own for each sample, and with shared ones."""
    folder = tmp_path_factory.mktemp("both")
    run_ok(*arguments(fp32_target, data, folder / "each", **EXACT))
    run_ok(*arguments(fp32_target, data, folder / "once", **EXACT), SHARE)
    return folder / "each", folder / "once"


def index_of(cache: Path) -> list[dict]:
    with pa.memory_map(str(cache / "samples.arrow")) as mapped:
        return pa.ipc.open_file(mapped).read_all().to_pylist()


def stored_context(cache: Path, tensor: str) -> list[tuple[dict, Tensor]]:
    """Every sample's row of the index, and its rows of a context tensor, read one after the other."""
    found: list[tuple[dict, Tensor]] = []
    shards: dict[int, Tensor] = {}
    used: dict[int, int] = {}
    for row in index_of(cache):
        shard = row["shard"]
        if shard not in shards:
            shards[shard] = load_file(cache / shard_file(shard))[tensor]
        start, own = used.get(shard, 0), row["length"] - row["shared"]
        used[shard] = start + own
        before = found[-1][1][: row["shared"]] if row["shared"] else shards[shard][:0]
        found.append((row, torch.cat([before, shards[shard][start : start + own]])))
    assert all(len(shards[shard]) == rows for shard, rows in used.items()), "rows that no sample has"
    return found


def test_each_sample_reads_as_if_it_had_its_own_rows(both) -> None:
    each, once = map(CacheReader, both)
    numbers = {once.sample_id(i): i for i in range(len(once))}
    assert len(each) == len(once) == 40
    for i in range(len(each)):
        want, got = each.read(i), once.read(numbers[each.sample_id(i)])
        assert got.input_ids.tolist() == want.input_ids.tolist()
        assert got.loss_mask.tolist() == want.loss_mask.tolist()
        # A neighbouring bf16 number where another sum moved it across.
        torch.testing.assert_close(got.context, want.context, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(got.last_hidden, want.last_hidden, rtol=2**-7, atol=1e-3)


def test_readers_give_the_rows_that_the_files_have(both) -> None:
    reader = CacheReader(both[1])
    layer = reader.layer_ids[1]
    state = f"context.{layer}"
    for i, (row, want) in enumerate(stored_context(both[1], state)):
        assert row["sample_id"].hex() == reader.sample_id(i)
        assert torch.equal(reader.layer_view(i, layer), want)
        assert torch.equal(reader.parts(i, state)[""], want)
        out = torch.empty_like(want)
        reader.read_ahead(i, [state])
        reader.fetch(i, state, {"": out})
        assert torch.equal(out, want)
        part = slice(row["shared"] - 2 if row["shared"] else 1, row["length"] - 1)
        some = torch.empty(part.stop - part.start, want.shape[1], dtype=torch.bfloat16)
        reader.read_rows(i, state, part, some)
        assert torch.equal(some, want[part].to(torch.bfloat16))


def test_the_index_says_what_begins_alike_and_the_cache_is_smaller(both) -> None:
    reader, rows = CacheReader(both[1]), index_of(both[1])
    tokens = [reader.tokens(i)[0].numpy() for i in range(len(reader))]
    for (before, row), (one, other) in zip(pairwise(rows), pairwise(tokens), strict=True):
        alike = min(equal_start(one, other), row["length"] - 1)
        assert row["shared"] == (alike if before["shard"] == row["shard"] and alike >= LEAST else 0)
    each, once = map(read_manifest, both)
    assert sum(once.plan.rows) == sum(row["length"] - row["shared"] for row in rows)
    # 32 of 40 rows have one of two beginnings, half of them one of two long questions after it.
    assert sum(once.plan.rows) < 0.55 * sum(once.plan.tokens)
    assert sum(once.shards.bytes) < 0.7 * sum(each.shards.bytes)
    assert once.identity.features.prefixes == "once"
    assert "prefixes" not in json.loads((both[0] / "manifest.json").read_text())["identity"]["features"]
    run_ok("verify", both[1])


def test_a_beginning_is_computed_once_a_batch_at_most(tmp_path, fp32_target, data, monkeypatch) -> None:
    computed: list[int] = []
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, lambda ids, states: computed.append(ids.numel()))
    run_ok(*arguments(fp32_target, data, tmp_path / "each", **EXACT))
    whole, computed[:] = sum(computed), []
    run_ok(*arguments(fp32_target, data, tmp_path / "once", **EXACT), SHARE)
    assert sum(computed) < 0.6 * whole


def test_another_run_and_a_killed_one_give_the_same_bytes(tmp_path, fp32_target, data, both) -> None:
    again = tmp_path / "again"
    run_ok(*arguments(fp32_target, data, again, **EXACT), SHARE)
    assert tree(again) == tree(both[1])
    (again / shard_file(1)).unlink()
    run_ok(*arguments(fp32_target, data, again, **EXACT), SHARE)
    assert tree(again) == tree(both[1])


def test_the_plan_says_what_is_saved_and_sizes_are_right(tmp_path, fp32_target, data, both) -> None:
    said = run_ok("plan", *arguments(fp32_target, data, tmp_path / "none", **EXACT)[1:], SHARE)
    plan = read_manifest(both[1]).plan
    assert f"context of {sum(plan.rows):,} tokens stored" in said
    result = run_cli(*arguments(fp32_target, data, both[1], **EXACT))
    assert_refused(result, 1, "holds another capture", "features.prefixes: once against each")


def test_a_bad_sample_takes_nothing_from_those_that_begin_like_it(tmp_path, fp32_target, monkeypatch) -> None:
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    bad = {6: NAN, 7: HUGE, 13: NAN, 21: INFINITE}
    rows = write_beginnings(tmp_path / "rows.jsonl", spoiled=bad)
    run_ok(*arguments(fp32_target, rows, tmp_path / "sound", **EXACT), SHARE)
    after_each_forward(monkeypatch, spoil)
    run_ok(*arguments(fp32_target, rows, tmp_path / "cache", **EXACT, **SKIP), SHARE)
    monkeypatch.undo()
    run_ok("verify", tmp_path / "cache")
    sound, cache = CacheReader(tmp_path / "sound"), CacheReader(tmp_path / "cache")
    skipped = read_manifest(tmp_path / "cache").skipped
    assert set(skipped.source_row) == set(bad)
    numbers = {sound.sample_id(i): i for i in range(len(sound))}
    assert len(cache) == len(sound) - len(bad)
    for i in range(len(cache)):
        want = sound.read(numbers[cache.sample_id(i)])
        assert torch.equal(cache.read(i).context, want.context)
        assert torch.equal(cache.read(i).last_hidden, want.last_hidden)


def test_one_that_does_not_fit_takes_none_with_it_that_begins_alike(
    tmp_path, fp32_target, monkeypatch
) -> None:
    """The longest of twenty answers to a question comes first, so the others have their beginning from it."""
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    generator = np.random.default_rng(0)
    question, path = generator.integers(3, 190, 90).tolist(), tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for row in range(20):
            answer = generator.integers(3, 190, 60 if row == 7 else 5 + row).tolist()
            answer[-1] = HUGE if row == 7 else answer[-1]
            mask = [0] * 90 + [1] * len(answer)
            file.write(json.dumps({"input_ids": question + answer, "loss_mask": mask}) + "\n")
    run_ok(*arguments(fp32_target, path, tmp_path / "sound", **EXACT), SHARE)
    after_each_forward(monkeypatch, spoil)
    run_ok(*arguments(fp32_target, path, tmp_path / "cache", **EXACT, **SKIP), SHARE)
    monkeypatch.undo()
    run_ok("verify", tmp_path / "cache")
    assert read_manifest(tmp_path / "cache").skipped.source_row == (7,)
    sound, cache = CacheReader(tmp_path / "sound"), CacheReader(tmp_path / "cache")
    numbers = {sound.sample_id(i): i for i in range(len(sound))}
    assert index_of(tmp_path / "cache")[1]["shared"] >= 90
    for i in range(len(cache)):
        want = sound.read(numbers[cache.sample_id(i)]).context
        torch.testing.assert_close(cache.read(i).context, want, rtol=2**-7, atol=1e-3)


def write_turns(path: Path, rows: int = 18) -> Path:
    """Each row begins with the whole one before it, every answer supervised, as an agent's turns do."""
    generator = np.random.default_rng(1)
    ids, mask = generator.integers(3, 190, 20).tolist(), [0] * 20
    with path.open("w") as file:
        for _ in range(rows):
            ids, mask = ids + generator.integers(3, 190, 25).tolist(), mask + [0] * 10 + [1] * 15
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    return path


def test_of_turns_that_hold_each_other_every_row_is_stored_once(tmp_path, fp32_target, monkeypatch) -> None:
    data = write_turns(tmp_path / "turns.jsonl")
    options = {**EXACT, "shard_tokens": 6000}
    run_ok(*arguments(fp32_target, data, tmp_path / "once", **options), SHARE)
    manifest = read_manifest(tmp_path / "once")
    assert manifest.plan.rows == (20 + 18 * 25 + 17,), "each but the longest has a row of its own"
    assert manifest.fidelity["teacher_tv_rows"] == 4
    assert 0 < manifest.fidelity["relative_error.context.2_mean"] < 0.005, "of bf16"


def test_a_ruined_teacher_is_refused_also_where_its_rows_share_their_context(
    tmp_path, fp32_target, monkeypatch
) -> None:
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    real = ShardFiller._encode

    def ruined(self: ShardFiller, state: str, rows: Tensor) -> dict[str, Tensor]:
        return real(self, state, rows * 0 if state == "last_hidden" else rows)

    monkeypatch.setattr(ShardFiller, "_encode", ruined)
    data = write_turns(tmp_path / "turns.jsonl")
    result = run_cli(*arguments(fp32_target, data, tmp_path / "once", **EXACT), SHARE)
    assert_refused(result, 1, "the stored teacher of", "differs from the target's")


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_shard_has_more_rows_of_a_state_than_asked_for(seed: int, every: bool) -> None:
    generator = np.random.default_rng(seed)
    systems = [generator.integers(3, 50, n) for n in (3, 40, 200)]
    tokens = []
    for _ in range(150):
        system = systems[int(generator.integers(3))]
        tokens.append(np.concatenate([system, generator.integers(3, 50, int(generator.integers(2, 60)))]))
    lengths = np.array([len(ids) for ids in tokens])
    last_rows = lengths if every else generator.integers(1, lengths)
    limits = Limits(400, 300, carries_on=True)

    class Data:
        facts = SimpleNamespace(lengths=lengths)

        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, i: int) -> TokenizedSample:
            return TokenizedSample(i, tokens[i].astype(np.int32), np.ones(len(tokens[i]), np.uint8))

    plan, shared = plan_sharing(Data(), last_rows, limits)
    assert sorted(plan.order.tolist()) == list(range(150))
    ordered = lengths[plan.order]
    for members in plan.shards:
        some = slice(members.start, members.stop)
        assert shared[members.start] == 0
        if len(members) > 1:
            assert int((ordered[some] - shared[some]).sum()) <= 300
            assert int(last_rows[plan.order[some]].sum()) <= 300
            assert int(ordered[some].sum()) <= 16 * 300
    for batch in plan.batches:
        assert len(batch) == 1 or len(batch) * ordered[batch.start : batch.stop].max() <= 4 * 400


def bent(cache: Path, shared: list[int]) -> Path:
    """A copy of a cache's index with other values of `shared`."""
    with pa.memory_map(str(cache / INDEX)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    at = table.schema.get_field_index("shared")
    table = table.set_column(at, table.schema.field(at), pa.array(shared, pa.int32()))
    path = cache.parent / "bent.arrow"
    path.write_bytes(index_bytes(table))
    return path


def test_an_index_that_lies_about_shared_rows_is_refused(both) -> None:
    rows, plan = index_of(both[1]), read_manifest(both[1]).plan
    shared = [row["shared"] for row in rows]
    assert open_index(bent(both[1], shared), plan).num_rows == len(rows)
    middle = next(i for i in range(1, len(rows)) if shared[i] and rows[i + 1]["shard"] == rows[i]["shard"])
    second = next(i for i, row in enumerate(rows) if row["shard"] == 1)
    lies = {
        "negative": {middle: -1, middle + 1: shared[middle + 1] + shared[middle] + 1},
        "more than the sample before has": {middle: rows[middle - 1]["length"] + 1},
        "all of its own": {middle: rows[middle]["length"]},
        "with the shard before": {second: 3},
        "another sum": {middle: shared[middle] - 1},
    }
    for name, values in lies.items():
        path = bent(both[1], [values.get(i, n) for i, n in enumerate(shared)])
        with pytest.raises(CacheError, match="tile the shards"):
            print(name, len(open_index(path, plan)))


@pytest.mark.parametrize("change", ["no rows", "too many rows", "rows of a cache that shares none"])
def test_a_manifest_that_lies_about_shared_rows_is_refused(both, tmp_path, change) -> None:
    each, once = map(read_manifest, both)
    tokens = once.plan.tokens
    plans = {
        "no rows": (once, replace(once.plan, rows=())),
        "too many rows": (once, replace(once.plan, rows=(tokens[0] + 1, *tokens[1:]))),
        "rows of a cache that shares none": (each, replace(each.plan, rows=each.plan.tokens)),
    }
    manifest, plan = plans[change]
    (tmp_path / MANIFEST).write_bytes(replace(manifest, plan=plan).to_json())
    with pytest.raises(CacheError, match="other rows of context than its identity"):
        read_manifest(tmp_path)


def test_verify_compares_the_tokens_of_shared_rows(both, tmp_path) -> None:
    """Rows of one sample given to another that begins otherwise, with hashes to match."""
    cache = tmp_path / "cache"
    shutil.copytree(both[1], cache)
    rows = index_of(cache)
    i = next(
        i for i, row in enumerate(rows) if not row["shared"] and i and row["shard"] == rows[i - 1]["shard"]
    )
    contents = SampleChecks(read_manifest(cache), open_index(cache / INDEX, read_manifest(cache).plan), {})
    shard = rows[i]["shard"]
    tensors = load_file(cache / shard_file(shard))
    ids, mask = tensors["input_ids"].numpy(), tensors["loss_mask"].numpy()
    assert contents.problem(shard, ids, mask) is None
    contents._context._shared = contents._context._shared.copy()
    contents._context._shared[i] = 2
    assert f"sample {i} shares rows with one that begins with other tokens" in contents.problem(
        shard, ids, mask
    )


@pytest.mark.parametrize("options", [("--context-codec", "int8"), ("--layers", "1")])
def test_a_conversion_shares_the_same_rows(both, tmp_path, options) -> None:
    layers = CacheReader(both[1]).layer_ids
    options = tuple(str(layers[1]) if word == "1" else word for word in options)
    run_ok("convert", both[1], tmp_path / "new", *options)
    run_ok("verify", tmp_path / "new")
    old, new = CacheReader(both[1]), CacheReader(tmp_path / "new")
    assert new.manifest.plan == old.manifest.plan
    for i in range(len(old)):
        want, got = old.read(i, new.layer_ids), new.read(i)
        limit = 0 if "--layers" in options else 0.02 * want.context.abs().max().item()
        assert (got.context.float() - want.context.float()).abs().max() <= limit
        assert torch.equal(got.last_hidden, want.last_hidden)


def test_statistics_and_figures_of_a_conversion_are_of_the_samples_own_rows(
    both, tmp_path, fp32_target, data
) -> None:
    options = {**EXACT, "context_codec": "int8"}
    run_ok(*arguments(fp32_target, data, tmp_path / "captured", **options), SHARE)
    run_ok("convert", both[1], tmp_path / "new", "--context-codec", "int8")
    captured, new = CacheReader(tmp_path / "captured"), CacheReader(tmp_path / "new")
    for layer in new.layer_ids:
        one, other = (r.codec(f"context.{layer}")._on(torch.device("cpu")) for r in (captured, new))
        # The conversion measures rows in bf16, some of them read in another batch.
        torch.testing.assert_close(one.deviation, other.deviation, rtol=0.01, atol=1e-3)
        torch.testing.assert_close(one.mean, other.mean, rtol=0.01, atol=1e-2)
    figures = new.manifest.fidelity
    assert 0 < figures[f"relative_error.context.{new.layer_ids[0]}_mean"] < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_states_after_a_beginning_are_those_of_the_whole_sample(family, monkeypatch) -> None:
    monkeypatch.setattr("capture.prefixes.STEP", 4)
    generator = np.random.default_rng(0)
    begin = generator.integers(3, V, 9)
    samples = []
    for number, length in enumerate((7, 1, 4)):
        ids = np.concatenate([begin, generator.integers(3, V, length)]).astype(np.int32)
        samples.append(TokenizedSample(number, ids, np.ones(len(ids), np.uint8)))
    engine = HuggingFaceEngine(make_model(family), [0, 2])
    alone = [engine.states([sample]).take_all() for sample in samples]
    engine.share_beginnings(40, RopeLengths())
    computed: list[int] = []
    after_each_forward(monkeypatch, lambda ids, states: computed.append(ids.numel()))
    states = engine.states(samples).take_all()
    if family in RECURRENT:
        assert computed[0] == 8, "of the beginning, which says that it can't carry on"
    else:
        assert computed == [8, 3 * (9 + 7 - 8)], "the beginning, then what follows"
    for key, rows in states.items():
        want = torch.cat([each[key] for each in alone])
        torch.testing.assert_close(rows, want, rtol=1e-4, atol=3e-5 * max(1, want.abs().max().item()))


def test_answers_that_are_not_there_yet_are_refused(fp32_target, data, tmp_path) -> None:
    command = arguments(fp32_target, data, tmp_path / "cache", **EXACT)
    result = run_cli(*command, SHARE, "--engine", "vllm", "--regenerate")
    assert_refused(result, 2, "--share-prefixes needs to know the answers", "dspark regenerate")


def test_a_target_that_keeps_other_things_reads_whole_samples_within_the_limit(monkeypatch) -> None:
    monkeypatch.setattr("capture.prefixes.STEP", 4)
    begin = np.arange(3, 12, dtype=np.int32)
    samples = [
        TokenizedSample(n, np.append(begin, np.full(n, 5, np.int32)), np.ones(9 + n, np.uint8))
        for n in (1, 2, 3, 4)
    ]
    engine = HuggingFaceEngine(make_model("qwen3_next"), [0])
    seen: list[tuple[int, ...]] = []
    after_each_forward(monkeypatch, lambda ids, states: seen.append(tuple(ids.shape)))
    engine.share_beginnings(26, RopeLengths())
    engine.states(samples)
    assert seen == [(1, 8), (2, 11), (2, 13)]
    engine.states(samples)
    assert seen[3:] == [(2, 11), (2, 13)], "it is known by then"
