"""What a newcomer to `dspark capture` gets wrong first: one line each."""

from __future__ import annotations

import shutil

import pytest

from tests.capture.conftest import arguments
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_conversations


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        ({"layers": "0,6"}, 2, ["6", "6 layers", "-1"]),
        ({"layers": "-2,0"}, 2, ["-2"]),
        ({"layers": "2,1"}, 2, ["increasing"]),
        ({"layers": "1,1"}, 2, ["increasing"]),
        ({"layers": "1,two"}, 2, ["--layers", "1,two"]),
        ({"layers": ""}, 2, ["--layers"]),
        ({"device": "abacus"}, 2, ["abacus"]),
        ({"max_length": 1}, 2, ["--max-length"]),
        ({"batch_tokens": 0}, 2, ["--batch-tokens"]),
        ({"shard_tokens": -5}, 2, ["--shard-tokens"]),
        ({"worker": "2/2"}, 2, ["--worker I/N", "'2/2'"]),
    ],
    ids=str,
)
def test_bad_options(tmp_path, target_dir, data_file, options, code, parts):
    result = run_cli(*arguments(target_dir, data_file, tmp_path / "cache", **options))
    assert_refused(result, code, *parts)
    assert not (tmp_path / "cache").exists()


def test_no_such_target_or_data(tmp_path, target_dir, data_file):
    cache = tmp_path / "cache"
    for target in (tmp_path / "nope", "./nope", "no-such-model", "nobody/no-such-model"):
        assert_refused(
            run_cli(*capture_arguments(target, data_file, cache)), 1, "no such target", str(target)
        )
    for data in (tmp_path / "nope.jsonl", tmp_path):
        assert_refused(run_cli(*capture_arguments(target_dir, data, cache)), 1, "no data file", str(data))
    assert not cache.exists()


def test_target_and_data_come_together(tmp_path, target_dir, data_file):
    for option in (("--target", target_dir), ("--data", data_file)):
        assert_refused(run_cli("capture", "--cache", tmp_path / "c", *option), 2, "--target", "--data")


def test_a_row_without_messages_is_named(tmp_path, target_dir):
    data = make_conversations(tmp_path / "chats.jsonl", count=2)
    with data.open("a") as file:
        file.write('{"text": "hello"}\n')
    result = run_cli(*capture_arguments(target_dir, data, tmp_path / "cache"))
    assert_refused(result, 1, "chats.jsonl:3", "messages", "text")
    assert not (tmp_path / "cache").exists()


def test_target_directories_that_are_no_model(tmp_path, target_dir, data_file):
    def refused(change, *parts: str) -> None:
        folder = tmp_path / "target"
        shutil.copytree(target_dir, folder)
        change(folder)
        assert_refused(run_cli(*capture_arguments(folder, data_file, tmp_path / "cache")), 1, *parts)
        shutil.rmtree(folder)

    refused(lambda folder: (folder / "config.json").unlink(), "config.json")
    refused(lambda folder: (folder / "config.json").write_text("{"), "config.json")
    refused(lambda folder: (folder / "model.safetensors").unlink(), "weights")
    refused(lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "can't be loaded")
    refused(lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer")
    refused(lambda folder: [p.unlink() for p in folder.glob("chat_template*")], "chat template")


@pytest.mark.parametrize(("command", "own"), [("capture", "--worker"), ("plan", "--probe")])
def test_help(command, own):
    output = run_ok(command, "--help")
    for option in ("--target", "--data", "--cache", "--layers", "--max-length", "--batch-tokens", "--force"):
        assert option in output
    assert own in output
