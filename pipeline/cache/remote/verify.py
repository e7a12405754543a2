"""Check every object of a cache against its manifest."""

from __future__ import annotations

from collections.abc import Callable

from pipeline import files
from pipeline.cache.manifest import INDEX, MANIFEST, FileRecord
from pipeline.cache.remote.local import default_store
from pipeline.cache.remote.sync import Bucket
from pipeline.cache.verify import FileChecks, Problem, Verified
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects


def verify_remote(
    address: Address,
    *,
    fast: bool = False,
    begin: Callable[[int], object] = lambda total_bytes: None,
    progress: Callable[[int], object] = lambda done_bytes: None,
) -> Verified:
    """Check a complete cache in an object store as `verify_cache` checks a directory.

    A shard at a time is fetched into a temporary folder beside the local store.

    Args:
        fast: check the sizes of shards by a listing, and the small files; fetch no shard.

    Raises:
        CacheError: there is no complete cache.
        StoreError: it can't be read.
    """
    origin = Bucket(Objects(address))
    manifest, store = origin.manifest, default_store()
    records = list(manifest.all_files())
    sizes = {entry.name: entry.bytes for entry in origin.objects.list()}
    begin(manifest.num_bytes)
    problems: list[Problem] = []
    try:
        with store.temporary() as folder:
            for each in ("shards", "target"):
                (folder / each).mkdir()
            (folder / MANIFEST).write_bytes(manifest.to_json())
            small = [record for record in records if not record.file.startswith("shards/")]
            for record in small:
                if not _wrong_size(record, sizes):
                    origin.copy(record, folder / record.file)
                problems += _wrong_size(record, sizes)
            small = [record for record in small if not _wrong_size(record, sizes)]
            with FileChecks(folder, manifest, threads=1, progress=progress) as checks:
                problem, table = checks.index([record for record in small if record.file == INDEX])
                problems += [problem] if problem else []
                problems += checks.problems([record for record in small if record.file != INDEX], table)
                for shard in range(len(manifest.plan)):
                    record = records[shard]
                    if fast or sizes.get(record.file) != record.bytes:
                        found = _wrong_size(record, sizes)
                        progress(record.bytes)
                    else:
                        origin.copy(record, folder / record.file)
                        found = checks.problems([record], table)
                        (folder / record.file).unlink()
                    problems += found
    except OSError as error:
        raise files.write_error(store.folder, error) from error
    return Verified(
        problems=problems,
        complete=True,
        files=len(records),
        bytes=manifest.num_bytes,
        shards=len(manifest.plan),
        pending=0,
        hidden=manifest.identity.features.hidden,
    )


def _wrong_size(record: FileRecord, sizes: dict[str, int]) -> list[Problem]:
    found = sizes.get(record.file)
    if found == record.bytes:
        return []
    got = "it is missing" if found is None else f"got {found:,}"
    return [Problem(record.file, f"expected {record.bytes:,} bytes, {got}")]
