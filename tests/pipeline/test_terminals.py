"""Output where a terminal or a pipe can't show every character."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.conftest import FP32

TEXT = "Grüße, héllo → 世界"


def shown(monkeypatch, encoding: str, *command: str | Path) -> tuple[str, str]:
    """Run a command with strict pipes of this encoding; return what they got."""
    pipes = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", pipes[0])
    monkeypatch.setattr(sys, "stderr", pipes[1])
    monkeypatch.setattr(sys, "argv", ["dspark", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        main()
    for pipe in pipes:
        pipe.flush()
    out, err = (pipe.buffer.getvalue().decode(encoding) for pipe in pipes)
    assert ended.value.code in (0, 1, 2), err
    return out, err


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", "Grüße, héllo → 世界"),
        ("latin-1", "Grüße, héllo ? ??"),
        ("cp1252", "Grüße, héllo ? ??"),
        ("cp437", "Grüße, héllo ? ??"),
    ],
)
def test_what_a_pipe_cannot_hold_is_a_mark(tmp_path, target_dir, monkeypatch, encoding, line):
    data = tmp_path / "chat.jsonl"
    roles = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    data.write_text(json.dumps({"messages": roles}) + "\n")
    out, err = shown(monkeypatch, encoding, "preview", "--target", target_dir, "--data", data, *FP32)
    assert out.count(line) == 2
    assert "Traceback" not in out + err


def test_an_error_about_such_a_name_is_one_line(tmp_path, monkeypatch):
    out, err = shown(monkeypatch, "latin-1", "preview", "--data", tmp_path / "世界.jsonl", "--row", "x→")
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert "'x?'" in err
