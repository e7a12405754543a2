"""Shared fixtures: a tiny target, its data, and one cache captured through the command line."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test reaches a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings

from pipeline.cli import cli
from tests import machine
from tests.tiny import make_conversations, make_target

LAYERS = "0,2,4"
EXACT = ("--context-codec", "bf16", "--last-codec", "bf16")
FP32 = ("--dtype", "float32", "--device", "cpu")  # also where bf16 is fast, or a GPU is
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
machine.install()
# The same examples on every machine, and none too slow for a busy one.
settings.register_profile(
    "dspark", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dspark")


def run_cli(*arguments: str | Path) -> Result:
    """Run `dspark ...` in this process; unexpected exceptions are raised, not swallowed."""
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def run_ok(*arguments: str | Path) -> str:
    """Run `dspark ...`, which must succeed, and return its standard output."""
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """One line on stderr, holding every part, and the exit code."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0], f"{part!r} not in {lines[0]!r}"
    assert result.exit_code == code, result.output


_asked_before = 0  # by the tests that are over


@pytest.fixture(scope="session", autouse=True)
def questions_are_noted(tmp_path_factory: pytest.TempPathFactory) -> None:
    machine.note_in(tmp_path_factory.mktemp("machine") / "asked")


@pytest.fixture(autouse=True)
def only_marked_tests_ask_the_processor(request: pytest.FixtureRequest):
    """The mark `capability` is on the tests that ask whether there is bf16, and on no other.

    A fixture of many tests may not ask: it says the precision that it means.
    """
    global _asked_before
    yield
    asked, _asked_before = machine.times_asked() > _asked_before, machine.times_asked()
    marked = request.node.get_closest_marker("capability") is not None
    assert marked or not asked, "asks for bf16 and is not marked `capability`; or say the precision it means"
    assert asked or not marked, "is marked `capability` and never asks for bf16"


@pytest.fixture(scope="session", autouse=True)
def tokens_of_tests_stay_with_them(tmp_path_factory: pytest.TempPathFactory):
    """Tokenised data is kept in a folder of this session, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_TOKENS", str(tmp_path_factory.mktemp("tokens")))
        yield


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "tiny-llama")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=40)


def capture_arguments(target: Path, data: Path, cache: Path) -> list[str | Path]:
    """`dspark capture` with small shards, so that a cache has several, and exact."""
    arguments: list[str | Path] = ["capture", "--target", target, "--data", data, "--cache", cache]
    return [*arguments, "--layers", LAYERS, "--shard-tokens", "512", "--batch-tokens", "256", *EXACT, *FP32]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory, target_dir: Path, data_file: Path) -> Path:
    """A complete cache. Read-only by agreement: tests that change one copy it."""
    cache = tmp_path_factory.mktemp("cache") / "tiny"
    run_ok(*capture_arguments(target_dir, data_file, cache))
    return cache
