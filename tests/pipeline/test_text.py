"""Text for people: errors in one line, and tables."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text import one_line, reason, table


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("one\n\n  two\tthree "), "one two three"),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("name"), "'name'"),
        ({"code": 1}, "{'code': 1}"),
        ("", "str"),
    ],
)
def test_an_error_in_one_line(error, line):
    assert one_line(error) == line


@given(st.text(), st.integers(1, 300))
def test_a_line_is_one_and_no_longer_than_its_limit(text, limit):
    for line, most in (one_line(text, limit), limit), (one_line(text), 200):
        assert len(line) <= max(most, len("str"))
        assert len(line.splitlines()) == 1


def test_without_a_limit_every_word_is_kept():
    words = "word\n" * 300
    assert one_line(words, limit=None).split() == words.split()
    assert len(one_line(words)) == 200


def test_the_systems_words_are_the_reason_where_it_has_some():
    with pytest.raises(FileNotFoundError) as caught:
        open("/nowhere/at all")  # noqa: PTH123, SIM115
    assert reason(caught.value) == "No such file or directory"
    assert reason(OSError("not a\nplain file")) == "not a plain file"
    assert reason(RuntimeError()) == "RuntimeError"


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("", "bytes", "cache", ""), ("bf16", "30,720", "38.00 TB", "chosen"), ("nf4", "9", "", "")]
    assert list(table(rows, left={0, 3})) == [
        "       bytes     cache",
        "bf16  30,720  38.00 TB  chosen",
        "nf4        9",
    ]
    assert list(table([("a", "bb"), ("ccc", "d")])) == ["a    bb", "ccc   d"]
    assert list(table([])) == []


def test_rows_of_a_table_are_equally_long():
    with pytest.raises(ValueError, match="shorter"):
        list(table([("a", "b"), ("c",)]))


def test_importing_it_imports_neither_click_nor_numpy():
    code = "import sys, pipeline.text; assert not {'click', 'numpy', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
