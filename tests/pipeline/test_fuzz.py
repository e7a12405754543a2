"""Random damage: the original data or a CacheError, and verify names the file whatever a reader saw."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from tests.pipeline.written import every_byte, read_all, small_cache

pytestmark = pytest.mark.usefixtures("bounded_memory")


@pytest.fixture(scope="module")
def good_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_cache(tmp_path_factory.mktemp("fuzz") / "cache")


def check_damage(path: Path, name: str, original: list, note: str) -> str:
    """What reading the cache gave: "same", "changed" or "refused"; and what must be true of it then.

    A damaged manifest is always refused. Damage in any other file, if the cache can be opened at all, is
    found by verify, which names that file and no other, whether or not reading saw anything.
    """
    try:
        outcome = "same" if read_all(path) == original else "changed"
    except CacheError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{note}: not one line: {error}") from None
        outcome = "refused"
    except Exception as error:
        raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
    if name == "manifest.json":
        assert outcome == "refused", note
        return outcome
    try:
        reader = CacheReader(path)
    except CacheError:
        assert outcome == "refused", note
        assert name == "samples.arrow", note  # opening reads no other
    else:
        assert reader.verify() == [name], note
    return outcome


def damaged_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    changed = bytearray(data)
    flips = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, mask = rng.randrange(len(changed)), rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        changed[at] ^= mask
        flips.append((at, mask))
    return bytes(changed), f"flips {flips}"


@pytest.mark.filterwarnings("ignore:.*SGLang:UserWarning")  # a flip may make a layer the last one
@pytest.mark.parametrize("seed", range(3))
def test_random_flips_in_random_files(good_cache, tmp_path, seed):
    original = read_all(good_cache)
    path = shutil.copytree(good_cache, tmp_path / "cache")
    rng = random.Random(seed)
    names = [name for name in every_byte(path) if (path / name).stat().st_size]
    outcomes = set()
    for i in range(100):
        name = rng.choice(names)
        before = (path / name).read_bytes()
        after, note = damaged_bytes(rng, before)
        if after == before:
            continue
        (path / name).write_bytes(after)
        outcomes.add(check_damage(path, name, original, f"seed {seed}, flip {i}, {name}: {note}"))
        (path / name).write_bytes(before)
    assert {"refused", "changed"} <= outcomes  # the fuzz reaches both sides
    assert read_all(path) == original


@pytest.mark.filterwarnings("ignore:.*SGLang:UserWarning")
@pytest.mark.parametrize("name", ["samples.arrow", "manifest.json"])
def test_random_flips_in_what_is_parsed(good_cache, tmp_path, name):
    """Index and manifest are read by parsers of others: they get more flips of their own."""
    original = read_all(good_cache)
    path = shutil.copytree(good_cache, tmp_path / "cache")
    before = (path / name).read_bytes()
    rng = random.Random(f"{name}")
    for i in range(250):
        after, note = damaged_bytes(rng, before)
        if after != before:
            (path / name).write_bytes(after)
            check_damage(path, name, original, f"flip {i}, {name}: {note}")


def test_a_bit_flip_in_every_kind_of_data_is_found_by_verify(good_cache, tmp_path):
    path = shutil.copytree(good_cache, tmp_path / "cache")
    for name in every_byte(path):
        if name != "manifest.json":
            before = (path / name).read_bytes()
            (path / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            reader = None
            try:
                reader = CacheReader(path)
            except CacheError:
                assert name == "samples.arrow"  # its last byte is a magic number
            if reader:
                assert reader.verify() == [name]
            (path / name).write_bytes(before)
    assert json.loads((path / "manifest.json").read_text())["status"] == "complete"
