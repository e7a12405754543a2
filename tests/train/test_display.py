"""What a run shows, where: a bar for people, lines for files, silence for the other ranks."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.process import WorkerPlace
from train.runtime.console import Display
from train.runtime.distributed import Ranks

LINE = {
    "step": 20,
    "loss": 1.23456,
    "tau": 1.5,
    "lr": 6e-4,
    "tokens_per_s": 1234.5,
    "data_wait_percent": 2.4,
    "skipped_steps": 0,
}


def ranks(rank: int = 0) -> Ranks:
    return Ranks(WorkerPlace(rank, 2), torch.device("cpu"))


def shown(capsys: pytest.CaptureFixture, display: Display, line: dict) -> str:
    display.stepped()
    display.figures(line)
    display.say("held out")
    display.close()
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_a_file_gets_lines_and_no_bar(capsys) -> None:
    assert shown(capsys, Display(ranks(), 100, 19), LINE) == (
        "step 20/100: loss 1.235, tau 1.500, lr 6.00e-04, tok_s 1234, wait% 2\nheld out\n"
    )


def test_what_there_is_none_of_is_left_out(capsys) -> None:
    line = {**LINE, "loss": None, "tau": None, "skipped_steps": 10}
    assert shown(capsys, Display(ranks(), 100, 19), line).splitlines()[0] == (
        "step 20/100: lr 6.00e-04, tok_s 1234, wait% 2, skipped 10"
    )


def test_a_terminal_gets_a_bar_that_begins_where_the_run_does(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    text = shown(capsys, Display(ranks(), 100, 19), LINE)
    assert "\r" in text
    assert "19/100" in text
    assert "20/100" in text
    assert "loss=1.235" in text
    assert "held out\n" in text
    assert "step 20/100:" not in text


def test_other_ranks_are_silent(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert shown(capsys, Display(ranks(1), 100, 19), LINE) == ""
