"""Every stage computes in bf16 where the CPU has it, else in fp32: on this machine, and on the other kind.

All else that tests compute says its precision, so that figures and bytes are the same everywhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pipeline.cache import read_manifest
from pipeline.device import native_bf16
from tests import machine
from tests.capture.conftest import tree
from tests.conftest import LAYERS, run_ok
from tests.processes import Dspark, one_thread
from tests.train.runs import lines_of, train_arguments

CPU = ("--device", "cpu")


@pytest.mark.capability
def test_nobody_says_a_precision(tmp_path: Path, target_dir: Path, data_file: Path) -> None:
    bf16 = native_bf16(torch.device("cpu"))
    named, precision = ("bfloat16", "bf16") if bf16 else ("float32", "fp32")
    cache, run = tmp_path / "cache", tmp_path / "run"
    capture = ("capture", "--target", target_dir, "--data", data_file, "--layers", LAYERS, *CPU)
    plan = run_ok("plan", *capture[1:], "--cache", cache)
    assert plan.startswith(f"tiny-llama (LlamaForCausalLM, {named}), ")
    run_ok(*capture, "--cache", cache)
    assert read_manifest(cache).identity.target.dtype == named
    # A process that a test starts is told the same about the machine.
    other = Dspark(tmp_path / "out", *capture, "--cache", tmp_path / "other", before=one_thread)
    assert other.wait() == 0, other.err
    assert tree(tmp_path / "other") == tree(cache)
    run_ok(*train_arguments(cache, run, train__precision="auto", train__max_steps=10))
    page = json.loads((run / "latest" / "training.json").read_text())
    assert page["machine"]["precision"] == precision
    assert all(0 < line["loss"] < 100 for line in lines_of(run) if "loss" in line)
    figures = json.loads(run_ok("evaluate", "--cache", cache, "--run", run, "--json", *CPU))
    assert 1 < figures["tau"] < 4
    decoding = ("--num-prompts", "1", "--max-new-tokens", "8", "--temperature", "0", "--json")
    live = json.loads(
        run_ok("speculate", "--target", target_dir, "--run", run, "--cache", cache, *CPU, *decoding)
    )
    assert live["dtype"] == named


@pytest.mark.capability
def test_the_answer_is_the_one_that_was_asked_for() -> None:
    """Else `make test-flipped` would show nothing."""
    truth = machine.truth()
    answers = {None: truth, "yes": True, "no": False, "flip": not truth}
    assert native_bf16(torch.device("cpu")) == answers[os.environ.get("DSPARK_TEST_BF16")]
