"""`dspark capture --engine vllm --regenerate`: the engine answers, and the states of that run are kept."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from capture.data.conversations import TokenizedSample
from capture.one_pass import settle
from capture.one_pass.journal import Journal
from capture.one_pass.turns import Conversation, Turn, longest_lengths, supervised_spans
from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, places, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_conversations
from tests.train.runs import train_arguments, weights_of

EOS = 2
EXACT = {"context_codec": "fp32", "last_codec": "fp32", "layers": "0,3"}


@pytest.fixture(scope="module")
def words(engine_python, fp32_target, few):
    """The words of a one-pass capture."""

    def made(cache: Path, *more: str, **options: Any) -> list[str | Path]:
        usual = {"engine": "vllm", "engine_python": engine_python, "max_new_tokens": 12, **EXACT}
        return [*arguments(fp32_target, few, cache, **{**usual, **options}), "--regenerate", *more]

    return made


@pytest.fixture(scope="module")
def calm(tmp_path_factory, words) -> Path:
    """A cache that nothing disturbed."""
    path = tmp_path_factory.mktemp("cache") / "calm"
    run_ok(*words(path))
    return path


@pytest.fixture(scope="module")
def model(fp32_target):
    return AutoModelForCausalLM.from_pretrained(fp32_target, dtype=torch.float32).eval()


def prompts(target: Path, data: Path, folder: Path) -> dict[int, TokenizedSample]:
    """The data's own samples by row."""
    run_ok(*arguments(target, data, folder, **EXACT))
    return prompts_of(folder)


def shard_rows(cache: Path, name: str) -> torch.Tensor:
    """All rows of a tensor, shard after shard."""
    return torch.cat([load_file(path)[name] for path in sorted((cache / "shards").iterdir())])


@torch.no_grad()
def test_answers_are_the_targets_and_states_those_of_a_second_pass(tmp_path, words, model):
    run_ok(*words(tmp_path / "cache", temperature=0))
    reader = CacheReader(tmp_path / "cache")
    token = label = answers = 0
    context = [shard_rows(tmp_path / "cache", f"context.{i}") for i in (0, 3)]
    last = shard_rows(tmp_path / "cache", "last_hidden")
    for i in range(len(reader)):
        sample = reader.read(i)
        ids, mask = sample.input_ids, sample.loss_mask.numpy()
        for start, end in supervised_spans(mask):
            new = end - start
            wanted = model.generate(
                ids[None, :start].long(),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=EOS,
            )[0, start:]
            assert ids[start:end].tolist() == wanted.tolist()
            assert new == 12 or ids[end - 1] == EOS
            answers += 1
        assert mask[-1] == 1, "a sample ends with its last answer"
        found = model(ids[None].long(), output_hidden_states=True, use_cache=False).hidden_states
        rows = slice(token, token + len(ids))
        for got, layer in zip(context, (0, 3), strict=True):
            torch.testing.assert_close(got[rows][:-1], found[layer + 1][0, :-1], rtol=1e-4, atol=2e-5)
            assert not got[rows][-1].any(), "no forward read the last token"
        labels = np.flatnonzero(mask[1:])
        torch.testing.assert_close(
            last[label : label + len(labels)], found[-1][0, labels], rtol=1e-4, atol=2e-5
        )
        token, label = token + len(ids), label + len(labels)
    assert answers > 20
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.fidelity["second_pass_error_mean"] < 1e-5
    assert manifest.identity.data.settings["regenerate"].startswith("max_new_tokens=12 temperature=0.0")
    assert "all good" in run_ok("verify", tmp_path / "cache")
    assert "second_pass_error" in run_ok("inspect", tmp_path / "cache")
    assert not (tmp_path / "cache" / "progress").exists()


def test_a_plan_says_that_its_sizes_are_bounds(tmp_path, words):
    asked = words(tmp_path / "cache")
    found = run_ok("plan", *asked[1:])
    assert "run by vllm 0.0\n" in found
    assert "answers of its own (max_new_tokens=12 " in found
    assert "upper bounds" in found
    assert not (tmp_path / "cache").exists()


def test_what_is_not_supervised_stays(tmp_path, calm, fp32_target, few):
    own = prompts(fp32_target, few, tmp_path / "own")
    assert len(CacheReader(calm)) == len(own)
    for row, sample in prompts_of(calm).items():
        kept = own[row].input_ids[own[row].loss_mask == 0]
        spans = supervised_spans(sample.loss_mask)
        assert len(spans) == len(supervised_spans(own[row].loss_mask))
        others = [int(t) for t, m in zip(sample.input_ids, sample.loss_mask, strict=True) if not m]
        # Where an answer was not ended by the target, the template's end of the turn follows, not supervised.
        ends = [end for _, end in spans[:-1] if sample.input_ids[end - 1] != EOS]
        for end in reversed(ends):
            place = int((sample.loss_mask[:end] == 0).sum())
            assert others.pop(place) == EOS
        assert others == kept.tolist()


def prompts_of(cache: Path) -> dict[int, TokenizedSample]:
    """A cache's samples by row."""
    rows = [row for _, row in places(cache)]
    reader = CacheReader(cache)
    found = {}
    for i, row in enumerate(rows):
        sample = reader.read(i)
        ids, mask = sample.input_ids.numpy(), sample.loss_mask.numpy()
        found[row] = TokenizedSample(row, ids.astype(np.int32), mask.astype(np.uint8))
    return found


def test_killed_it_goes_on_to_the_same_bytes(tmp_path, words, calm):
    process = Dspark(tmp_path / "process", *words(tmp_path / "cache"))
    assert process.wait_until(lambda: finished_shards(tmp_path / "cache"))
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_ok(*words(tmp_path / "cache"))
    assert tree(tmp_path / "cache") == tree(calm)


def test_an_answer_on_disk_is_not_sampled_again(tmp_path, words, calm, monkeypatch):
    """An engine that answers differently the second time."""
    process = Dspark(tmp_path / "process", *words(tmp_path / "cache"))
    first = tmp_path / "cache" / "progress" / "answers-00000.jsonl"
    assert process.wait_until(lambda: first.exists() and first.read_bytes().count(b"\n") > 2)
    process.send(signal.SIGKILL)
    process.wait()
    finished = set(finished_shards(tmp_path / "cache"))
    kept = [json.loads(line) for line in first.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    monkeypatch.setenv("SALT", "1")
    run_ok(*words(tmp_path / "cache"))
    calm, found = prompts_of(calm), prompts_of(tmp_path / "cache")
    assert any(calm[row].input_ids.tolist() != found[row].input_ids.tolist() for row in calm)
    reader = CacheReader(tmp_path / "cache")
    for record in kept:  # the first shard's samples are the first of the index
        sample = reader.read(record["sample"])
        start, end = supervised_spans(sample.loss_mask.numpy())[record["turn"]]
        assert sample.input_ids[start:end].tolist() == record["tokens"]
    assert len(kept) > 2 or finished


def test_the_finished_cache_is_reused_by_the_same_command_alone(
    tmp_path, words, engine_python, fp32_target, few
):
    run_ok(*words(tmp_path / "cache"))
    assert "already complete" in run_ok(*words(tmp_path / "cache"))
    result = run_cli(*words(tmp_path / "cache", temperature=0))
    assert_refused(result, 1, "data.settings.regenerate", "temperature=0.7", "temperature=0.0")
    plain = arguments(
        fp32_target, few, tmp_path / "cache", engine="vllm", engine_python=engine_python, **EXACT
    )
    assert_refused(run_cli(*plain), 1, "data.settings.prompts")


def test_states_that_a_second_pass_does_not_give_are_refused(tmp_path, words, monkeypatch):
    monkeypatch.setenv("FAULT", "answers differ")
    result = run_cli(*words(tmp_path / "cache"))
    assert_refused(result, 1, "is not that of a second pass over the same tokens")


def test_answers_of_one_token_are_skipped(tmp_path, words):
    assert_refused(run_cli(*words(tmp_path / "cache", max_new_tokens=1)), 1, "would hold no sample")


def test_a_prompt_that_the_engine_fails_on_is_a_bad_sample(tmp_path, words, fp32_target, few, monkeypatch):
    own = prompts(fp32_target, few, tmp_path / "own")
    starts = {row: supervised_spans(sample.loss_mask)[0][0] for row, sample in own.items()}
    row = next(row for row, start in starts.items() if list(starts.values()).count(start) == 1)
    monkeypatch.setenv("FAULT", "refuses")
    monkeypatch.setenv("FAULT_AT", str(starts[row]))
    result = run_cli(*words(tmp_path / "cache"))
    assert_refused(result, 1, f"the engine fails on the sample at row {row + 1} of", "--bad-states skip")
    run_ok(*words(tmp_path / "cache", "--bad-states", "skip"))
    skipped = read_manifest(tmp_path / "cache").skipped
    assert (skipped.source_row, skipped.reason) == ((row,), ("fails in the engine",))
    assert len(CacheReader(tmp_path / "cache")) == len(own) - 1
    assert "all good" in run_ok("verify", tmp_path / "cache")


def test_a_short_answer_is_passed_over(tmp_path, words, fp32_target, few, monkeypatch):
    """One that the target ended at once: no label of it has another beside it."""
    own = prompts(fp32_target, few, tmp_path / "own")
    spans = {row: supervised_spans(sample.loss_mask) for row, sample in own.items()}
    rows = [row for row, found in spans.items() if len(found) == 1]
    start = spans[rows[0]][0][0]
    rows = sorted(row for row in rows if spans[row][0][0] == start)
    monkeypatch.setenv("FAULT", "ends at once")
    monkeypatch.setenv("FAULT_AT", str(start))
    run_ok(*words(tmp_path / "cache"))
    manifest = read_manifest(tmp_path / "cache")
    reason = "answered in fewer than two tokens"
    assert sorted(manifest.skipped.source_row) == rows
    assert manifest.skipped.counts() == {reason: len(rows)}
    assert manifest.rows[f"dropped: {reason}"] == len(rows)
    assert len(CacheReader(tmp_path / "cache")) == len(own) - len(rows)
    assert "all good" in run_ok("verify", tmp_path / "cache")


def test_a_run_does_not_read_the_missing_row(tmp_path, calm):
    for name in ("cache", "other"):
        shutil.copytree(calm, tmp_path / name)
    reader = CacheReader(tmp_path / "other")
    ends = np.cumsum([len(reader.read(i).input_ids) for i in range(len(reader))])
    first = 0
    for path in sorted((tmp_path / "other" / "shards").iterdir()):
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        size = len(tensors["input_ids"])
        for name in ("context.0", "context.3"):
            rows = [end - 1 - first for end in ends.tolist() if first < end <= first + size]
            assert not tensors[name][rows].any()
            tensors[name][rows] = 1000.0
        save_file(tensors, path)
        first += size
    options = {"train__max_steps": 3, "train__eval_every": 3, "train__log_every": 3}
    for name in ("cache", "other"):
        run_ok(*train_arguments(tmp_path / name, tmp_path / f"run-{name}", **options))
    expected, weights = weights_of(tmp_path / "run-cache"), weights_of(tmp_path / "run-other")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_transformers_answers_first_and_captures_then(tmp_path, fp32_target):
    data = make_conversations(tmp_path / "data.jsonl", count=6, seed=3)
    words = arguments(fp32_target, data, tmp_path / "cache", max_new_tokens=8, temperature=0)
    result = run_cli(*words, "--regenerate")
    assert result.exit_code == 0, result.output
    assert "answers first" in result.stderr
    assert (tmp_path / "cache.answers.jsonl").exists()
    assert len(CacheReader(tmp_path / "cache")) == 6
    assert "already complete" in run_ok(*words, "--regenerate")


def test_options_without_effect(tmp_path, words, fp32_target, few):
    shuffled = arguments(fp32_target, few, tmp_path / "cache", num_samples=3)
    assert_refused(run_cli(*shuffled, "--regenerate", "--shuffle"), 2, "--shuffle", "dspark regenerate")
    plain = arguments(fp32_target, few, tmp_path / "cache", temperature=0.5)
    assert_refused(run_cli(*plain), 2, "--temperature", "--regenerate")
    assert_refused(run_cli(*words(tmp_path / "cache", "--mask-reasoning")), 2, "--mask-reasoning")


def made(ids: list[int], mask: list[int]) -> TokenizedSample:
    return TokenizedSample(0, np.array(ids, np.int32), np.array(mask, np.uint8))


def test_turns_by_hand():
    sample = made([5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 0, 1, 1, 0, 0, 1, 1, 1])
    conversation = Conversation(sample, max_length=12, max_new_tokens=4)
    assert conversation.prompt().tolist() == [5, 6]
    assert not conversation.at_last_turn
    conversation.answers.append(Turn((20, 21, 2), finished=True))
    assert conversation.prompt().tolist() == [5, 6, 20, 21, 2, 9, 10]
    assert (conversation.at_last_turn, conversation.room(conversation.prompt())) == (True, 4)
    conversation.answers.append(Turn((30,), finished=False))
    assert conversation.prompt() is None
    answered, _ = conversation.answered()
    assert answered.input_ids.tolist() == [5, 6, 20, 21, 2, 9, 10, 30]
    assert answered.loss_mask.tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    assert longest_lengths([sample], 100, 4).tolist() == [4 + 2 * 5]


def test_an_answer_that_was_cut_is_ended_by_the_template():
    sample = made([5, 6, 7, 8, 9, 10, 11], [0, 0, 1, 1, 0, 1, 1])
    conversation = Conversation(sample, max_length=100, max_new_tokens=2)
    conversation.answers.append(Turn((20, 21), finished=False))
    assert conversation.prompt().tolist() == [5, 6, 20, 21, 8, 9]
    assert conversation.answered()[0].input_ids.tolist() == [5, 6, 20, 21]


def test_a_turn_that_does_not_fit_is_left_out():
    sample = made([5, 6, 7, 8, 9, 10, 11], [0, 0, 1, 1, 0, 1, 1])
    conversation = Conversation(sample, max_length=6, max_new_tokens=4)
    assert conversation.room(conversation.prompt()) == 4
    conversation.answers.append(Turn((20, 21, 22, 23), finished=True))
    assert conversation.prompt() is None
    assert conversation.answered()[0].input_ids.tolist() == [5, 6, 20, 21, 22, 23]


def test_a_torn_journal_is_cut(tmp_path):
    sample = made([5, 6, 7, 8], [0, 0, 1, 1])
    path = tmp_path / "answers.jsonl"
    Journal(path).add(0, Conversation(sample, 100, 4), Turn((20, 2), finished=True))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"sample": 1, "turn": 0, "tok')
    both = [Conversation(sample, 100, 4) for _ in range(2)]
    Journal(path).read(both)
    assert (both[0].answers, both[1].answers) == ([Turn((20, 2), finished=True)], [])
    assert path.read_bytes() == whole


def test_the_first_of_two_answers_holds(tmp_path):
    sample = made([5, 6, 7, 8], [0, 0, 1, 1])
    path = tmp_path / "answers.jsonl"
    for tokens in ((20, 2), (21, 22, 2)):
        Journal(path).add(0, Conversation(sample, 100, 4), Turn(tokens, finished=True))
    conversation = Conversation(sample, 100, 4)
    Journal(path).read([conversation])
    assert conversation.answers == [Turn((20, 2), finished=True)]


def test_a_shard_of_other_answers_is_written_again(tmp_path, words, calm, monkeypatch):
    """As if two processes had owned it, and the one whose answers came second had published it."""
    real, changed = settle.answered_samples, []

    def other(prepared, shard, path):
        if not changed:
            lines = path.read_text().splitlines()
            record = json.loads(lines[0])
            lines[0] = json.dumps({**record, "tokens": [*record["tokens"][:-1], record["tokens"][-1] ^ 1]})
            path.write_text("".join(f"{line}\n" for line in lines))
            changed.append(shard)
        return real(prepared, shard, path)

    monkeypatch.setattr(settle, "answered_samples", other)
    run_ok(*words(tmp_path / "cache"))
    assert "all good" in run_ok("verify", tmp_path / "cache")
    calm, found = prompts_of(calm), prompts_of(tmp_path / "cache")
    differing = [row for row in calm if calm[row].input_ids.tolist() != found[row].input_ids.tolist()]
    assert len(differing) == 1
