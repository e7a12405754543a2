"""Every place that rows come from, with every form of row, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capture.data.sources import open_sources
from pipeline.cache import CacheReader
from pipeline.errors import DataError, UsageError
from tests.capture.conftest import in_data_order, places
from tests.conftest import FP32, assert_refused, run_cli, run_ok

Rows = list[dict[str, Any]]

# The same four conversations in every form; answers long enough to hold an anchor.
TALKS = [
    ("why", "the sky is blue"),
    ("how", "two plus two"),
    ("what is", "a green mat"),
    ("is it", "yes no yes"),
]


def turns(user: str, answer: str, role: str, text: str, names: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: names[0], text: user}, {role: names[1], text: answer}]


FORMS: dict[str, Rows] = {
    "messages": [{"messages": turns(u, a, "role", "content", ("user", "assistant"))} for u, a in TALKS],
    "conversations": [{"conversations": turns(u, a, "from", "value", ("human", "gpt"))} for u, a in TALKS],
    "prompt": [{"prompt": u, "response": a} for u, a in TALKS],
    "text": [{"text": f"{u} {a}"} for u, a in TALKS],
    "tokens": [{"input_ids": [9, 8, 7 + i], "loss_mask": [0, 1, 1]} for i, _ in enumerate(TALKS)],
}


def write_lines(rows: Rows, folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_json(rows: Rows, folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_wrapped(rows: Rows, folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps({"version": "1", "data": rows}))
    return path


def write_lines_as_json(rows: Rows, folder: Path) -> Path:
    return write_lines(rows, folder).rename(folder / "data.json")


def write_parquet(rows: Rows, folder: Path) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def write_arrow(rows: Rows, folder: Path, kind: Callable = pa.ipc.new_file) -> Path:
    path = folder / "data.arrow"
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write_arrow_stream(rows: Rows, folder: Path) -> Path:
    return write_arrow(rows, folder, pa.ipc.new_stream)


def write_dataset(rows: Rows, folder: Path) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_folder(rows: Rows, folder: Path) -> Path:
    parts = folder / "parts"
    (parts / "ignored").mkdir(parents=True)
    write_lines(rows[:1], parts)
    write_parquet(rows[1:], parts)
    (parts / "README.md").write_text("not data")
    return parts


SOURCES = {
    "jsonl": write_lines,
    "json list": write_json,
    "json object with a list": write_wrapped,
    "jsonl called json": write_lines_as_json,
    "parquet": write_parquet,
    "arrow file": write_arrow,
    "arrow stream": write_arrow_stream,
    "saved dataset": write_dataset,
    "folder of files": write_folder,
}


def capture(target: Path, cache: Path, *arguments: str | Path) -> CacheReader:
    run_ok("capture", "--target", target, "--cache", cache, "--layers", "0,2", *FP32, *arguments)
    return CacheReader(cache)


def ids(reader: CacheReader) -> list[str]:
    """Sample ids in the order of the data."""
    return [reader.sample_id(i) for i in in_data_order(reader.path)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, target_dir) -> dict[str, list[str]]:
    """Sample ids of each form, from JSONL."""
    found = {}
    for form, rows in FORMS.items():
        folder = tmp_path_factory.mktemp(form)
        reader = capture(target_dir, folder / "cache", "--data", write_lines(rows, folder))
        found[form] = ids(reader)
        assert len(found[form]) == len(TALKS)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_every_form(tmp_path, target_dir, expected, source, form):
    data = SOURCES[source](FORMS[form], tmp_path)
    reader = capture(target_dir, tmp_path / "cache", "--data", data)
    assert ids(reader) == expected[form]
    assert reader.manifest.rows == {"read": 4, "captured": 4}


def test_chat_forms_of_the_same_talk_are_the_same_samples(expected):
    assert expected["messages"] == expected["conversations"] == expected["prompt"]


def test_several_sources_at_once_are_told_apart(tmp_path, target_dir, expected):
    (tmp_path / "a").mkdir()
    first = write_lines(FORMS["messages"][:2], tmp_path / "a")
    second = write_parquet(FORMS["prompt"][2:], tmp_path)
    reader = capture(target_dir, tmp_path / "cache", "--data", first, "--data", second)
    assert ids(reader) == expected["messages"]
    assert reader.manifest.identity.data.sources == ("data.jsonl", "data.parquet")
    assert sorted(places(tmp_path / "cache")) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_columns_null_keys_reach_no_template(tmp_path, target_dir, expected):
    """In a Parquet file every message has the keys of all of them."""
    rows = json.loads(json.dumps(FORMS["messages"]))
    rows[3]["messages"][1]["name"] = "x"
    reader = capture(target_dir, tmp_path / "cache", "--data", write_parquet(rows, tmp_path))
    assert ids(reader)[:3] == expected["messages"][:3]


def test_splits_of_a_saved_dataset(tmp_path, target_dir, expected):
    datasets.disable_progress_bars()
    parts = {"train": FORMS["messages"][:3], "test": FORMS["messages"][3:]}
    whole = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    whole.save_to_disk(str(tmp_path / "saved"))
    for arguments, rows in (((), [0, 1, 2]), (("--split", "test"), [3])):
        cache = tmp_path / f"cache{len(arguments)}"
        reader = capture(target_dir, cache, "--data", tmp_path / "saved", *arguments)
        assert ids(reader) == [expected["messages"][i] for i in rows]
    wrong = ("--data", tmp_path / "saved", "--split", "dev", "--cache", tmp_path / "new")
    assert_refused(run_cli("capture", "--target", target_dir, *FP32, *wrong), 1, "train, test", "--split")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing.jsonl", ["no data file at missing.jsonl", ".parquet"]),
        ("/no/such/place", ["no data file"]),
        ("nobody/nothing", ["no such data: nobody/nothing"]),
    ],
)
def test_data_that_is_not_there_is_one_line(tmp_path, target_dir, data, words):
    files = ("--cache", tmp_path / "cache", "--data", data)
    result = run_cli("capture", "--target", target_dir, *files, *FP32)
    assert_refused(result, 1, *words)
    assert not (tmp_path / "cache").exists()


def test_files_that_are_not_what_they_are_called(tmp_path):
    for name in ("a.parquet", "a.arrow", "a.json"):
        (tmp_path / name).write_bytes(b"nonsense\n")
        (source,) = open_sources([str(tmp_path / name)])
        with pytest.raises(DataError, match=rf"{name}: not"):
            list(source.rows())
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="unknown type of data file"):
        open_sources([str(tmp_path / "a.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in the folder"):
        open_sources([str(tmp_path / "empty")])


def test_a_split_of_a_file_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="--split"):
        open_sources([str(write_lines([], tmp_path))], split="train")


def test_a_hub_dataset_with_split_and_subset(tmp_path, target_dir, expected, monkeypatch):
    """The Hub itself is out of reach here: what `datasets` is asked for is checked, its answer captured."""
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(FORMS["messages"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = ("--data", "someone/chats", "--subset", "en", "--split", "test")
    reader = capture(target_dir, tmp_path / "a", *data)
    assert ids(reader) == expected["messages"]
    assert reader.manifest.identity.data.sources == ("someone/chats/en/test",)
    capture(target_dir, tmp_path / "b", "--data", "chats")
    assert asked == [("someone/chats", "en", "test"), ("chats", None, "train")]
