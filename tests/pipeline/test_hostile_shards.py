"""Rules 1 to 7: shards that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pipeline.cache import CacheReader
from tests.pipeline.handmade import HIDDEN, VOCAB, HandCache, Tensors
from tests.pipeline.hostile import Bend, assert_refuses, lengthen

pytestmark = pytest.mark.usefixtures("bounded_memory")


def shard(edit: Callable[[Tensors], None]) -> Bend:
    return lambda cache: edit(cache.shards[0])


def header(edit: Callable[[dict], object]) -> Bend:
    def bend(cache: HandCache) -> None:
        def apply(values: dict) -> dict:
            edit(values)
            return values

        cache.shards[0].edit_header = apply

    return bend


def text(edit: Callable[[bytes], bytes]) -> Bend:
    return lambda cache: setattr(cache.shards[0], "edit_text", edit)


def data(edit: Callable[[bytes], bytes]) -> Bend:
    return lambda cache: setattr(cache.shards[0], "edit_file", edit)


def replace(name: str, position: int, value: object) -> Bend:
    """Change one piece (1 dtype, 2 shape, 3 bytes) of a tensor of shard 0, so that its offsets follow."""
    return shard(lambda tensors: tensors.entry(name).__setitem__(position, value))


def overlap(values: dict) -> None:
    """context.2 moves back onto the tensor before it, which leaves the same bytes unclaimed after it."""
    start, stop = values["context.2"]["data_offsets"]
    values["context.2"]["data_offsets"] = [start - 2, stop - 2]


def share(values: dict) -> None:
    """Two layers claim the same bytes."""
    values["context.0"]["data_offsets"] = values["context.2"]["data_offsets"]


def swap_ends(values: dict) -> None:
    values["context.2"]["data_offsets"].reverse()


def set_offsets(name: str, offsets: object) -> Bend:
    return header(lambda values: values[name].__setitem__("data_offsets", offsets))


def gap_before(name: str, hidden: bytes) -> Bend:
    """Bytes between two tensors that no tensor claims."""

    def bend(cache: HandCache) -> None:
        tensors = cache.shards[0]
        tensors.entries.insert(
            tensors.entries.index(tensors.entry(name)), ["junk", "U8", [len(hidden)], hidden]
        )
        header(lambda values: values.pop("junk"))(cache)

    return bend


def rename(old: str, new: str) -> Bend:
    return shard(lambda tensors: tensors.entry(old).__setitem__(0, new))


DIGITS = 10**4300 - 1  # the longest integer that Python's JSON reader takes


SHARD_BENDS: dict[str, Bend] = {
    "empty": data(lambda d: b""),
    "seven bytes": data(lambda d: d[:7]),
    "only a length": data(lambda d: d[:8]),
    "cut in the header": data(lambda d: d[:40]),
    "cut in the data": data(lambda d: d[:-1]),
    "cut after the header": data(lambda d: d[: 8 + struct.unpack_from("<Q", d)[0]]),
    "one byte too long": data(lambda d: d + b"\0"),
    "another file appended": data(lambda d: d + b"PK\x03\x04" * 100),
    "gap with another file in it": gap_before("context.0", b"PK\x03\x04"),
    "gap before the first tensor": gap_before("loss_mask", b"\0"),
    "overlap": header(overlap),
    "two tensors share their bytes": header(share),
    "offsets swapped": header(swap_ends),
    "offsets beyond the file": set_offsets("last_hidden", [10**9, 10**9 + 30]),
    "offsets negative": set_offsets("loss_mask", [-9, 0]),
    "offsets huge": set_offsets("loss_mask", [2**64, 2**64 + 9]),
    "offsets of thousands of digits": set_offsets("loss_mask", [-DIGITS, DIGITS]),
    "offsets as floats": set_offsets("loss_mask", [0.0, 9.0]),
    "offsets as booleans": set_offsets("loss_mask", [False, True]),
    "offsets as text": set_offsets("loss_mask", ["0", "9"]),
    "one offset": set_offsets("loss_mask", [9]),
    "three offsets": set_offsets("loss_mask", [0, 9, 9]),
    "offsets are null": set_offsets("loss_mask", None),
    "no offsets": header(lambda h: h["loss_mask"].pop("data_offsets")),
    "no dtype": header(lambda h: h["loss_mask"].pop("dtype")),
    "no shape": header(lambda h: h["loss_mask"].pop("shape")),
    "an unknown key in a tensor's entry": header(lambda h: h["loss_mask"].__setitem__("offset", 0)),
    "an entry that is a list": header(lambda h: h.__setitem__("loss_mask", ["U8", [9], [0, 9]])),
    "F16 for BF16": replace("context.0", 1, "F16"),
    "I16 for BF16 in last_hidden": replace("last_hidden", 1, "I16"),
    "U32 for I32": replace("input_ids", 1, "U32"),
    "BOOL for U8": replace("loss_mask", 1, "BOOL"),
    "unknown dtype": replace("loss_mask", 1, "Q9"),
    "dtype is a list": replace("loss_mask", 1, ["U8"]),
    "shape turned round": replace("context.0", 2, [HIDDEN, 9]),
    "shape flat": replace("context.0", 2, [9 * HIDDEN]),
    "shape of floats": replace("loss_mask", 2, [9.0]),
    "shape with a boolean": replace("context.0", 2, [9, HIDDEN, True]),
    "shape negative": replace("context.0", 2, [-9, -HIDDEN]),
    "shape huge": replace("context.0", 2, [2**62, HIDDEN]),
    "a row missing": replace("context.0", 3, bytes(8 * HIDDEN * 2)),
    "extra tensor": shard(lambda t: t.entries.append(["extra", "U8", [4], b"junk"])),
    "extra empty tensor": shard(lambda t: t.entries.append(["extra", "U8", [0], b""])),
    "extra layer": shard(lambda t: t.entries.append(["context.3", *t.entry("context.0")[1:]])),
    "a layer missing": shard(lambda t: t.entries.remove(t.entry("context.5"))),
    "last_hidden missing": shard(lambda t: t.entries.remove(t.entry("last_hidden"))),
    "a layer by another id": rename("context.0", "context.1"),
    "a layer id with a leading zero": rename("context.0", "context.00"),
    "metadata": header(lambda h: h.__setitem__("__metadata__", {"format": "pt"})),
    "empty metadata": header(lambda h: h.__setitem__("__metadata__", {})),
    "header is not JSON": text(lambda t: b"\x80\x04" + t[2:]),
    "header is cut JSON": text(lambda t: t[:-1]),
    "header with a comma too many": text(lambda t: t[:-1] + b",}"),
    "header is a list": text(lambda t: b"[" + t + b"]"),
    "header is null": text(lambda t: b"null"),
    "header is a number": text(lambda t: b"7"),
    "header is empty": text(lambda t: b""),
    "header is an empty object": text(lambda t: b"{}"),
    "header is not UTF-8": text(lambda t: t.replace(b"BF16", b"BF\xff6")),
    "header is UTF-16": text(lambda t: t.decode().encode("utf-16")),
    "header starts with a byte order mark": text(lambda t: b"\xef\xbb\xbf" + t),
    "header starts with a space": text(lambda t: b" " + t),
    "header names a tensor twice": text(lambda t: b'{"loss_mask": {"dtype": "evil"}, ' + t[1:]),
    "header names a tensor's dtype twice": text(
        lambda t: t.replace(b'{"dtype"', b'{"dtype": "Q9", "dtype"', 1)
    ),
    "header nested 100,000 deep": text(lambda t: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "header with a long number": text(lambda t: b'{"loss_mask": ' + b"9" * 10_000 + b"}"),
    "header over 1 MiB": text(lambda t: t + b" " * 2**20),
    "header length huge": data(lambda d: lengthen(d, 2**63)),
    "header length all ones": data(lambda d: lengthen(d, 2**64 - 1)),
    "header length one too large": data(lambda d: lengthen(d, struct.unpack_from("<Q", d)[0] + 1)),
    "header length one too small": data(lambda d: lengthen(d, struct.unpack_from("<Q", d)[0] - 1)),
    "header length to the end": data(lambda d: lengthen(d, len(d) - 8)),
    "header length zero": data(lambda d: lengthen(d, 0)),
    # Rules 1, 2, 5, 7, 10: what the tokens and masks themselves may say.
    "mask with a two": replace("loss_mask", 3, bytes([0, 0, 1, 0, 2, 1, 1, 0, 1])),
    "mask with one label fewer than the index says": replace(
        "loss_mask", 3, bytes([0, 0, 0, 1, 1, 1, 1, 0, 1])
    ),
    "mask with one label more than the index says": replace(
        "loss_mask", 3, bytes([0, 1, 1, 1, 1, 1, 1, 0, 1])
    ),
    "mask whose sample does not end supervised": replace("loss_mask", 3, bytes([0, 1, 1, 1, 0, 1, 1, 0, 1])),
    "mask with other candidates than the index says": replace(
        "loss_mask", 3, bytes([0, 1, 0, 1, 1, 1, 1, 0, 1])
    ),
    "token id negative": replace("input_ids", 3, struct.pack("<9i", 3, -1, 4, 1, 5, 9, 2, 6, 5)),
    "token id beyond the vocabulary": replace(
        "input_ids", 3, struct.pack("<9i", 3, VOCAB, 4, 1, 5, 9, 2, 6, 5)
    ),
    "tokens that the sample's id does not name": replace(
        "input_ids", 3, struct.pack("<9i", 3, 2, 4, 1, 5, 9, 2, 6, 5)
    ),
}


@pytest.mark.parametrize("name", SHARD_BENDS)
def test_a_bent_shard_is_refused(tmp_path, name):
    cache = HandCache()
    SHARD_BENDS[name](cache)
    assert str(tmp_path) in assert_refuses(cache.save(tmp_path))


def test_a_shard_that_shrinks_under_an_open_reader_is_refused(tmp_path):
    path = HandCache().save(tmp_path)
    reader = CacheReader(path)
    shard_0 = path / "shards/00000.safetensors"
    shard_0.write_bytes(shard_0.read_bytes()[:-3])
    assert_refuses(path, lambda _: reader.read(0))


def test_a_shard_that_vanishes_under_an_open_reader_is_refused_and_reported(tmp_path):
    path = HandCache().save(tmp_path)
    reader = CacheReader(path)
    (path / "shards/00001.safetensors").unlink()
    assert_refuses(path, lambda _: reader.read(2))
    assert reader.verify() == ["shards/00001.safetensors"]
