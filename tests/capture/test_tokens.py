"""Every row is accounted for, tokenised once, and chosen as asked."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import capture.data.tokens as tokens
from capture.data.conversations import RowTokenizer
from capture.data.sources import open_sources
from capture.data.tokens import Selection, TokenizedData, _only_one, load_data
from pipeline.chat.template import ChatTemplate
from pipeline.errors import DataError
from tests.capture.templates import DATED
from tests.conftest import FP32, assert_refused, capture_arguments, run_cli, run_ok
from tests.machine import obeying_permissions
from tests.tiny import CHATML, make_conversations, make_tokenizer

TOKENIZER = make_tokenizer(CHATML)


def talk(*answers: str) -> dict[str, Any]:
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "why"}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def load(path: Path | list[Path], workers: int | None = 1, **options: Any) -> TokenizedData:
    names = ("max_length", "too_long", "supervise", "mask_reasoning")
    tokenize = RowTokenizer(
        template=ChatTemplate(TOKENIZER),
        vocab_size=400,
        **{name: options.pop(name) for name in names if name in options},
    )
    paths = path if isinstance(path, list) else [path]
    return load_data(
        open_sources([str(p) for p in paths]), tokenize, "tiny", Selection(**options), workers=workers
    )


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ids(data: TokenizedData) -> list[bytes]:
    return [sample.sample_id for sample in data]


# What a row can be, and where it must be counted.
KINDS = {
    "good": (lambda i: talk(f"yes {i}"), "captured"),
    "again": (lambda i: talk("the same as ever"), None),  # the first is captured, the others are duplicates
    "unanswered": (
        lambda i: {"messages": [{"role": "user", "content": str(i)}]},
        "dropped: no assistant turn",
    ),
    "no JSON": (lambda i: "{" + str(i), "dropped: bad row, not JSON"),
    "a list": (lambda i: f"[{i}]", "dropped: bad row, not a JSON object"),
    "another form": (lambda i: {"text": str(i)}, "dropped: bad row, another form"),
    "no role": (lambda i: {"messages": [{"content": str(i)}]}, "dropped: bad row, malformed message"),
    "no messages": (lambda i: {"messages": []}, "dropped: bad row, no messages"),
    "empty line": (lambda i: "", "not a row"),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(list(KINDS)), max_size=30))
def test_rows_read_are_captured_or_dropped_for_a_named_reason(tmp_path, kinds):
    kinds = ["good", *kinds]  # so that there is something to capture, and the form is told by it
    path = write(tmp_path / "mixed.jsonl", *(KINDS[kind][0](i) for i, kind in enumerate(kinds)))
    data = load(path, bad_rows="skip")
    found = Counter(data.rows)
    assert found["read"] == sum(kind != "empty line" for kind in kinds)
    assert found["read"] == found["captured"] + sum(n for r, n in found.items() if r.startswith("dropped: "))
    again = kinds.count("again")
    assert found["captured"] == len(data) == kinds.count("good") + min(again, 1)
    assert found["dropped: a duplicate"] == max(again - 1, 0)
    for kind, (_, reason) in KINDS.items():
        if reason and reason.startswith("dropped"):
            assert sum(n for r, n in found.items() if r.startswith(reason)) == kinds.count(kind)
    bad = [i for i, kind in enumerate(kinds) if (KINDS[kind][1] or "").startswith("dropped: bad row")]
    assert [problem.split(": ")[0] for problem in data.problems] == [f"{path}:{i + 1}" for i in bad[:5]]
    if bad:
        with pytest.raises(DataError, match=rf"mixed\.jsonl:{bad[0] + 1}: "):
            load(path)


def test_skipped_rows_are_printed_and_counted_in_the_manifest(tmp_path, target_dir):
    rows = [talk("yes no yes"), *["{"] * 7, talk("no yes no")]
    path = write(tmp_path / "bad.jsonl", *rows)
    arguments = [*capture_arguments(target_dir, path, tmp_path / "cache")]
    assert_refused(run_cli(*arguments), 1, "bad.jsonl:2", "not JSON")
    result = run_cli(*arguments, "--bad-rows", "skip")
    assert result.exit_code == 0, result.output
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped")]
    assert [line[: len("skipped ") + len(str(path)) + 2] for line in skipped[:5]] == [
        f"skipped {path}:{i}" for i in range(2, 7)
    ]
    assert skipped[5] == "skipped 2 more bad rows"
    rows = json.loads((tmp_path / "cache/manifest.json").read_text())["rows"]
    assert rows == {"read": 9, "captured": 2, "dropped: bad row, not JSON": 7}


def test_workers_give_what_one_process_gives(tmp_path, monkeypatch):
    path = make_conversations(tmp_path / "many.jsonl", count=300)
    alone = load(path)
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(tokens, "FEW_ROWS", tokens.CHUNK_ROWS)
    shared = load(path, workers=2)
    assert ids(shared) == ids(alone)
    for name, column in vars(alone.facts).items():
        assert np.array_equal(getattr(shared.facts, name), column), name
    for a, b in zip(alone, shared, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.loss_mask, b.loss_mask)


def test_a_bad_row_that_a_worker_meets_is_named(tmp_path, monkeypatch):
    path = make_conversations(tmp_path / "many.jsonl", count=200)
    with path.open("a") as file:
        file.write("{\n")
    monkeypatch.setattr(tokens, "FEW_ROWS", tokens.CHUNK_ROWS)
    with pytest.raises(DataError, match=r"many\.jsonl:201: not JSON"):
        load(path, workers=2)


def test_tokens_are_kept_by_content_and_settings(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setenv("DSPARK_TOKENS", str(kept))
    path = write(tmp_path / "a.jsonl", talk("yes yes"), talk("no no no"))
    first = load(path)
    calls = []
    real = RowTokenizer.tokenize
    monkeypatch.setattr(RowTokenizer, "tokenize", lambda self, x: calls.append(x) or real(self, x))
    (tmp_path / "moved").mkdir()
    again = load(path.rename(tmp_path / "moved/b.jsonl"))
    assert ids(again) == ids(first)
    assert not calls
    load(tmp_path / "moved/b.jsonl", max_length=4095)
    assert len(calls) == 2
    write(tmp_path / "moved/b.jsonl", talk("yes yes"), talk("no no yes"))
    assert ids(load(tmp_path / "moved/b.jsonl")) != ids(first)
    assert len(calls) == 4
    assert len(list(kept.glob("*.arrow"))) == 3


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_home_that_nobody_may_write_names_the_variable(tmp_path, target_dir, monkeypatch, variable):
    path = write(tmp_path / "a.jsonl", talk("yes yes"))
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    for name in ("DSPARK_TOKENS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(home))
    with obeying_permissions():
        result = run_cli("preview", "--target", target_dir, "--data", path, *FP32)
    folder = home / (".cache" if variable == "HOME" else "") / "dspark" / "tokens"
    assert_refused(result, 1, str(folder), "Permission denied", "$DSPARK_TOKENS")
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "tokens"))
    with obeying_permissions():
        assert "1 samples" in run_cli("preview", "--target", target_dir, "--data", path, *FP32).stdout


def test_a_folder_of_tokens_that_became_read_only(tmp_path, target_dir, monkeypatch):
    """Kept tokens are used; new ones are refused in one line."""
    kept = tmp_path / "kept"
    monkeypatch.setenv("DSPARK_TOKENS", str(kept))
    path = write(tmp_path / "a.jsonl", talk("yes yes"))
    first = ids(load(path))
    kept.chmod(0o500)
    try:
        with obeying_permissions():
            assert ids(load(path)) == first
            other = write(tmp_path / "b.jsonl", talk("no no no"))
            result = run_cli("preview", "--target", target_dir, "--data", other, *FP32)
    finally:
        kept.chmod(0o700)
    assert_refused(result, 1, str(kept), "Permission denied", "$DSPARK_TOKENS")


def test_no_home_at_all_names_the_variable(tmp_path, target_dir, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DSPARK_TOKENS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    path = write(tmp_path / "a.jsonl", talk("yes yes"))
    monkeypatch.setattr(Path, "home", unknown)
    result = run_cli("preview", "--target", target_dir, "--data", path, *FP32)
    assert_refused(result, 1, "$HOME is not set", "$DSPARK_TOKENS")


def test_a_damaged_file_of_tokens_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "kept"))
    path = write(tmp_path / "a.jsonl", talk("yes yes"), talk("no no no"))
    first = ids(load(path))
    (kept,) = (tmp_path / "kept").glob("*.arrow")
    for damage in (b"", kept.read_bytes()[:100], b"nonsense" * 100):
        kept.write_bytes(damage)
        assert ids(load(path)) == first


def test_a_kept_sample_that_was_damaged_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "kept"))
    path = write(tmp_path / "a.jsonl", talk("yes yes"), talk("no no no"))
    first = load(path)
    (kept,) = (tmp_path / "kept").glob("*.arrow")
    words, before = first[0].input_ids.tobytes(), ids(first)
    data = kept.read_bytes()
    assert data.count(words) == 1
    kept.write_bytes(data.replace(words, words[:-4] + b"\7\0\0\0"))
    with pytest.raises(DataError, match="was damaged and is removed"):
        load(path)[0]
    assert ids(load(path)) == before


def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "kept"))
    path = write(tmp_path / "a.jsonl", *(talk(f"yes {i}") for i in range(9)))
    sources = open_sources([str(path)])
    tokenize = RowTokenizer(template=ChatTemplate(TOKENIZER), vocab_size=400)
    write(path, talk("yes 0"))
    with pytest.raises(DataError, match="changed while it was read"):
        load_data(sources, tokenize, "tiny", Selection())
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.capability
def test_preview_and_capture_tokenise_once(tmp_path, target_dir, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "kept"))
    path = write(tmp_path / "a.jsonl", talk("yes yes yes"))
    template = tmp_path / "template.jinja"
    template.write_text(CHATML + " ")
    run_ok("preview", "--target", target_dir, "--data", path, "--chat-template", template)
    run_ok(*capture_arguments(target_dir, path, tmp_path / "cache"), "--chat-template", template)
    assert len(list((tmp_path / "kept").glob("*.arrow"))) == 1


def test_a_capture_of_several_days_prints_one_date(tmp_path, target_dir, monkeypatch):
    path = write(tmp_path / "a.jsonl", talk("yes yes yes"))
    template = tmp_path / "template.jinja"
    template.write_text(DATED)
    arguments = [*capture_arguments(target_dir, path, tmp_path / "cache"), "--chat-template", template]
    run_ok(*arguments)
    manifest = tmp_path / "cache/manifest.json"
    said = json.loads(manifest.read_text())["identity"]["data"]["settings"]["today"]
    tomorrow = datetime.date.fromisoformat(said) + datetime.timedelta(days=1)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return tomorrow

    monkeypatch.setattr("pipeline.chat.template.datetime.date", Tomorrow)
    assert "already complete" in run_ok(*arguments)


def test_a_failed_reading_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_TOKENS", str(tmp_path / "kept"))
    path = write(tmp_path / "a.jsonl", talk("yes yes"), "{")
    with pytest.raises(DataError):
        load(path)
    assert not list((tmp_path / "kept").iterdir())


def test_num_samples_takes_the_first_and_reads_no_further(tmp_path):
    rows = [talk(f"yes {i}") for i in range(5)]
    path = write(tmp_path / "a.jsonl", rows[0], rows[0], *rows[1:], "not even JSON")
    data = load(path, num_samples=3)
    assert [sample.source_row for sample in data] == [0, 2, 3]
    assert data.rows == {"read": 4, "captured": 3, "dropped: a duplicate": 1}


def test_shuffle_is_seeded_and_chooses_before_num_samples(tmp_path):
    path = write(tmp_path / "a.jsonl", *(talk(f"yes {i}") for i in range(40)))
    whole = load(path, shuffle=True, seed=1)
    rows = [sample.source_row for sample in whole]
    assert sorted(rows) == list(range(40)) != rows
    assert ids(load(path, shuffle=True, seed=1)) == ids(whole)
    assert ids(load(path, shuffle=True, seed=2)) != ids(whole)
    few = load(path, shuffle=True, seed=1, num_samples=7)
    assert ids(few) == ids(whole)[:7]
    assert few.rows == {"read": 40, "captured": 7, "dropped: beyond --num-samples": 33}


def test_min_supervised_and_too_long(tmp_path):
    path = write(tmp_path / "a.jsonl", talk("yes"), talk("yes no yes no"), talk("the cat sat " * 9))
    lengths = [int(sample.loss_mask.sum()) for sample in load(path)]
    floor = lengths[1]
    data = load(path, min_supervised=floor)
    assert [sample.source_row for sample in data] == [1, 2]
    assert data.rows[f"dropped: fewer than {floor} supervised tokens"] == 1
    longest = max(len(sample.input_ids) for sample in load(path))
    data = load(path, max_length=longest - 2, too_long="drop")
    assert [sample.source_row for sample in data] == [0, 1]
    assert data.rows["dropped: longer than --max-length"] == 1
    assert len(load(path, max_length=longest - 2)) == 3


def test_duplicates_across_sources(tmp_path):
    a = write(tmp_path / "a.jsonl", talk("yes yes"))
    b = write(tmp_path / "b.jsonl", talk("yes yes"), talk("no no"))
    data = load([a, b])
    facts = data.facts
    assert list(zip(facts.sources, facts.source_rows, strict=True)) == [(0, 0), (1, 1)]
    assert data.rows["dropped: a duplicate"] == 1


@pytest.mark.capability
def test_options_reach_the_samples_from_the_command_line(tmp_path, target_dir):
    rows = [talk(f"<think>hm {i}</think>yes {i}", f"no {i}") for i in range(9)]
    path = write(tmp_path / "a.jsonl", *rows)
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("'<|im_end|>'", "(mark or '') + '<|im_end|>'"))
    options = ["--supervise", "last", "--mask-reasoning", "--num-samples", "4", "--shuffle", "--seed", "3"]
    options += ["--chat-template", template, "--template-arg", "mark=!", "--format", "messages"]
    run_ok(*capture_arguments(target_dir, path, tmp_path / "cache"), *options)
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["rows"] == {"read": 9, "captured": 4, "dropped: beyond --num-samples": 5}
    said = manifest["identity"]["data"]["settings"]
    assert said["supervise"] == "last"
    assert (said["chat_template"], said["template_arg"], said["seed"]) == ("template.jinja", "mark=!", "3")
    result = run_cli("preview", "--target", target_dir, "--data", path, *options)
    assert "no " in result.stdout
    assert "!<|im_end|>" in result.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--template-arg", "loud"], ["--template-arg name=value", "'loud'"]),
        (["--template-arg", "tools=1"], ["--template-arg tools"]),
        (["--data", ""], ["--data is empty"]),
        (["--chat-template", "missing.jinja"], ["--chat-template missing.jinja"]),
        (["--format", "sharegpt"], ["--format"]),
        (["--num-samples", "0"], ["--num-samples"]),
        (["--split", "train"], ["--split"]),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(tmp_path, target_dir, data_file, option, words):
    command = [*capture_arguments(target_dir, data_file, tmp_path / "cache"), *option]
    assert_refused(run_cli(*command), 2, *words)
    assert not (tmp_path / "cache").exists()


def test_one_process_at_a_time_tokenises_also_when_one_waits_for_a_removed_lock(tmp_path):
    """The second waits for the first one's file; the third comes after that file was removed."""
    inside, most = [], []

    def work(start: float, hold: float) -> None:
        time.sleep(start)
        with _only_one(tmp_path / "x.lock"):
            inside.append(None)
            most.append(len(inside))
            time.sleep(hold)
            inside.pop()

    threads = [threading.Thread(target=work, args=pair) for pair in ((0, 0.1), (0.04, 0.2), (0.16, 0.05))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert not (tmp_path / "x.lock").exists()
