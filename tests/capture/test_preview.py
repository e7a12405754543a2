"""`dspark preview`: what is supervised, how much, and how long everything is."""

from __future__ import annotations

import re

import click
import numpy as np
import pytest
from click.testing import CliRunner

from capture.data.summary import histogram
from pipeline.cli import cli
from tests.capture.test_tokens import talk, write
from tests.conftest import FP32, assert_refused, run_cli, run_ok


@pytest.mark.capability
def test_samples_and_summary(tmp_path, target_dir):
    path = write(tmp_path / "a.jsonl", talk("the sky is blue"), "", talk("two", "plus two"), talk("a mat"))
    said = run_ok("preview", "--target", target_dir, "--data", path, "--count", "2")
    assert "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nthe sky is blue<|im_end|>" in said
    assert f"== {path}:1: " in said
    assert f"== {path}:3: " in said
    assert f"{path}:4" not in said
    assert "rows: captured 3, read 3" in said
    total, labels, share = re.search(
        r"^3 samples, (\d+) tokens, (\d+) of them supervised \((\d+)%\)$", said, re.MULTILINE
    ).groups()
    assert 0 < int(labels) < int(total)
    assert int(share) == round(100 * int(labels) / int(total))
    assert "\x1b[" not in said, "no colours where the output is no terminal"


@pytest.mark.capability
def test_supervised_tokens_are_coloured_on_a_terminal(tmp_path, target_dir):
    path = write(tmp_path / "a.jsonl", talk("the sky"))
    arguments = ["preview", "--target", str(target_dir), "--data", str(path)]
    said = CliRunner().invoke(cli, arguments, color=True).stdout
    assert click.style("the sky<|im_end|>", fg="green") in said
    assert click.unstyle(said) == run_ok(*arguments)


@pytest.mark.capability
def test_one_row(tmp_path, target_dir):
    path = write(tmp_path / "a.jsonl", talk("the sky"), "", talk("a mat"))
    said = run_ok("preview", "--target", target_dir, "--data", path, "--row", "3")
    assert "a mat<|im_end|>" in said
    assert "the sky" not in said
    result = run_cli("preview", "--target", target_dir, "--data", path, "--row", "2")
    assert_refused(result, 2, f"{path}:2", "empty line")


def test_a_sample_and_the_summary_count_the_same_tokens(tmp_path, target_dir):
    """Nothing predicts the first token of a text, all of which is supervised."""
    path = write(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"}, {"text": "ab c"})
    said = run_ok("preview", "--target", target_dir, *FP32, "--data", path)
    (own,) = re.findall(r"== .*:3: (\d+ tokens, \d+) supervised", said)
    (whole,) = re.findall(r"^1 samples, (\d+ tokens, \d+) of them supervised", said, re.MULTILINE)
    assert own == whole
    assert "captured 1, dropped: no two supervised tokens in a row 2, read 3" in said


def test_histogram_counts_everything_once():
    lengths = np.array([3, 4, 7, 8, 8, 100])
    lines = list(histogram(lengths))
    counts = [int(re.search(r"to +[\d,]+ +(\d+)", line)[1]) for line in lines]
    assert counts == [1, 2, 2, 0, 0, 1]
