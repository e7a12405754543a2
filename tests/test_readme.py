"""README's outline names every file of the repository, and no other; its costs are what codecs take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.cache.codecs import bits_per_value, get_codec

ROOT = Path(__file__).parents[1]
INDENT = 4


def outlined() -> dict[str, str]:
    """Path and annotation of every line of the outline."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## How it is laid out")[1].split("\n## ")[0]
    found, folders = {}, []
    for line in section.splitlines():
        match = re.fullmatch(r"((?: {4})+)(\S+)(?: +(.*))?", line)
        if not match:
            continue
        depth = len(match[1]) // INDENT - 1
        folders = [*folders[:depth], match[2].removesuffix("/")]
        found["/".join(folders) + "/" * match[2].endswith("/")] = match[3] or ""
    return found


def tracked() -> set[str]:
    command = ["git", "ls-files"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return {name for name in result.stdout.splitlines() if (ROOT / name).is_file()}


def test_the_outline_names_every_file_and_no_other():
    files = {name for name in outlined() if not name.endswith("/")}
    assert files == {name for name in tracked() if Path(name).name != "__init__.py"}


def test_every_file_in_the_outline_is_annotated():
    bare = [name for name, words in outlined().items() if not words and not name.endswith("/")]
    assert not bare


def test_the_table_of_costs_is_what_the_codecs_take():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## What a cache costs\n")[1]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.split("\n## ")[0].splitlines()
        if line.startswith("|")
    ][:6]
    widths = [int(cell.split("width ")[1].replace(",", "")) for cell in header[1:4]]
    assert widths == [2560, 4096, 5120]
    names = [re.findall(r"(\w+) \+ (\w+)", name) for name, *_ in rows]
    assert names == [
        [("bf16", "bf16")],
        [("int8", "int8"), ("fp8", "fp8")],
        [("nf4", "int8")],
        [("lm3", "int8")],
    ]
    for pairs, (_, *cells, share) in zip(names, rows, strict=True):
        for context, last in pairs:
            for width, cell in zip(widths, cells, strict=True):
                values = 5 * bits_per_value(get_codec(context), width) + bits_per_value(
                    get_codec(last), width
                )
                a_token = 4 + 1 + values * width / 8  # its id and its mask
                assert cell.replace(" a token", "") == f"{a_token:,.0f} B, {a_token * 1.237e-3:.1f} TB"
                assert abs(a_token / (12 * width + 5) - float(share)) < 0.001
