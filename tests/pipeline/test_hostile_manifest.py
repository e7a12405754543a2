"""Rules 14 to 20: manifests that lie, also through the command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from pipeline.cache import CacheReader
from pipeline.cache.manifest import read_manifest
from pipeline.errors import CacheError
from tests.conftest import assert_refused, run_cli
from tests.pipeline.handmade import HIDDEN, HandCache, Tensors, seal
from tests.pipeline.hostile import Bend, assert_refuses
from tests.pipeline.written import small_cache

pytestmark = pytest.mark.usefixtures("bounded_memory")


def put(where: str, value: object) -> Bend:
    """Set a value of the manifest by its dotted path."""

    def bend(cache: HandCache) -> None:
        def edit(manifest: dict) -> dict:
            *tables, key = [int(k) if k.isdigit() else k for k in where.split(".")]
            table = manifest
            for name in tables:
                table = table[name]
            table[key] = value
            return manifest

        cache.edit_manifest = edit

    return bend


def drop(where: str) -> Bend:
    def bend(cache: HandCache) -> None:
        def edit(manifest: dict) -> dict:
            *tables, key = where.split(".")
            table = manifest
            for name in tables:
                table = table[name]
            del table[key]
            return manifest

        cache.edit_manifest = edit

    return bend


def manifest_text(edit: Callable[[bytes], bytes]) -> Bend:
    return lambda cache: setattr(cache, "edit_json", edit)


def named(name: str, content: bytes = b"stranger") -> Bend:
    """The file table lists one more file, which need not be there."""

    def bend(cache: HandCache) -> None:
        record = {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        cache.edit_manifest = lambda m: {**m, "files": [*m["files"], record]}

    return bend


def unlisted(name: str) -> Bend:
    def bend(cache: HandCache) -> None:
        cache.edit_manifest = lambda m: {**m, "files": [f for f in m["files"] if f["file"] != name]}

    return bend


def twice(manifest: dict) -> dict:
    """A file listed with a wrong size first and the right one later."""
    wrong = {**manifest["files"][0], "bytes": 1, "sha256": "00" * 32}
    return {**manifest, "files": [wrong, *manifest["files"]]}


def edit_plan(cache: HandCache, edit: Callable[[list], object]) -> None:
    """The same change to every column of the plan."""
    for column in cache.manifest["plan"].values():
        edit(column)


def without_last_hidden(shards: list[Tensors]) -> None:
    for shard in shards:
        shard.entries.remove(shard.entry("last_hidden"))


MANIFEST_BENDS: dict[str, Bend] = {
    "empty": manifest_text(lambda t: b""),
    "not JSON": manifest_text(lambda t: b"\x80\x04\x95"),
    "cut": manifest_text(lambda t: t[:-20]),
    "not UTF-8": manifest_text(lambda t: t.replace(b"a hand", b"a \xff\xfe")),
    "UTF-16": manifest_text(lambda t: t.decode().encode("utf-16")),
    "a list": manifest_text(lambda t: b"[" + t + b"]"),
    "null": manifest_text(lambda t: b"null"),
    "nested 100,000 deep": manifest_text(lambda t: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a number of 10,000 digits": manifest_text(
        lambda t: t.replace(b'"batch_tokens": 32', b'"batch_tokens": ' + b"6" * 10**4)
    ),
    "a float of 400 digits": manifest_text(
        lambda t: t.replace(b'"embedding_scale": 1.0', b'"embedding_scale": 1' + b"0" * 400)
    ),
    "another format": put("format", "dspark-run"),
    "no format": drop("format"),
    "newer version": put("format_version", 2),
    "far newer version": put("format_version", 999),
    "version 0": put("format_version", 0),
    "version as text": put("format_version", "1"),
    "version as float": put("format_version", 1.0),
    "version true": put("format_version", True),
    "version null": put("format_version", None),
    "no version": drop("format_version"),
    "incomplete": put("status", "incomplete"),
    "unknown status": put("status", "done"),
    "no status, which means incomplete": drop("status"),
    "unknown key": put("surprise", 1),
    "unknown key in the identity": put("identity.surprise", 1),
    "unknown key in the target": put("identity.target.surprise", 1),
    "unknown key in the plan": put("plan.surprise", [1, 1]),
    "unknown key in the shard table": put("shards.surprise", [1, 1]),
    "unknown key in a file record": put("files.0.surprise", 1),
    "unknown key of a megabyte": put("x" * 2**20, 1),
    "missing identity": drop("identity"),
    "missing plan": drop("plan"),
    "missing weights hash": drop("identity.target.weights"),
    "missing features": drop("identity.features"),
    "layers from before the final norm": put("identity.features.last_hidden", "pre_norm"),
    "a codec for states that are left out": lambda c: (
        without_last_hidden(c.shards),
        c.manifest["identity"]["features"].update(last_hidden="none"),
    ),
    "states without a codec": put("identity.features.last_codec", "none"),
    "last hidden states left out that the shards hold": lambda c: c.manifest["identity"]["features"].update(
        last_hidden="none", last_codec="none"
    ),
    "last hidden states that the shards lack": lambda c: without_last_hidden(c.shards),
    "unknown codec": put("identity.features.context_codec", "zip"),
    "unknown last codec": put("identity.features.last_codec", "pickle"),
    "codec name with a line break": put("identity.features.last_codec", "a\nb"),
    "no layers": put("identity.features.layer_ids", []),
    "layers out of order": put("identity.features.layer_ids", [2, 0, 5]),
    "a layer twice": put("identity.features.layer_ids", [0, 2, 2, 5]),
    "a layer that the target lacks": put("identity.features.layer_ids", [0, 2, 7]),
    "a layer below -1": put("identity.features.layer_ids", [-2, 0, 2, 5]),
    "a layer that is not stored": put("identity.features.layer_ids", [0, 2, 3, 5]),
    "a layer as text": put("identity.features.layer_ids", ["0"]),
    "layers are a number": put("identity.features.layer_ids", 3),
    "hidden size 0": put("identity.target.hidden_size", 0),
    "hidden size negative": put("identity.target.hidden_size", -3),
    "hidden size huge": put("identity.target.hidden_size", 2**47),
    "hidden size absurd": put("identity.target.hidden_size", 10**30),
    "hidden size a float": put("identity.target.hidden_size", 3.0),
    "hidden size not the shards'": put("identity.target.hidden_size", HIDDEN + 1),
    "vocabulary negative": put("identity.target.vocab_size", -1),
    "vocabulary huge": put("identity.target.vocab_size", 2**48),
    "no layers in the target": put("identity.target.num_layers", 0),
    "tied is a number": put("identity.target.tied_embeddings", 0),
    "tied although there is a head": put("identity.target.tied_embeddings", True),
    "plan is a list": put("plan", [{"samples": 2, "tokens": 9, "last_rows": 5}]),
    "plan with a shard too few": lambda c: edit_plan(c, lambda column: column.pop()),
    "plan with a shard too many": lambda c: edit_plan(c, lambda column: column.append(column[1])),
    "plan with columns of different length": lambda c: c.manifest["plan"]["tokens"].append(2),
    "plan without a column": drop("plan.tokens"),
    "plan column a number": put("plan.tokens", 9),
    "plan tokens 0": put("plan.tokens.0", 0),
    "plan tokens negative": put("plan.tokens.0", -9),
    "plan tokens huge": put("plan.tokens.0", 2**48),
    "plan tokens absurd": put("plan.tokens.0", 2**80),
    "plan tokens a float": put("plan.tokens.0", 9.0),
    "plan samples 0": put("plan.samples.0", 0),
    "plan samples huge": put("plan.samples.0", 2**48),
    "plan samples a boolean": put("plan.samples.1", True),
    "plan label rows negative": put("plan.last_rows.0", -1),
    "plan label rows other than the index's": put("plan.last_rows.0", 6),
    "shard size 0": put("shards.bytes.0", 0),
    "shard size negative": put("shards.bytes.0", -1),
    "shard size huge": put("shards.bytes.0", 2**80),
    "shard size other than the file's": put("shards.bytes.0", 3),
    "shard size a float": put("shards.bytes.0", 3.0),
    "shard hash too short": put("shards.sha256.0", "ab"),
    "shard hash in upper case": put("shards.sha256.0", "AB" * 32),
    "shard hash with a line break": put("shards.sha256.1", "ab" * 32 + "\n"),
    "shard hash a number": put("shards.sha256.0", 7),
    "a shard without a hash": put("shards.sha256", ["ab" * 32]),
    "a shard without a size": put("shards.bytes", [3]),
    "a shard beyond the plan": put("shards", {"bytes": [3, 3, 3], "sha256": ["ab" * 32] * 3}),
    "no shards": put("shards", {"bytes": [], "sha256": []}),
    "no shard table": drop("shards"),
    "file size negative": put("files.0.bytes", -1),
    "file size huge": put("files.0.bytes", 2**80),
    "file size other than the file's": put("files.0.bytes", 3),
    "file listed twice with two sizes": lambda c: setattr(c, "edit_manifest", twice),
    "file named by a number": put("files.0.file", 7),
    "no files": put("files", []),
    "files is null": put("files", None),
    "index not listed": unlisted("samples.arrow"),
    "file hash too short": put("files.0.sha256", "ab"),
    "frozen weights not listed": unlisted("target/frozen.safetensors"),
    "a lone surrogate in a name": named("target/\ud800"),
    "a listed file that is missing": named("target/tokenizer_config.json"),
    "a line break in a key": put("rows", {"a\nb": "x"}),
    "an absolute path as the data's name": put("identity.data.sources.1", "/home/someone/chats.jsonl"),
    "an absolute path as the target's name": put("identity.target.name", "/models/tiny"),
    "a megabyte of text for a number": put("identity.batch_tokens", "x" * 2**20),
}


@pytest.mark.parametrize("name", MANIFEST_BENDS)
def test_a_bent_manifest_is_refused(tmp_path, name):
    cache = HandCache()
    MANIFEST_BENDS[name](cache)
    assert "its checksum" not in assert_refuses(cache.save(tmp_path))  # it is right, the manifest is not


def sealed(edit: Callable[[bytes], bytes]) -> Bend:
    """A change after the checksum was computed."""
    return lambda cache: setattr(cache, "edit_sealed", edit)


def digits(edit: Callable[[bytes], bytes]) -> Bend:
    """A change of the checksum itself."""

    def apply(data: bytes) -> bytes:
        before, name, after = data.partition(b'"checksum": "')
        return before + name + edit(after[:64]) + after[64:]

    return sealed(apply)


CHECKSUM_BENDS: dict[str, Bend] = {
    "no checksum": drop("checksum"),
    "checksum null": put("checksum", None),
    "checksum a number": put("checksum", 0),
    "checksum a list": put("checksum", ["0" * 64]),
    "checksum empty": put("checksum", ""),
    "checksum of zeros": digits(lambda d: b"0" * 64),
    "checksum of another file": put("checksum", hashlib.sha256(b"another").hexdigest()),
    "checksum too short": put("checksum", "0" * 63),
    "checksum in upper case": digits(bytes.upper),
    "checksum with a line break": put("checksum", "0" * 64 + "\n"),
    "checksum off by a digit": digits(lambda d: d[:-1] + (b"1" if d.endswith(b"0") else b"0")),
    "checksum written with an escape": digits(lambda d: b"\\u%04x" % d[0] + d[1:]),
    "a value changed": sealed(lambda d: d.replace(b'"batch_tokens": 32', b'"batch_tokens": 33')),
    "a name changed": sealed(lambda d: d.replace(b'"created_by": "a hand"', b'"created_by": "A hand"')),
    "a space more": sealed(lambda d: d + b" "),
    "a line break more": sealed(lambda d: d + b"\n"),
    "a space for a line break": sealed(lambda d: d.replace(b", ", b",\n", 1)),
    "a zero byte more": sealed(lambda d: d + b"\0"),
    "written again with spaces": sealed(lambda d: d.replace(b'": ', b'" : ')),
}


@pytest.mark.parametrize("name", CHECKSUM_BENDS)
def test_a_manifest_without_its_checksum_is_refused(tmp_path, name):
    cache = HandCache()
    CHECKSUM_BENDS[name](cache)
    assert "manifest.json is damaged" in assert_refuses(cache.save(tmp_path))


def test_a_manifest_with_any_byte_changed_is_refused(tmp_path):
    """Every byte in turn, spaces and line breaks among them: nothing of what it says can change unseen."""
    manifest = small_cache(tmp_path / "cache") / "manifest.json"
    good = manifest.read_bytes()
    assert good.count(b"\n") > 20
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 1 << at % 8
        manifest.write_bytes(changed)
        with pytest.raises(CacheError) as caught:
            read_manifest(tmp_path / "cache")
        assert len(str(caught.value).splitlines()) == 1, at
    manifest.write_bytes(good)
    assert len(CacheReader(tmp_path / "cache")) == 7


def test_the_checksum_is_that_of_the_format_page(tmp_path):
    """Of a written manifest too, taken apart by hand."""
    data = (small_cache(tmp_path / "cache") / "manifest.json").read_bytes()
    before, name, after = data.partition(b'"checksum": "')
    digest = hashlib.sha256(before + name + b"0" * 64 + after[64:]).hexdigest()
    assert after[:64].decode() == digest
    assert seal(before + name + b"0" * 64 + after[64:]) == data


NAME_BENDS: dict[str, Bend] = {
    "../x": named("../x"),
    "target/../../x": named("target/../../x"),
    "target/..": named("target/.."),
    "target/.": named("target/."),
    "target/": named("target/"),
    "target": named("target"),
    "a folder in target": named("target/more/x"),
    "a backslash": named("target\\..\\x"),
    "a backslash in target": named("target/..\\x"),
    "absolute path": named("/etc/passwd"),
    "absolute path in target": named("target//etc/passwd"),
    "a NUL": named("target/x\0y"),
    "a line break in a name": named("target/x\ny"),
    "an empty name": named(""),
    "shards/../x": named("shards/../x"),
    "a shard among the other files": named("shards/00000.safetensors"),
    "shard beyond the plan": named("shards/00002.safetensors"),
    "shard by another spelling": named("shards/0.safetensors"),
    "shard with an upper case name": named("SHARDS/00000.safetensors"),
    "progress file": named("progress/00000.json"),
    "the manifest itself": named("manifest.json"),
    "a file at the top": named("notes.txt"),
}


@pytest.mark.parametrize("name", NAME_BENDS)
def test_a_name_that_no_cache_can_have_is_refused_for_what_it_is(tmp_path, name):
    """Not because such a file is missing, which would be a question of what lies outside the cache."""
    cache = HandCache()
    NAME_BENDS[name](cache)
    assert "manifest.json is damaged" in assert_refuses(cache.save(tmp_path))


@pytest.mark.parametrize("where", ["identity.batch_tokens", "format_version", "rows"])
def test_every_depth_of_nesting_is_refused(tmp_path, where):
    """Python's JSON reader takes nests that its repr does not, at a depth that depends on the caller's."""
    for depth in range(700, 1010):
        cache = HandCache()
        put(where, "NEST")(cache)
        nest = ("[" * depth + "]" * depth).encode()
        cache.edit_json = lambda text, nest=nest: text.replace(b'"NEST"', nest)
        if depth == 700:
            cache.edit_sealed = lambda data, nest=nest: data.replace(nest, b"NEST")
            path = cache.save(tmp_path)
            before, digits, after = (path / "manifest.json").read_bytes().partition(b'"checksum": "')
            unsealed = before + digits + b"0" * 64 + after[64:]
        (path / "manifest.json").write_bytes(seal(unsealed.replace(b"NEST", nest)))
        with pytest.raises(CacheError) as caught:
            CacheReader(path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("version", "words"),
    [(2, ["version 2", "version 1"]), (None, ["None"]), ("1", ["'1'"])],
)
def test_another_version_is_named_with_the_one_expected(tmp_path, version, words):
    cache = HandCache()
    put("format_version", version)(cache)
    message = assert_refuses(cache.save(tmp_path))
    for word in words:
        assert word in message


def test_a_version_is_refused_before_anything_else_is_judged(tmp_path):
    """A newer version may have other keys: the message must be about the version."""
    cache = HandCache()
    cache.edit_manifest = lambda m: {"format": "dspark-cache", "format_version": 2, "brand": "new"}
    assert "version 2" in assert_refuses(cache.save(tmp_path))


def test_an_incomplete_cache_says_how_far_it_is_and_what_to_do(tmp_path):
    cache = HandCache()
    put("status", "incomplete")(cache)
    path = cache.save(tmp_path)
    (path / "progress").mkdir()
    (path / "progress/00000.json").write_text("{}")
    message = assert_refuses(path)
    assert "incomplete" in message
    assert "1 of 2" in message


def test_a_sparse_manifest_of_a_terabyte_is_refused_unread(tmp_path):
    path = HandCache().save(tmp_path)
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(2**40)
    assert_refuses(path)


def test_a_cache_without_samples_is_refused_or_empty(tmp_path):
    """No rule forbids it. Whatever a reader makes of it, it is no crash."""
    cache = HandCache()
    edit_plan(cache, list.clear)
    cache.shards = []
    for values in cache.columns.values():
        values.clear()
    path = cache.save(tmp_path)
    try:
        reader = CacheReader(path)
    except CacheError:
        assert_refuses(path)
    else:
        assert len(reader) == 0


@pytest.mark.parametrize(
    "name", ["newer version", "unknown key", "../x", "no checksum", "a lone surrogate in a name"]
)
def test_the_command_line_says_it_in_one_line(tmp_path, name):
    cache = HandCache()
    {**MANIFEST_BENDS, **NAME_BENDS, **CHECKSUM_BENDS}[name](cache)
    assert_refused(run_cli("verify", cache.save(tmp_path / "cache")), 1, str(tmp_path / "cache"))
