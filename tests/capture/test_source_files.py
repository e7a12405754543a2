"""Folders, compressed files, tables and standard input: every row is read, or one line says why not."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from click.testing import CliRunner

from capture.data.sources import open_sources
from pipeline.cache import CacheReader
from pipeline.chat.rows import BadRowError, parse_line, read_row
from pipeline.cli import cli
from pipeline.errors import DataError, UsageError
from tests.conftest import FP32, assert_refused, run_cli, run_ok

CASES = Path(__file__).parent.parent / "data" / "cases"
ROWS = [{"prompt": f"why {i}", "response": f"the sky\nis blue {i}"} for i in range(40)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


CODECS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


def read(*specs: Path) -> list[dict]:
    return [row for _, row in placed(*specs)]


def placed(*specs: Path) -> list[tuple[str, dict]]:
    return [
        (source.at(number), parse_line(row) if isinstance(row, bytes) else row)
        for source in open_sources([str(spec) for spec in specs])
        for number, row in source.rows()
    ]


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# Folders


def test_a_folder_is_read_to_its_depth(tmp_path, target_dir):
    cache = tmp_path / "cache"
    run_ok(
        "capture",
        "--target",
        target_dir,
        "--cache",
        cache,
        "--layers",
        "0,2",
        *FP32,
        "--data",
        CASES / "folder",
    )
    manifest = CacheReader(cache).manifest
    assert manifest.rows == {"read": 3, "captured": 3}
    assert manifest.identity.data.sources == ("part-0.jsonl", "part-1.jsonl.gz", "sub/part-2.jsonl")


def test_what_a_folder_holds_besides_is_named(tmp_path, capsys):
    write(tmp_path / "b.jsonl", LINES[1])
    write(tmp_path / "a" / "c.jsonl", LINES[0])
    write(tmp_path / "README.md", "x")
    write(tmp_path / "dataset_info.json", "{}")
    write(tmp_path / ".cache" / "old.jsonl", LINES[5])
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert read(tmp_path) == ROWS[:2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped 5" in line
    for name in (
        "README.md",
        "dataset_info.json (desc",
        ".cache (hidden)",
        "gone.jsonl (a b",
        "a/loop/ (a link",
    ):
        assert name in line


def test_linked_files_and_folders_are_read(tmp_path):
    write(tmp_path / "elsewhere" / "x.jsonl", LINES[0])
    write(tmp_path / "blobs" / "5d41", LINES[1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "blobs" / "5d41")
    assert read(tmp_path / "data") == ROWS[:2]


def test_a_dataset_saved_below_is_one_source(tmp_path):
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS[1:3]).save_to_disk(str(tmp_path / "all" / "saved"))
    write(tmp_path / "all" / "a.jsonl", LINES[0])
    assert read(tmp_path / "all") == ROWS[:3]
    assert [source.name for source in open_sources([str(tmp_path / "all")])] == ["a.jsonl", "saved"]


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    write(tmp_path / "sub" / "notes.txt", "x")
    with pytest.raises(DataError, match=r"no data file in the folder.*found sub/notes.txt"):
        open_sources([str(tmp_path)])


def test_names_that_look_absolute_are_written_so_that_the_cache_opens(tmp_path, target_dir):
    write(tmp_path / "data" / "~x.jsonl", b"".join(LINES[:2]))
    write(tmp_path / "data" / "c:x.jsonl", b"".join(LINES[2:4]))
    cache = tmp_path / "cache"
    files = ("--data", tmp_path / "data", "--cache", cache)
    run_ok("capture", "--target", target_dir, "--layers", "0,2", *FP32, *files)
    assert CacheReader(cache).manifest.identity.data.sources == ("./c:x.jsonl", "./~x.jsonl")


# Compressed files


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_compressed_text_is_read_as_plain(tmp_path, suffix, codec):
    text = table(suffix) if suffix in (".csv", ".tsv") else b"\n".join(LINES)
    text = json.dumps(ROWS).encode() if suffix == ".json" else text
    plain = placed(write(tmp_path / f"data{suffix}", text))
    packed = placed(write(tmp_path / f"data{suffix}{codec}", CODECS[codec](text)))
    assert [row for _, row in plain] == ROWS
    assert packed == [(place.replace(suffix, suffix + codec), row) for place, row in plain]


@pytest.mark.parametrize("codec", CODECS)
def test_every_member_of_an_archive_is_read(tmp_path, codec):
    """As `cat a.gz b.gz`, or a parallel compressor, makes them."""
    compress = CODECS[codec]
    parts = [compress(b"".join(LINES[i : i + 7])) for i in range(0, 40, 7)]
    assert read(write(tmp_path / f"a.jsonl{codec}", b"".join(parts))) == ROWS


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_archive_is_one_line(tmp_path, codec):
    whole = CODECS[codec](b"".join(LINES))
    wrong = {"cut": whole[:-6], "second": whole + whole[:-6], "tail": whole + b"junk and junk", "none": b""}
    for name, data in {**wrong, "plain": LINES[0]}.items():
        path = write(tmp_path / f"{name}.jsonl{codec}", data)
        with pytest.raises(DataError, match=rf"{name}\.jsonl{codec}: not readable as") as error:
            read(path)
        assert "\n" not in str(error.value)


# Text


def test_a_byte_order_mark_and_carriage_returns(tmp_path):
    lines = b"\xef\xbb\xbf" + b"".join(LINES[:3]).replace(b"}\n", b"}\r\n")
    assert read(write(tmp_path / "a.jsonl", lines)) == ROWS[:3]
    assert read(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode())) == ROWS
    csv = b"\xef\xbb\xbf" + table(".csv").replace(b"\n", b"\r\n")
    assert [row["prompt"] for row in read(write(tmp_path / "a.csv", csv))] == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_one_line(tmp_path, encoding):
    for suffix, text in ((".jsonl", b"".join(LINES)), (".csv", table(".csv"))):
        path = write(tmp_path / f"a{suffix}", text.decode().encode(encoding))
        with pytest.raises(DataError, match="expected UTF-8, got UTF-16"):
            read(path)
    whole = write(tmp_path / "a.json", json.dumps(ROWS).encode(encoding))
    assert read(whole) == ROWS


# Tables


def table(suffix: str) -> bytes:
    sign = "\t" if suffix == ".tsv" else ","
    return "".join(f'{a}{sign}"{b}"\n' for a, b in [("prompt", "response"), *map(dict.values, ROWS)]).encode()


def test_cells_hold_new_lines_quotes_and_json(tmp_path):
    messages = [{"role": "user", "content": 'say "a, b"'}, {"role": "assistant", "content": "a\nb"}]
    text = json.dumps(messages).replace('"', '""')
    path = write(tmp_path / "a.csv", f'id,messages,tools\n1,"{text}",\n2,"{text}","[]"\n')
    assert placed(path) == [
        (f"{path} row 1", {"id": "1", "messages": messages}),
        (f"{path} row 2", {"id": "2", "messages": messages, "tools": []}),
    ]


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    (row,) = read(write(tmp_path / "a.csv", f"text\n{'x' * 300_000}\n"))
    assert len(row["text"]) == 300_000


def test_a_ragged_record_is_a_bad_row_with_its_place(tmp_path, target_dir):
    path = write(tmp_path / "a.csv", "prompt,response\na,the sky is blue\nb,the,sky\nc\nd,two plus two\n")
    for _, row in placed(path)[1:3]:
        with pytest.raises(BadRowError, match="cells under a header of 2"):
            read_row(row, "prompt")
    run = ["capture", "--target", target_dir, "--cache", tmp_path / "cache", "--layers", "0,2", *FP32]
    assert_refused(run_cli(*run, "--data", path), 1, "a.csv row 2", "3 cells under a header of 2")
    run_ok(*run, "--data", path, "--bad-rows", "skip")
    rows = CacheReader(tmp_path / "cache").manifest.rows
    assert (rows["read"], rows["captured"]) == (4, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "names the columns of a known form .*got: a, b"),
        ("text,text\n1,2\n", "each once"),
        ("", "got: none"),
        ('text\n"never closed\n', "near line 2"),
        ("text\n\udcff\n", "near line"),
    ],
)
def test_a_table_that_is_none_is_one_line(tmp_path, text, words):
    path = write(tmp_path / "a.csv", text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        read(path)


# Standard input


def piped(data: bytes, *arguments: str | Path):
    return CliRunner().invoke(cli, [str(a) for a in arguments], input=data, catch_exceptions=False)


@pytest.mark.parametrize(
    "data", [b"".join(LINES), json.dumps(ROWS).encode(), json.dumps({"data": ROWS}).encode(), LINES[0]]
)
def test_standard_input_is_the_file_with_its_bytes(tmp_path, target_dir, data):
    suffix = "jsonl" if data.startswith(LINES[0]) else "json"
    path = write(tmp_path / f"rows.{suffix}", data)
    command = ["capture", "--target", target_dir, "--layers", "0,2", *FP32]
    run_ok(*command, "--cache", tmp_path / "a", "--data", path)
    again = piped(data, *command, "--cache", tmp_path / "a", "--data", "-")
    assert again.exit_code == 0, again.output
    assert "already complete" in again.stdout
    fresh = piped(data, *command, "--cache", tmp_path / "b", "--data", "-")
    assert fresh.exit_code == 0, fresh.output
    a, b = (CacheReader(tmp_path / name).manifest for name in "ab")
    assert b.identity.data.sources == ("stdin",)
    assert (a.identity.data.sha256, a.shards) == (b.identity.data.sha256, b.shards)


def test_standard_input_that_cannot_be_read_is_one_line(tmp_path, target_dir, monkeypatch):
    command = ("preview", "--target", target_dir, *FP32, "--data", "-")
    assert_refused(piped(b"", *command), 1, "standard input is empty")
    assert_refused(piped(LINES[0], *command, "--data", "-"), 2, "only once")
    bad = piped(LINES[0] + b"{\n", *command)
    assert_refused(bad, 1, "stdin:2: not JSON")
    for other in (gzip.compress(LINES[0]), b"prompt,response\nwhy,yes\n"):
        packed = piped(other, *command)
        assert_refused(packed, 1, "error: stdin: ", "only plain JSONL or JSON is read from standard input")
        assert "dspark-stdin-" not in packed.stderr
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="several processes"):
            open_sources(["-"])
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", type("Terminal", (), {"closed": False, "isatty": lambda self: True})())
        with pytest.raises(UsageError, match="pipe"):
            open_sources(["-"])


def test_an_unknown_type_lists_every_accepted_one(tmp_path):
    with pytest.raises(DataError, match=r"unknown type.*\.jsonl.*\.csv.*\.gz, \.zst, \.bz2"):
        open_sources([str(write(tmp_path / "a.txt", "x"))])
