"""README's outline names every file of the repository, and no other, each with a word about it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

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
