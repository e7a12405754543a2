"""Conversations to token ids and loss mask: exactly what the assistant writes is supervised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from capture.data.conversations import RowTokenizer
from capture.data.sources import open_sources
from capture.data.tokens import Selection, TokenizedData, load_data
from pipeline.chat.rows import BadRowError, Conversation
from pipeline.chat.template import ChatTemplate
from pipeline.errors import DataError
from tests.capture.templates import (
    COMMENTED_MARKS,
    COUNTING,
    DATED,
    DIALECTS,
    FAMILIES,
    GENERATION,
    HARMONY,
    HARMONY_TOKENS,
    RAISING,
    REWRITING,
    SHOUTING,
    THINKING,
    THINKING_TOOLS,
    WIDE_MARKS,
)
from tests.tiny import make_tokenizer


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def supervised(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of every unbroken run of supervised tokens."""
    runs: list[list[int]] = []
    for position, (token, kept) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if kept and (position == 0 or not mask[position - 1]):
            runs.append([])
        if kept:
            runs[-1].append(token)
    return [decode(tokenizer, run) for run in runs]


def row_tokenizer(tokenizer: Any, **options: Any) -> RowTokenizer:
    return RowTokenizer(template=ChatTemplate(tokenizer), vocab_size=len(tokenizer), **options)


def tokenize_messages(
    tokenizer: Any, messages: list[dict[str, Any]], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    return row_tokenizer(tokenizer, **options).tokenize(Conversation(messages))


def supervised_turns(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    return supervised(tokenizer, *tokenize_messages(tokenizer, messages, **options))


def load(path: Path, tokenizer: Any, max_length: int = 4096, **selection: Any) -> TokenizedData:
    tokenize = row_tokenizer(tokenizer, max_length=max_length)
    return load_data(open_sources([str(path)]), tokenize, "a tokenizer", Selection(**selection))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ONE = [user("why is the sky blue"), assistant("the sky is blue")]
THREE = [*ONE, user("how"), assistant("yes"), user("what is two plus two"), assistant("two plus two")]


SYSTEMS = [
    (name, with_system) for name, d in DIALECTS.items() for with_system in (False, True)[: 1 + d.system]
]


@pytest.mark.parametrize("messages", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize(("name", "with_system"), SYSTEMS)
def test_the_mask_covers_exactly_the_answers_and_their_end(name, with_system, messages):
    dialect = DIALECTS[name]
    messages = [system("the cat is green"), *messages] if with_system else messages
    tokenizer = dialect.tokenizer()
    ids, mask = tokenize_messages(tokenizer, messages)
    answers = [dialect.turn(m["content"]) for m in messages if m["role"] == "assistant"]
    assert supervised(tokenizer, ids, mask) == answers
    assert decode(tokenizer, ids.tolist()) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids.dtype == np.int32
    assert mask.dtype == np.uint8
    assert set(mask.tolist()) == {0, 1}


CALL = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALL_TEXT = '{"name": "add", "arguments": {"a": 2, "b": 2}}'
TOOL_TALK = [
    user("what is two plus two"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    assistant("two plus two makes 4"),
    user("three"),
    {"role": "assistant", "content": "yes", "tool_calls": [CALL, CALL]},
]


@pytest.mark.parametrize("cut", [2, 4, 6])
@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_are_the_assistants_and_tool_results_are_not(name, cut):
    family = FAMILIES[name]
    messages = TOOL_TALK[:cut]
    answers = [
        family.turn(m["content"], CALL_TEXT * len(m.get("tool_calls", [])))
        for m in messages
        if m["role"] == "assistant"
    ]
    assert supervised_turns(family.tokenizer(), messages) == answers


def test_tool_calls_of_a_template_that_shows_thoughts_in_the_last_turn_only():
    assert supervised_turns(make_tokenizer(THINKING_TOOLS), TOOL_TALK) == [
        CALL_TEXT + "<|im_end|>",
        "two plus two makes 4<|im_end|>",
        "<think>\n\n</think>\n\nyes" + CALL_TEXT * 2 + "<|im_end|>",
    ]


THOUGHTS = [
    user("why"),
    assistant("<think>\nblue sky\n</think>\n\nyes"),
    user("how"),
    assistant("<think>a cat</think>the dog <think>ran"),
]


@pytest.mark.parametrize("name", ["chatml", "chatml-marked", "llama3", "phi3", "phi3-marked"])
def test_mask_reasoning_leaves_thoughts_out_and_the_rest_in(name):
    family = FAMILIES[name]
    turns = supervised_turns(family.tokenizer(), THOUGHTS, mask_reasoning=True)
    assert turns == [f"yes{family.after}", f"the dog <think>ran{family.after}"]
    assert supervised_turns(family.tokenizer(), THOUGHTS) != turns


def test_thoughts_that_the_prompt_opened_are_left_out_too():
    opened = [user("why"), assistant("blue sky\n</think>\n\nyes")]
    assert supervised_turns(TOKENIZERS["chatml"], opened, mask_reasoning=True) == ["yes<|im_end|>"]


@pytest.mark.parametrize("messages", [ONE, THREE, [*THREE, user("why")], TOOL_TALK], ids=len)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_turn_alone(name, messages):
    tokenizer = FAMILIES[name].tokenizer()
    every = supervised_turns(tokenizer, messages)
    assert supervised_turns(tokenizer, messages, supervise="last") == every[-1:]


def test_a_template_from_a_file_and_its_arguments():
    template = "{% for m in messages %}{{ m['content'] + ('!' if loud else '?') + '<|im_end|>' }}{% endfor %}"
    for loud, mark in ((True, "!"), (False, "?")):
        tokenize = RowTokenizer(
            template=ChatTemplate(make_tokenizer(None), template, {"loud": loud}), vocab_size=400
        )
        ids, mask = tokenize.tokenize(Conversation([user("why"), assistant("yes")]))
        assert supervised(tokenize.template.tokenizer, ids, mask) == [f"yes{mark}<|im_end|>"]


def test_plain_text_is_supervised_whole_and_tokens_are_taken_as_they_are():
    tokenize = row_tokenizer(TOKENIZERS["chatml"])
    ids, mask = tokenize(b'{"text": "the cat sat on the mat"}')
    assert decode(TOKENIZERS["chatml"], ids.tolist()) == "the cat sat on the mat"
    assert mask.all()
    ids, mask = tokenize({"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 1, 0, 0]})
    assert (ids.tolist(), mask.tolist()) == ([5, 6, 7], [0, 1, 1])
    for bad in (-1, 10**6):
        with pytest.raises(BadRowError, match="outside"):
            tokenize({"input_ids": [1, 2, bad], "loss_mask": [0, 1, 1]})


@pytest.mark.parametrize("answer", ["the sky is blue", "a", "final", "message", "assistant", "end"])
def test_answers_that_end_otherwise_when_nothing_follows(answer):
    """And answers that are words of the template: what is supervised is the answer, not the template."""
    messages = [user("x"), assistant(answer), user(answer), assistant(answer)]
    header = "<|channel|>final<|message|>"
    assert supervised_turns(make_tokenizer(HARMONY, HARMONY_TOKENS), messages) == [
        f"{header}{answer}<|end|>",
        f"{header}{answer}<|return|>",
    ]


@pytest.mark.parametrize("answer", ["<b>hi</b> there", ">", "<", "<think", "User", "|"])
def test_answers_that_begin_like_the_prompt_that_asks_for_them(answer):
    """DeepSeek's prompt opens <think>, which answers do not have."""
    family = FAMILIES["deepseek"]
    messages = [user("x"), assistant(answer), user("y"), assistant(answer + " yes")]
    turns = supervised_turns(family.tokenizer(), messages)
    assert turns == [family.turn(answer), family.turn(answer + " yes")]


def test_marks_around_whole_messages_supervise_no_header():
    assert supervised_turns(make_tokenizer(WIDE_MARKS), THREE) == [
        "the sky is blue<|im_end|>",
        "yes<|im_end|>",
        "two plus two<|im_end|>",
    ]


def test_thoughts_without_an_answer_may_hold_an_end_of_turn():
    messages = [user("x"), assistant("<|im_end|></think>"), user("y"), assistant("yes")]
    assert supervised_turns(TOKENIZERS["chatml"], messages) == [
        "<|im_end|></think><|im_end|>",
        "yes<|im_end|>",
    ]


def test_marks_in_a_comment_are_none():
    assert supervised_turns(make_tokenizer(COMMENTED_MARKS), ONE) == ["the sky is blue<|im_end|>"]


def test_a_template_that_prints_the_date_prints_the_day_it_is_given():
    texts = []
    for today in ("2026-01-31", "2026-02-01"):
        template = ChatTemplate(make_tokenizer(DATED), today=today)
        assert template.prints_the_date
        texts.append(template.render(Conversation(ONE)))
    assert "31 Jan 2026" in texts[0]
    assert "01 Feb 2026" in texts[1]


def test_an_answer_that_mentions_thoughts_keeps_its_words():
    mention = assistant("write <think> to open them")
    turns = supervised_turns(TOKENIZERS["chatml"], [user("how"), mention], mask_reasoning=True)
    assert turns == ["write <think> to open them<|im_end|>"]


def test_a_system_prompt_that_moves_on_hides_no_answer():
    """The text before an answer is another one as long as it is the last; only the content is certain."""
    family = FAMILIES["mistral-moving"]
    turns = supervised_turns(family.tokenizer(), [system("the cat is green"), *THREE])
    assert [turn.strip() for turn in turns] == [
        family.turn(m["content"]).strip() for m in THREE if m["role"] == "assistant"
    ]


@pytest.mark.parametrize("name", DIALECTS)
def test_identical_turns_are_told_apart(name):
    dialect = DIALECTS[name]
    messages = [user("yes"), assistant("yes"), user("yes"), assistant("yes"), user("no"), assistant("yes")]
    assert supervised_turns(dialect.tokenizer(), messages) == [dialect.turn("yes")] * 3


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize(
    "content",
    [
        "  two leading",
        "two trailing  ",
        "\n\nline feeds\n",
        "naïve café 東京 🌍👩‍🚀 é",
        "def f():\n    return 1\n",
    ],
    ids=["leading", "trailing", "lines", "unicode", "code"],
)
def test_answers_with_spaces_and_unicode(name, content):
    dialect = DIALECTS[name]
    messages = [user(content), assistant(content), user("how"), assistant("no " + content)]
    turns = supervised_turns(dialect.tokenizer(), messages)
    assert turns == [dialect.turn(content), dialect.turn("no " + content)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_text_any_turns(data):
    name = data.draw(st.sampled_from(["chatml", "generation", "mistral"]))
    texts = data.draw(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4))
    messages = [message for a, b in texts for message in (user(a), assistant(b))]
    dialect = DIALECTS[name]
    assert supervised_turns(TOKENIZERS[name], messages) == [dialect.turn(answer) for _, answer in texts]


TOKENIZERS = {name: DIALECTS[name].tokenizer() for name in ("chatml", "generation", "mistral")}


def test_consecutive_answers_are_both_supervised():
    messages = [user("why"), assistant("yes"), assistant("no"), user("how"), assistant("two")]
    turns = supervised_turns(TOKENIZERS["chatml"], messages)
    assert turns == ["yes<|im_end|>", "no<|im_end|>", "two<|im_end|>"]


@pytest.mark.parametrize("name", ["chatml", "generation"])
def test_a_conversation_that_the_assistant_opens_supervises_no_header(name):
    messages = [assistant("yes two"), user("why"), assistant("no")]
    assert supervised_turns(TOKENIZERS[name], messages) == ["yes two<|im_end|>", "no<|im_end|>"]


def test_template_text_inside_a_user_turn_is_not_supervised():
    fake = "cat<|im_end|>\n<|im_start|>assistant\nthe dog ran<|im_end|>"
    for name in ("chatml", "generation"):
        messages = [user(fake), assistant("no"), user(fake), assistant("yes")]
        assert supervised_turns(TOKENIZERS[name], messages) == ["no<|im_end|>", "yes<|im_end|>"]


def test_an_end_of_turn_token_inside_an_answer_does_not_cut_it():
    answer = "write <|im_end|> to stop"
    for name in ("chatml", "generation"):
        messages = [user("how"), assistant(answer), user("why"), assistant("yes")]
        assert supervised_turns(TOKENIZERS[name], messages) == [answer + "<|im_end|>", "yes<|im_end|>"]


def test_added_tokens_after_the_end_of_turn_are_not_supervised():
    """Gemma's vocabulary has the line feed as an added token, and its template one after every turn."""
    dialect = DIALECTS["gemma"]
    tokenizer = dialect.tokenizer()
    tokenizer.add_tokens(["\n"])
    assert tokenizer.tokenize("\n") == ["\n"]
    assert supervised_turns(tokenizer, THREE) == [
        dialect.turn(m["content"]) for m in THREE if m["role"] == "assistant"
    ]


def test_tokenizers_that_trim_offsets_leave_no_holes_in_an_answer():
    """With trim_offsets (GPT-NeoX's), a token of spaces has an empty character range."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    answer = "def f():\n    return 1"
    assert supervised_turns(tokenizer, [user("code"), assistant(answer)]) == [answer + "<|im_end|>"]


def test_an_answer_whose_first_token_takes_the_prompts_space_is_supervised_whole():
    """`ASSISTANT: yes` is tokenised as `ASSISTANT`, `:`, ` yes`: the token belongs to the answer."""
    template = (
        "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    turns = supervised_turns(make_tokenizer(template), [user("why"), assistant("yes two"), user("how")])
    assert [turn.strip() for turn in turns] == ["yes two"]


def test_a_template_without_end_of_turn_token_supervises_the_answer():
    template = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    turns = supervised_turns(make_tokenizer(template), THREE)
    assert turns == ["the sky is blue", "yes", "two plus two"]


def test_thoughts_that_only_the_last_turn_shows_are_supervised_there():
    assert supervised_turns(make_tokenizer(THINKING), THREE) == [
        "the sky is blue<|im_end|>",
        "yes<|im_end|>",
        "<think>\n\n</think>\n\ntwo plus two<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (COUNTING, THREE, "renders message 1 differently"),
        (SHOUTING, ONE, "content of message 1"),
        (RAISING, ONE, "never happy"),
        (FAMILIES["gemma"].text, [system("s"), *ONE], "System role not supported"),
        (GENERATION, [*ONE, {"role": "tool", "content": "4"}], "no tools here"),
        (FAMILIES["mistral"].text, [*ONE, assistant("again")], "roles must alternate: user, assistant"),
        (None, ONE, "no chat template"),
        ("{% for m in messages %}{{ m.role", ONE, "template"),
    ],
    ids=["rewrites", "shouts", "raises", "gemma-system", "generation-raises", "alternate", "none", "syntax"],
)
def test_what_a_template_refuses_is_one_line_with_file_and_line(tmp_path, template, messages, reason):
    path = write(tmp_path / "chats.jsonl", "", {"messages": messages})
    with pytest.raises(DataError) as caught:
        load(path, make_tokenizer(template))
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert "chats.jsonl:2" in message


def test_prompts_that_later_messages_rewrite_do_not_hide_an_answer():
    """The head of the text tells how many messages there are; the answers stand as they are."""
    turns = supervised_turns(make_tokenizer(REWRITING), THREE)
    assert turns == ["the sky is blue<|im_end|>", "yes<|im_end|>", "two plus two<|im_end|>"]


def test_a_thinking_template_serves_single_turns():
    """Thinking marks before the only answer are the model's own output."""
    turns = supervised_turns(make_tokenizer(THINKING), ONE)
    assert turns == ["<think>\n\n</think>\n\nthe sky is blue<|im_end|>"]


def test_samples_end_at_their_last_supervised_token(tmp_path):
    tokenizer = TOKENIZERS["chatml"]
    path = write(tmp_path / "chats.jsonl", {"messages": [*THREE, user("the cat sat on the mat")]})
    (sample,) = load(path, tokenizer)
    assert sample.loss_mask[-1] == 1
    text = decode(tokenizer, sample.input_ids.tolist())
    whole = tokenizer.apply_chat_template(THREE, tokenize=False)
    assert text == whole.rstrip("\n")
    assert text.endswith("two plus two<|im_end|>")


def test_max_length_cuts_at_every_length(tmp_path):
    tokenizer = TOKENIZERS["chatml"]
    ids, mask = tokenize_messages(tokenizer, THREE)
    short = [user("a"), assistant("yes no")]
    path = write(tmp_path / "chats.jsonl", {"messages": THREE}, {"messages": short})
    pairs = [p for p in range(len(mask) - 1) if mask[p] and mask[p + 1]]
    first_label = pairs[0] + 1
    for max_length in range(first_label + 1, len(ids) + 3):
        data = load(path, tokenizer, max_length)
        sample = next(s for s in data if s.source_row == 0)
        last = max(p for p in range(min(max_length, len(ids))) if mask[p])
        assert sample.input_ids.tolist() == ids[: last + 1].tolist()
        assert sample.loss_mask.tolist() == mask[: last + 1].tolist()
        assert len(sample.input_ids) <= max_length
    data = load(path, tokenizer, first_label)  # the second label no longer fits
    assert [s.source_row for s in data] == [1]


def test_rows_without_candidates_are_dropped_and_counted(tmp_path):
    path = write(
        tmp_path / "chats.jsonl",
        {"messages": ONE},
        {"messages": [user("why")]},
        "",
        {"messages": [user("why"), assistant("")]},  # the end-of-turn token alone offers no anchor
        {"messages": THREE, "id": "other keys do not matter"},
    )
    data = load(path, TOKENIZERS["chatml"])
    assert [sample.source_row for sample in data] == [0, 4]
    dropped = sum(count for reason, count in data.rows.items() if reason.startswith("dropped"))
    assert (data.rows["read"], data.rows["captured"], dropped) == (4, 2, 2)


def test_only_empty_and_answered_turns_mix(tmp_path):
    path = write(tmp_path / "chats.jsonl", {"messages": [user("a"), assistant(""), *ONE]})
    (sample,) = load(path, TOKENIZERS["chatml"])
    turns = supervised(TOKENIZERS["chatml"], sample.input_ids, sample.loss_mask)
    assert turns == ["<|im_end|>", "the sky is blue<|im_end|>"]


def test_sample_ids_name_content(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": ONE}, {"messages": THREE})
    first, second = load(path, TOKENIZERS["chatml"])
    (alone,) = load(write(tmp_path / "b.jsonl", {"messages": ONE, "id": 2}), TOKENIZERS["chatml"])
    assert first.sample_id == alone.sample_id != second.sample_id
    assert len(first.sample_id) == 16


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{'messages': []}", "not JSON"),
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "JSON object"),
        ({"chat": "hello"}, '"messages"'),
        ({"messages": []}, '"messages"'),
        ({"messages": "hello"}, '"messages"'),
        ({"messages": [{"content": "x"}]}, 'message 0 has no "role"'),
        ({"messages": [user("x"), {"role": "assistant"}]}, 'message 1 has no text "content"'),
        ({"messages": [user("x"), {"role": "assistant", "content": None}]}, "message 1"),
        ({"messages": [user("x"), {"role": 3, "content": "x"}]}, 'message 1 has no "role"'),
        ({"messages": ["x"]}, "message 0"),
        ({"messages": [user("x"), assistant("half a pair \ud83d here")]}, "message 1"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) > 50 else str(value)[:40],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, reason):
    path = write(tmp_path / "chats.jsonl", {"messages": ONE}, "", row)
    with pytest.raises(DataError) as caught:
        load(path, TOKENIZERS["chatml"])
    message = str(caught.value)
    assert "chats.jsonl:3" in message
    assert reason in message
    assert "\n" not in message


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps({"messages": ONE}).encode() + b'\n{"messages": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"chats\.jsonl:2"):
        load(path, TOKENIZERS["chatml"])


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(DataError, match="no data file"):
        load(tmp_path / name, TOKENIZERS["chatml"], 4096)


def test_a_file_without_a_usable_row(tmp_path):
    path = write(tmp_path / "chats.jsonl", {"messages": [user("why")]})
    with pytest.raises(DataError, match="1 rows read"):
        load(path, TOKENIZERS["chatml"])
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        load(empty, TOKENIZERS["chatml"], 4096)
