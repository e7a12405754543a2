"""`dspark verify`: every kind of damage is named, and what it sets aside is captured again, and only that."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.manifest import ShardFiles, write_manifest
from pipeline.cache.verify import Verified, verify_cache
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.pipeline.handmade import HandCache
from tests.pipeline.written import every_byte

SHARD, INDEX, FROZEN = "shards/00001.safetensors", "samples.arrow", "target/frozen.safetensors"
CONFIG = "target/config.json"


@pytest.fixture
def cache(cache_dir, tmp_path) -> Path:
    return shutil.copytree(cache_dir, tmp_path / "cache")


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def as_link(path: Path) -> None:
    path.rename(path.parents[2] / "outside")
    path.symlink_to(path.parents[2] / "outside")


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.unlink()
        make(path)

    return harm


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing"),
    "short": (lambda path: os.truncate(path, 100), r"expected [\d,]+ bytes, got 100"),
    "a link": (as_link, "expected a plain file, got a link"),
    "a folder": (replaced(Path.mkdir), "expected a plain file, got a folder"),
    "a pipe": (replaced(os.mkfifo), "expected a plain file, got a pipe"),
}


def bad(found: Verified) -> dict[str, str]:
    return {problem.file: problem.reason for problem in found.problems}


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
def test_a_good_cache_is_good(cache_dir, fast):
    before = every_byte(cache_dir)
    said = run_ok("verify", cache_dir, *["--fast"] * fast)
    listed = [name for name in before if name != "manifest.json"]
    assert f"{len(listed)} files, {sum(len(before[name]) for name in listed):,} bytes" in said
    assert said.strip().endswith("good")
    assert every_byte(cache_dir) == before


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
@pytest.mark.parametrize("name", [SHARD, FROZEN, CONFIG])
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_file_is_named_with_what_is_wrong(cache, name, harm, fast):
    make, reason = HARMS[harm]
    make(cache / name)
    found = bad(verify_cache(cache, fast=fast, threads=2))
    assert list(found) == [name]
    assert re.fullmatch(reason, found[name])


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
@pytest.mark.parametrize("harm", ["missing", "short", "a folder", "a pipe"])
def test_a_harmed_index_is_a_bad_file_and_the_others_are_still_checked(cache, harm, fast):
    HARMS[harm][0](cache / INDEX)
    (cache / SHARD).unlink()
    found = bad(verify_cache(cache, fast=fast))
    assert found.keys() == {INDEX, SHARD}
    assert re.fullmatch(HARMS[harm][1], found[INDEX])


@pytest.mark.parametrize("name", [SHARD, INDEX, FROZEN, CONFIG])
def test_a_flipped_bit_is_found_by_the_hash(cache, name):
    flip(cache / name, at=-20)
    before = hashlib.sha256((cache / name).read_bytes()).hexdigest()
    assert before not in (cache / "manifest.json").read_text()
    result = run_cli("verify", cache)
    assert_refused(result, 1, f"1 of {len(every_byte(cache)) - 1} files", "--repair")
    assert result.stdout.splitlines() == [f"damaged: {cache / name}: its hash differs"]


def test_a_sample_id_flipped_in_the_index_is_found_without_hashing(cache):
    """The samples' ids are what identity.data.sha256 is of."""
    wanted = CacheReader(cache).sample_ids[3].tobytes()
    flip(cache / INDEX, at=(cache / INDEX).read_bytes().index(wanted))
    assert bad(verify_cache(cache, fast=True)).keys() == {INDEX}


@pytest.mark.parametrize("at", [0, 20], ids=["length", "text"])
def test_fast_reads_headers_and_no_data(cache, at):
    flip(cache / SHARD, at=-1)
    assert not verify_cache(cache, fast=True).problems
    flip(cache / SHARD, at=at)
    assert bad(verify_cache(cache, fast=True)).keys() == {SHARD}
    flip(cache / FROZEN, at=at)
    assert bad(verify_cache(cache, fast=True)).keys() == {SHARD, FROZEN}


def test_every_bad_file_is_reported_in_the_order_of_the_manifest(cache):
    shards = sorted((cache / "shards").iterdir())
    for path in shards:
        flip(path)
    (cache / FROZEN).unlink()
    names = [f"shards/{path.name}" for path in shards]
    assert [p.file for p in verify_cache(cache, threads=3).problems] == [*names, FROZEN]


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
def test_progress_ends_at_the_bytes_that_were_to_be_checked(cache, fast):
    """Whatever is wrong with a file: a bar that stops short looks like one that hangs."""
    expected = sum(len(data) for name, data in every_byte(cache).items() if name != "manifest.json")
    os.truncate(cache / SHARD, 100)
    (cache / FROZEN).unlink()
    totals, done = [], []
    verify_cache(cache, fast=fast, threads=3, begin=totals.append, progress=done.append)
    assert totals == [expected]
    assert sum(done) == expected


def test_an_error_in_the_middle_stops_every_thread(cache):
    """As Ctrl-C does: nothing is hashed to its end first."""
    seen = []

    def interrupt(size: int) -> None:
        seen.append(size)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_cache(cache, threads=1, progress=interrupt)
    assert len(seen) <= 2


def test_the_reader_names_the_same_files(cache):
    reader = CacheReader(cache)
    flip(cache / SHARD)
    flip(cache / CONFIG)
    assert sorted(reader.verify()) == sorted(bad(verify_cache(cache))) == [SHARD, CONFIG]


@pytest.mark.parametrize("folder", ["shards", "target"])
def test_a_folder_that_is_a_link_is_one_bad_thing(cache, folder):
    (cache / folder).rename(cache.parent / "outside")
    (cache / folder).symlink_to(cache.parent / "outside", target_is_directory=True)
    assert bad(verify_cache(cache)) == {folder: "expected a folder, got a link"}


def test_a_folder_that_is_missing_misses_all_its_files(cache):
    names = {f"shards/{path.name}" for path in (cache / "shards").iterdir()}
    shutil.rmtree(cache / "shards")
    assert bad(verify_cache(cache)) == dict.fromkeys(names, "missing")


def test_weights_of_a_target_do_not_belong_in_a_cache(cache):
    (cache / "target" / "model.safetensors").write_bytes(b"stranger")
    assert bad(verify_cache(cache)).keys() == {"target/model.safetensors"}
    assert run_cli("verify", cache, "--repair").exit_code == 1
    assert (cache / "damaged" / "target" / "model.safetensors").read_bytes() == b"stranger"
    assert not verify_cache(cache).problems


def test_a_bad_manifest_is_a_refusal(cache):
    flip(cache / "manifest.json", at=-3)
    before = every_byte(cache)
    assert_refused(run_cli("verify", cache, "--repair"), 1, "manifest.json is damaged")
    assert every_byte(cache) == before


def test_tokens_that_are_not_those_of_their_id_are_found(tmp_path):
    """A cache whose hashes are all right, and whose writer mixed samples up."""
    path = HandCache().save(tmp_path / "good")
    assert not verify_cache(path).problems
    manifest, shard = read_manifest(path), path / "shards/00000.safetensors"
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    entry = json.loads(shard.read_bytes()[8 : 8 + header])["input_ids"]
    flip(shard, at=8 + header + entry["data_offsets"][0])
    hashes = (hashlib.sha256(shard.read_bytes()).hexdigest(), *manifest.shards.sha256[1:])
    shards = ShardFiles(bytes=manifest.shards.bytes, sha256=hashes)
    write_manifest(path, dataclasses.replace(manifest, shards=shards))
    assert bad(verify_cache(path)) == {
        "shards/00000.safetensors": "sample 0 has other tokens than its id says"
    }
    assert not verify_cache(path, fast=True).problems


def test_an_identity_of_other_samples_is_the_manifests_fault_and_it_stays(cache):
    manifest = read_manifest(cache)
    data = dataclasses.replace(manifest.identity.data, sha256="0f" * 32)
    identity = dataclasses.replace(manifest.identity, data=data)
    write_manifest(cache, dataclasses.replace(manifest, identity=identity))
    before = every_byte(cache)
    result = run_cli("verify", cache, "--repair")
    assert_refused(result, 1, "1 of")
    assert "manifest.json: identity.data.sha256 differs from the sample ids" in result.stdout
    assert every_byte(cache) == before


# Repair


def stamps(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()}


def test_what_repair_sets_aside_is_captured_again_and_only_that(cache, cache_dir, target_dir, data_file):
    original = every_byte(cache_dir)
    flip(cache / SHARD)
    (cache / "shards/00003.safetensors").unlink()
    damaged, before = (cache / SHARD).read_bytes(), stamps(cache)
    result = run_cli("verify", cache, "--repair")
    assert_refused(result, 1, "2 of", "1 set aside", str(cache / "damaged"), "again")
    assert not (cache / SHARD).exists()
    assert (cache / "damaged" / SHARD).read_bytes() == damaged

    run_ok(*capture_arguments(target_dir, data_file, cache))
    after = stamps(cache)
    rewritten = {"00001.safetensors", "00003.safetensors"}
    assert {name for name in after if after[name] != before.get(name)} == rewritten
    shutil.rmtree(cache / "damaged")
    assert every_byte(cache) == original
    run_ok("verify", cache)


@pytest.mark.parametrize("name", [INDEX, FROZEN, CONFIG])
def test_other_files_are_set_aside_and_written_again_too(cache, cache_dir, target_dir, data_file, name):
    before = stamps(cache)
    flip(cache / name, at=-20)
    assert run_cli("verify", cache, "--repair").exit_code == 1
    assert (cache / "damaged" / name).is_file()
    run_ok(*capture_arguments(target_dir, data_file, cache))
    assert stamps(cache) == before
    shutil.rmtree(cache / "damaged")
    assert every_byte(cache) == every_byte(cache_dir)


def test_nothing_set_aside_is_ever_overwritten(cache, cache_dir):
    contents = []
    for at in (-1, -2, -3):
        shutil.copyfile(cache_dir / SHARD, cache / SHARD)
        flip(cache / SHARD, at=at)
        contents.append((cache / SHARD).read_bytes())
        assert run_cli("verify", cache, "--repair").exit_code == 1
    found = [path.read_bytes() for path in sorted((cache / "damaged" / "shards").iterdir())]
    assert found == contents


def test_links_are_moved_and_never_followed(cache, cache_dir):
    outside = cache.parent / "outside"
    as_link(cache / SHARD)
    kept = outside.read_bytes()
    assert run_cli("verify", cache, "--repair").exit_code == 1
    assert (cache / "damaged" / SHARD).is_symlink()
    assert outside.read_bytes() == kept
    elsewhere = cache.parent / "elsewhere"
    (cache / "shards").rename(elsewhere)
    (cache / "shards").symlink_to(elsewhere, target_is_directory=True)
    assert run_cli("verify", cache, "--repair").exit_code == 1
    assert not (cache / "shards").exists()
    names = {p.name for p in elsewhere.iterdir()}
    assert names == {p.name for p in (cache_dir / "shards").iterdir()} - {Path(SHARD).name}
    shutil.copytree(elsewhere, cache / "shards")
    flip(cache / "shards/00000.safetensors")
    assert run_cli("verify", cache, "--repair").exit_code == 1
    assert {p.name for p in elsewhere.iterdir()} == names, "a file went through a link that was set aside"
    assert "00000.safetensors" in {p.name for p in (cache / "damaged").rglob("*")}


def test_damaged_that_is_a_link_is_refused(cache):
    flip(cache / SHARD)
    (cache.parent / "outside").mkdir()
    (cache / "damaged").symlink_to(cache.parent / "outside", target_is_directory=True)
    assert_refused(run_cli("verify", cache, "--repair"), 1, "damaged is not a directory")
    assert not list((cache.parent / "outside").iterdir())


# An incomplete cache


@pytest.fixture
def incomplete(cache) -> Path:
    """As a capture stopped before its shards 2 and 3: manifest, records and files."""
    manifest = read_manifest(cache)
    (cache / "progress").mkdir()
    for number, (size, digest) in enumerate(zip(manifest.shards.bytes, manifest.shards.sha256, strict=True)):
        if number in (2, 3):
            (cache / f"shards/{number:05d}.safetensors").unlink()
            continue
        record = {"file": f"shards/{number:05d}.safetensors", "bytes": size, "sha256": digest, "measured": {}}
        (cache / f"progress/{number:05d}.json").write_text(json.dumps(record))
    others = [dataclasses.asdict(record) for record in manifest.files if record.file != INDEX]
    (cache / "progress/target.json").write_text(json.dumps({"files": others, "proof": {}}))
    write_manifest(
        cache, dataclasses.replace(manifest, status="incomplete", shards=ShardFiles(), files=(), fidelity={})
    )
    return cache


@pytest.mark.parametrize("fast", [False, True], ids=["full", "fast"])
def test_the_finished_shards_of_an_incomplete_cache_are_checked(incomplete, fast):
    total = len(read_manifest(incomplete).plan)
    before = every_byte(incomplete)
    said = run_ok("verify", incomplete, *["--fast"] * fast)
    assert f"incomplete, {total - 2} shards finished, 2 still to be captured" in said
    assert said.strip().endswith("good")
    assert every_byte(incomplete) == before


@pytest.mark.parametrize("name", [SHARD, FROZEN, INDEX])
def test_damage_in_an_incomplete_cache_is_set_aside_and_captured(
    incomplete, cache_dir, target_dir, data_file, name
):
    flip(incomplete / name)
    result = run_cli("verify", incomplete, "--repair")
    assert_refused(result, 1, "1 of")
    assert f"damaged: {incomplete / name}: " in result.stdout
    assert "incomplete" in run_ok("verify", incomplete)
    run_ok(*capture_arguments(target_dir, data_file, incomplete))
    for path in ("shards", "target", INDEX):
        files = [incomplete / path] if path == INDEX else sorted((incomplete / path).iterdir())
        for file in files:
            assert file.read_bytes() == (cache_dir / file.relative_to(incomplete)).read_bytes()


def test_a_cache_that_was_reopened_is_checked_by_what_it_kept(incomplete):
    records = [(incomplete / f"progress/{n:05d}.json") for n in range(len(read_manifest(incomplete).plan))]
    kept = [json.loads(r.read_text()) if r.exists() else {"bytes": 0, "sha256": "0" * 64} for r in records]
    columns = {key: [record[key] for record in kept] for key in ("bytes", "sha256")}
    (incomplete / "progress/kept.json").write_text(json.dumps(columns))
    for record in records:
        record.unlink(missing_ok=True)
    found = verify_cache(incomplete)
    assert (found.shards, found.pending, found.problems) == (len(records) - 2, 2, [])
    flip(incomplete / SHARD)
    assert bad(verify_cache(incomplete)) == {SHARD: "its hash differs"}


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"file": "../../etc/passwd"}', b"\xff" * 9])
def test_a_record_that_makes_no_sense_finishes_nothing(incomplete, garbage):
    before = verify_cache(incomplete).shards
    (incomplete / "progress/00000.json").write_bytes(garbage)
    (incomplete / "progress/target.json").write_bytes(garbage)
    found = verify_cache(incomplete)
    assert (found.shards, found.problems) == (before - 1, [])
