"""Small inputs of the field: each gives exactly the right mask, or one plain line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capture.data.conversations import RowTokenizer
from capture.data.sources import open_sources
from capture.data.tokens import Selection, load_data
from capture.regenerate.reading import conversation_row
from pipeline.chat.rows import BadRowError
from pipeline.chat.template import ChatTemplate
from pipeline.errors import DataError
from tests.capture.templates import FAMILY_CHATML
from tests.tiny import make_tokenizer

CASES = Path(__file__).parents[1] / "data" / "cases"
# Without generation marks, and with them.
TEMPLATES = [
    FAMILY_CHATML.replace("[[", "").replace("]]", ""),
    FAMILY_CHATML.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}"),
]


def load(path: Path, template: str = TEMPLATES[0], vocab_size: int = 400, **options: Any) -> Any:
    tokenizer = options.pop("tokenizer", None) or make_tokenizer(template)
    own = {name: options.pop(name) for name in ("supervise", "max_length", "stop_ids") if name in options}
    tokenize = RowTokenizer(template=ChatTemplate(tokenizer), vocab_size=vocab_size, **own)
    data = load_data(open_sources([str(path)]), tokenize, template, Selection(**options), workers=1)
    return tokenizer, data


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learned(tokenizer: Any, sample: Any) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs: list[list[int]] = []
    for i, token in enumerate(sample.input_ids.tolist()):
        if sample.loss_mask[i]:
            if not (i and sample.loss_mask[i - 1]):
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


END = "<|im_end|>"
CALL = '{"name": "f", "arguments": {}}'
EXPECTED: dict[str, list[list[str]]] = {
    "Assistant_caps": [["yo there" + END], ["general remark" + END]],
    "messages_gpt_role": [["yo there" + END]],
    "conv_role_gpt": [["yo there" + END]],  # its second row is the same conversation
    "alpaca": [["hi there" + END]],
    "conversation_singular": [["yo there" + END]],
    "empty_parts": [["done now" + END]],
    "messages_json_string": [["general remark" + END]],
    "weight0": [["good answer" + END]],
    "sharegpt_tool_calls_key": [["it is 42" + END]],  # its call has the weight 0
    "legacy_function_call": [[CALL + END, "done now" + END]],
    "tool_null": [[CALL + END, "done now" + END]],
}


@pytest.mark.parametrize("template", TEMPLATES, ids=["unmarked", "marked"])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_mask_of_a_case(name, template):
    tokenizer, data = load(CASES / f"{name}.jsonl", template)
    assert [learned(tokenizer, sample) for sample in data] == EXPECTED[name]


def test_masked_answers_are_counted():
    assert load(CASES / "weight0.jsonl")[1].masked == 1
    assert load(CASES / "alpaca.jsonl")[1].masked == 0


def test_the_masked_call_stays_in_the_text():
    tokenizer, data = load(CASES / "sharegpt_tool_calls_key.jsonl")
    assert "calling" + CALL + END in tokenizer.decode(data[0].input_ids)


def test_tokens_with_labels():
    _, data = load(CASES / "labels.jsonl")
    assert data[0].input_ids.tolist() == [5, 6, 7, 8]
    assert data[0].loss_mask.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("parts_image", "parts_image.jsonl:1: message 0 has a part of type 'image_url'"),
        ("reasoning_only", "1 dropped: no two supervised tokens in a row"),  # this template shows no thoughts
    ],
)
def test_a_case_that_is_refused(name, words):
    with pytest.raises(DataError) as caught:
        load(CASES / f"{name}.jsonl")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thoughts_alone_are_learned_if_the_template_shows_them():
    template = TEMPLATES[0].replace("{{ m['content'] }}", "{{ m['reasoning_content'] }}{{ m['content'] }}")
    tokenizer, data = load(CASES / "reasoning_only.jsonl", template)
    assert learned(tokenizer, data[0]) == ["mm" + END]


def test_empty_texts_are_counted_once():
    _, data = load(CASES / "text_empty.jsonl")
    assert data.rows["captured"] == len(data) == 1
    assert data.rows["dropped: no two supervised tokens in a row"] == 2


def test_equal_data_from_json_parquet_and_datasets(tmp_path):
    import datasets
    import pyarrow.parquet as pq

    rows = pq.read_table(CASES / "nested.parquet").to_pylist()
    write(tmp_path / "nested.jsonl", *rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    paths = (CASES / "nested.parquet", tmp_path / "nested.jsonl", tmp_path / "saved")
    ids = [[sample.sample_id for sample in load(path)[1]] for path in paths]
    assert ids[0] == ids[1] == ids[2]
    tokenizer, data = load(CASES / "nested.parquet")
    assert learned(tokenizer, data[0])[0] == '{"name": "get", "arguments": {"city": "Rome"}}' + END


def test_a_template_without_tools_refuses_calls(tmp_path):
    from tests.tiny import CHATML

    with pytest.raises(DataError, match=r"tool_null\.jsonl:1: the chat template drops the tool calls"):
        load(CASES / "tool_null.jsonl", CHATML)


def test_rows_of_an_unknown_form_name_the_forms_and_the_keys(tmp_path):
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", {"chat": [], "id": 1}))
    for words in ('"messages"', '"instruction" and "output"', '"text"', "got keys: chat, id"):
        assert words in str(caught.value)
    assert "the source's first row" not in str(caught.value), "there is no other row"


USER = {"role": "user", "content": "why"}


def test_an_answer_beyond_the_longest_length_is_dropped_as_that(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [USER, {"role": "assistant", "content": "yes"}]})
    with pytest.raises(DataError, match="1 dropped: no answer within --max-length"):
        load(path, max_length=8)


def test_the_last_answer_alone_may_be_masked(tmp_path):
    answers = [{"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no", "weight": 0}]
    path = write(tmp_path / "a.jsonl", {"messages": [USER, answers[0], USER, answers[1]]})
    tokenizer, data = load(path)
    assert learned(tokenizer, data[0]) == ["yes" + END]
    with pytest.raises(DataError, match="1 dropped: every answer to learn from is masked"):
        load(path, supervise="last")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {"role": "assistant", "content": "so <|new|>"}]},
        {"text": "so <|new|>"},
        {"input_ids": [5, 6], "loss_mask": [1, 1]},
        {"input_ids": [5, 2**70], "loss_mask": [1, 1]},
        {"input_ids": [5, -1], "loss_mask": [1, 1]},
    ],
    ids=["chat", "text", "tokens", "huge", "negative"],
)
def test_tokens_without_an_embedding_are_a_bad_row(tmp_path, row):
    tokenizer = make_tokenizer(TEMPLATES[0])
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if row.get("input_ids") == [5, 6]:
        row = {**row, "input_ids": [5, rows]}
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(
        DataError, match=rf"a\.jsonl:1: token id .* outside the target's vocabulary \[0, {rows}\)"
    ):
        load(path, tokenizer=tokenizer, vocab_size=rows)


# GLM's way: the token that ends an answer is the header of the next turn.
NEXT_TURN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("named", [True, False])
def test_a_stop_token_before_the_next_turn_is_learned_if_generation_stops_there(tmp_path, named):
    tokenizer = make_tokenizer(NEXT_TURN, ("<|user|>", "<|assistant|>"))
    answer = {"role": "assistant", "content": "yes"}
    path = write(tmp_path / "a.jsonl", {"messages": [USER, answer, USER, {**answer, "content": "no no"}]})
    stops = (tokenizer.convert_tokens_to_ids("<|user|>"),) if named else ()
    _, data = load(path, NEXT_TURN, tokenizer=tokenizer, stop_ids=stops)
    assert learned(tokenizer, data[0]) == ["yes" + "<|user|>" * named, "no no"]


def test_rows_for_regenerate_keep_their_keys_and_masks():
    answer = {"role": "assistant", "content": "yes"}
    row = {"id": 7, "messages": [USER, {**answer, "weight": 0}], "extra": {"a": [1]}}
    assert conversation_row(row) == row
    turns = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "yes", "train": False}]
    masked = [USER, {**answer, "weight": 0}]
    assert conversation_row({"id": 1, "conversations": turns}) == {"id": 1, "messages": masked}
    asked = {"prompt": "why", "response": "yes", "source": "x", "text": "kept"}
    assert conversation_row(asked) == {"source": "x", "text": "kept", "messages": [USER, answer]}
    with pytest.raises(BadRowError, match="expected a conversation"):
        conversation_row({"text": "once"})


def test_alpaca_and_preferences_in_csv(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,input,output\nwhy,,yes\n")
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected\nwhy,yes,no\n")
    (tmp_path / "c.csv").write_text('input_ids,labels\n"[5, 6, 7]","[-100, 6, 7]"\n')
    for name, form in (("a.csv", None), ("b.csv", "preference")):
        tokenizer, data = load(tmp_path / name, form=form)
        assert learned(tokenizer, data[0]) == ["yes" + END]
    assert load(tmp_path / "c.csv")[1][0].loss_mask.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="needs --format preference"):
        load(tmp_path / "b.csv")
