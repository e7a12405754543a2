"""Rules 12, 13 and 17: directories and frozen weights that are not what they should be."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import files
from pipeline.cache import CacheReader
from pipeline.files import sha256_file
from tests.pipeline.handmade import HIDDEN, VOCAB, HandCache
from tests.pipeline.hostile import Bend, assert_refuses, lengthen
from tests.pipeline.written import read_all

pytestmark = pytest.mark.usefixtures("bounded_memory")


def test_the_cache_that_the_others_bend_is_a_good_one(tmp_path):
    path = HandCache().save(tmp_path)
    assert len(read_all(path)) == 3 + 2
    assert CacheReader(path).verify() == []


Harm = Callable[[Path], None]


def outside(path: Path, name: str) -> Path:
    """Move a file out of the cache and return where it is now."""
    moved = path.parent / f"outside-{Path(name).name}"
    (path / name).rename(moved)
    return moved


def link(name: str) -> Harm:
    return lambda path: (path / name).symlink_to(outside(path, name))


def link_folder(name: str) -> Harm:
    return lambda path: (path / name).symlink_to(outside(path, name), target_is_directory=True)


def remove(name: str) -> Harm:
    return lambda path: (path / name).unlink()


def as_folder(name: str) -> Harm:
    def harm(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return harm


def as_fifo(name: str) -> Harm:
    def harm(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return harm


def dangling(name: str) -> Harm:
    def harm(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to("nowhere")

    return harm


def more(name: str) -> Harm:
    return lambda path: (path / name).write_bytes(b"stranger") and None


def rest(name: str) -> Harm:
    """Nothing but one folder is left."""
    return lambda path: shutil.rmtree(path / name)


SHARD_1, FROZEN = "shards/00001.safetensors", "target/frozen.safetensors"
NAMES = ["manifest.json", "samples.arrow", SHARD_1, FROZEN, "target/config.json"]
DIRECTORY_HARMS: dict[str, Harm] = {
    **{f"missing {name}": remove(name) for name in NAMES},
    **{f"link for {name}": link(name) for name in NAMES},
    **{f"dangling link for {name}": dangling(name) for name in NAMES},
    **{f"folder for {name}": as_folder(name) for name in NAMES},
    **{f"pipe for {name}": as_fifo(name) for name in NAMES},
    "shards is a link": link_folder("shards"),
    "target is a link": link_folder("target"),
    "shards is missing": rest("shards"),
    "target is missing": rest("target"),
    "weights nobody lists": more("target/model.safetensors"),
}


@pytest.mark.parametrize("name", DIRECTORY_HARMS)
def test_a_harmed_directory_is_refused(tmp_path, name):
    path = HandCache().save(tmp_path / "cache")
    DIRECTORY_HARMS[name](path)
    assert_refuses(path)


def truncate(path: Path) -> None:
    """A terabyte of nothing: as long as nobody reads it, it costs nothing."""
    os.truncate(path / SHARD_1, 2**40)


@pytest.mark.parametrize(
    "harm",
    [remove(SHARD_1), link(SHARD_1), dangling(SHARD_1), as_folder(SHARD_1), as_fifo(SHARD_1), truncate],
)
def test_verify_reads_nothing_but_plain_files_of_their_size(tmp_path, monkeypatch, harm):
    path = HandCache().save(tmp_path / "cache")
    harm(path)
    read = []
    monkeypatch.setattr(
        files, "sha256_file", lambda path, real=sha256_file: read.append(path.name) or real(path)
    )
    assert CacheReader(path).verify() == [SHARD_1]
    assert Path(SHARD_1).name not in read


@pytest.mark.parametrize("name", [FROZEN, SHARD_1])
def test_nothing_in_a_cache_is_unpickled(tmp_path, name):
    """torch's own files are pickles, plain or in a zip archive."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for number, zipped in enumerate((True, False)):
        content = io.BytesIO()
        torch.save({"embed_tokens.weight": Payload()}, content, _use_new_zipfile_serialization=zipped)
        cache = HandCache()
        bent = cache.frozen if name == FROZEN else cache.shards[1]
        bent.edit_file = lambda data, content=content: content.getvalue()
        assert_refuses(cache.save(tmp_path / str(number)))
    for text in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        cache = HandCache()
        cache.others[f"target/{text}"] = pickle.dumps(Payload())
        read_all(cache.save(tmp_path / text))
    assert not (tmp_path / "executed").exists()


def test_a_link_as_long_as_the_file_it_stands_for_is_refused(tmp_path):
    """A link's own size is the length of its text, which its maker chooses."""
    cache = HandCache()
    content = cache.others["target/config.json"] = b"{}" + b" " * 98
    path = cache.save(tmp_path / "cache")
    config = path / "target/config.json"
    config.rename(tmp_path / "outside")
    text = "../../outside"
    config.symlink_to("." + "/" * (len(content) - len(text) - 1) + text)  # slashes count for one
    assert config.lstat().st_size == len(content)
    assert config.read_bytes() == content
    assert_refuses(path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_other_weights_in_target_are_refused(tmp_path, name):
    """Rule 13, for weights that the file table lists."""
    cache = HandCache()
    cache.others[f"target/{name}"] = b"weights"
    assert_refuses(cache.save(tmp_path))


@pytest.mark.parametrize("what", ["nothing", "empty directory", "file", "other directory"])
def test_what_is_not_a_cache_is_refused(tmp_path, what):
    path = tmp_path / "cache"
    if what == "empty directory":
        path.mkdir()
    elif what == "file":
        path.write_text("hello")
    elif what == "other directory":
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"")
    assert "no cache" in assert_refuses(path)


def frozen_shape(cache: HandCache) -> None:
    cache.frozen.entries[0][2] = [HIDDEN, VOCAB]


def frozen_short(cache: HandCache) -> None:
    cache.frozen.entries[1][2:] = [[VOCAB - 1, HIDDEN], bytes((VOCAB - 1) * HIDDEN * 2)]


def frozen_dtype(name: str, width: int) -> Bend:
    def bend(cache: HandCache) -> None:
        cache.frozen.entries[1][1:] = [name, [VOCAB, HIDDEN], bytes(VOCAB * HIDDEN * width)]

    return bend


def frozen_file(edit: Callable[[bytes], bytes]) -> Bend:
    return lambda cache: setattr(cache.frozen, "edit_file", edit)


FROZEN_BENDS: dict[str, Bend] = {
    "turned round": frozen_shape,
    "a row too few": frozen_short,
    "no head": lambda c: c.frozen.entries.pop(0) and None,
    "no embedding": lambda c: c.frozen.entries.pop(1) and None,
    "a third tensor": lambda c: c.frozen.entries.append(["more", "U8", [1], b"x"]),
    "another name": lambda c: c.frozen.entries[0].__setitem__(0, "head.weight"),
    "whole numbers": frozen_dtype("I32", 4),
    "bytes": frozen_dtype("U8", 1),
    "cut": frozen_file(lambda d: d[:-1]),
    "too long": frozen_file(lambda d: d + b"x"),
    "empty": frozen_file(lambda d: b"x"),
    "header length huge": frozen_file(lambda d: lengthen(d, 2**63)),
    "header not JSON": lambda c: setattr(c.frozen, "edit_text", lambda t: b"}" + t[1:]),
    "header nested deep": lambda c: setattr(c.frozen, "edit_text", lambda t: b"[" * 10**5),
}


@pytest.mark.parametrize("name", FROZEN_BENDS)
def test_bent_frozen_weights_are_refused(tmp_path, name):
    cache = HandCache()
    FROZEN_BENDS[name](cache)
    path = cache.save(tmp_path)
    reader = CacheReader(path)
    assert "frozen.safetensors" in assert_refuses(path, lambda _: reader.frozen())
