"""docs/extending.md: its diffs apply to this tree, and what they add works. So the page can't go stale."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/extending.md"
SECTIONS = ["Add a codec", "Add a head"]
# What a copy needs to run its tests.
COPIED = ["capture", "pipeline", "tests", "train", "pyproject.toml"]


def section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of what the diffs change, with its bytecode, which is as old as the files."""
    skipped = shutil.ignore_patterns("data")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=None if name != "tests" else skipped)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("title", SECTIONS)
def test_the_diffs_apply_and_the_commands_pass(tree: Path, title: str) -> None:
    diffs = blocks(title, "diff")
    assert diffs
    for diff in diffs:
        command = ["git", "apply", "--whitespace=error", "-"]
        done = subprocess.run(command, cwd=tree, input=diff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    commands = [line for block in blocks(title, "sh") for line in block.splitlines()]
    assert commands
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "python"
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tree, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        tests = sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
        assert tests >= 5, done.stdout


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_select_what_the_diffs_add_alone(title: str) -> None:
    """Its name is in no test as yet, so nothing else passes above."""
    for block in blocks(title, "sh"):
        for line in block.splitlines():
            *_, option, word = shlex.split(line)
            assert option == "-k"
            texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
            assert not [text for text in texts if f'"{word}"' in text]
