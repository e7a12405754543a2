"""Prompts of the large example."""

from __future__ import annotations

import json
from pathlib import Path

from capture.example import EXAMPLE_DATA
from capture.large import CONVERSATIONS, FOLLOW_UPS, TEMPERATURES, TEMPLATES, conversations, main, subjects


def questions(row: dict) -> tuple[str, ...]:
    return tuple(each["content"] for each in row["messages"] if each["role"] == "user")


def test_every_question_is_asked_once_in_one_of_the_files(tmp_path: Path) -> None:
    main(tmp_path)
    files = [tmp_path / "prompts" / f"{each}.jsonl" for each in TEMPERATURES]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    own = {json.loads(line)["id"] for line in EXAMPLE_DATA.read_text().splitlines()}
    made = [row for row in rows if row["id"] not in own]
    assert len(made) == CONVERSATIONS
    assert len(rows) == CONVERSATIONS + len(own)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({questions(row)[0] for row in made}) == CONVERSATIONS
    sizes = [len(file.read_text().splitlines()) for file in files]
    assert max(sizes) - min(sizes) <= 1


def test_each_user_turn_is_followed_by_one_to_replace() -> None:
    for row in conversations():
        roles = [each["role"] for each in row["messages"] if each["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_all_subjects_templates_and_follow_ups_are_used() -> None:
    texts = [" ".join(questions(row)) for row in conversations()]
    assert len(subjects()) == len(set(subjects()))
    everything = "\n".join(texts)
    assert all(subject in everything for subject in subjects())
    for pattern in (*TEMPLATES, *FOLLOW_UPS):
        begin = pattern.split("{")[0]
        assert begin in everything


def test_the_prompts_are_the_same_in_every_python() -> None:
    """A stopped run continues with the prompts that it began with."""
    first = next(conversations())
    assert questions(first) == (
        "Summarise what you know about magnets in three sentences.",
        "What should I read next?",
    )
