"""The import rules, the exception tree, and the command line that neither imports much nor tracebacks."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.errors
from pipeline.cli import COMMANDS
from pipeline.errors import DSparkError, UsageError
from tests.conftest import assert_refused, run_cli, run_ok

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"pipeline": {"capture", "train"}, "capture": {"train"}, "train": {"capture"}}


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere: at its top, in functions, or by literal name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package: write absolute ones"
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import capture.run as r", "capture"),
        ("def f():\n    from train.trainer.trainer import x", "train"),
        ("import importlib\nimportlib.import_module('capture.run')", "capture"),
        ("if TYPE_CHECKING:\n    from train import y", "train"),
    ],
)
def test_the_import_check_sees_every_form_of_import(source, package):
    assert package in imported_packages(source)


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_stages_do_not_import_each_other_and_the_ground_floor_imports_neither(package):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert len(modules) > 5
    broken = {
        str(path.relative_to(ROOT)): bad
        for path in modules
        if (bad := imported_packages(path.read_text(encoding="utf-8")) & FORBIDDEN[package])
    }
    assert broken == {}


def imported_by(*command: str) -> tuple[set[str], str]:
    """Every module that `dspark` imports for a command line, and what it prints."""
    python = [sys.executable, "-X", "importtime", "-m", "pipeline"]
    result = subprocess.run([*python, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {
        line.rsplit("|", 1)[1].strip()
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "pipeline.cli" in modules or "click" in modules  # the list is one of modules
    return modules, result.stdout


def slow(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in ("torch", "transformers", "pyarrow")}


def test_help_imports_no_torch():
    modules, printed = imported_by("--help")
    assert not slow(modules)
    for name in COMMANDS:
        assert name in printed


@pytest.mark.parametrize("name", ["capture", "plan", "convert", "inspect", "verify"])
def test_the_help_of_a_command_that_knows_codecs_imports_no_torch(name):
    modules, printed = imported_by(name, "--help")
    assert not slow(modules)
    if name in ("capture", "plan", "convert"):
        menus = "".join(printed.split())
        assert "[bf16|fp16|fp32|fp8|int8|nf4|lm3]" in menus
        assert "[bf16|fp16|fp32|fp8|int8]" in menus


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_answers_help(name):
    output = run_ok(name, "--help")
    assert output.startswith("Usage: ")
    assert name in output.splitlines()[0]


def test_an_unknown_command_is_a_usage_error():
    result = run_cli("trian")
    assert result.exit_code == 2
    assert "trian" in result.stderr


def test_every_error_is_in_one_tree_with_an_exit_code():
    classes = [c for _, c in inspect.getmembers(pipeline.errors, inspect.isclass)]
    classes = [c for c in classes if not issubclass(c, Warning)]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, DSparkError)
        assert cls.exit_code == (2 if issubclass(cls, UsageError) else 1)


def test_verify_of_nothing_is_one_line_and_exit_1(tmp_path):
    assert_refused(run_cli("verify", tmp_path / "nowhere"), 1, "no cache", "nowhere")


@pytest.mark.parametrize("where", ["file", "x" * 300], ids=["a plain file", "a name too long for the system"])
def test_verify_of_an_impossible_path_is_one_line_and_exit_1(tmp_path, where):
    (tmp_path / "file").write_text("not a directory")
    assert_refused(run_cli("verify", tmp_path / where), 1, "no cache")


def test_verify_says_what_is_damaged(cache_dir, tmp_path):
    copy = shutil.copytree(cache_dir, tmp_path / "copy")
    assert "all good" in run_ok("verify", copy)
    shard = copy / "shards/00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = run_cli("verify", copy)
    assert_refused(result, 1, "1 of")
    assert "shards/00000.safetensors" in result.stdout
