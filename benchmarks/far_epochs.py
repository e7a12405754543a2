"""Count what an epoch fetches from an object store into a local store smaller than the cache, by its shuffle.

    dspark capture --cache caches/shards --shard-tokens 4096       # the example in 36 shards and more
    python benchmarks/far_epochs.py --cache caches/shards

Two epochs of batches are read, as training reads them, from an S3 server on this machine. Counted is the
second one, which finds the store full. A hit is a batch's shard that need not be fetched for it again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from benchmarks.s3_server import BUCKET, s3_server
from pipeline.cache import CacheReader
from pipeline.cache.remote.local import LocalStore
from pipeline.cache.remote.sync import sync
from pipeline.remote.address import Address
from train.data.loader import loaded
from train.data.packing import epoch_packs
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors

BATCH_TOKENS, ANCHORS = 512, 64
SHUFFLES = (None, 2, 4, 8)
CPU = torch.device("cpu")


def epochs(address: Address, together: int | None, folder: Path, share: float) -> tuple[float, float]:
    """Return the bytes that the second epoch fetches, by those it reads; and its hit rate.

    Args:
        together: shards shuffled together; None for all.
        folder: of the local store.
        share: its size, as a share of what an epoch reads.
    """
    plain = CacheReader(address, store=LocalStore(folder / "unused", 10**12))
    sizes = [plain.files.size(shard) for shard in range(len(plain.manifest.plan))]
    reader = CacheReader(address, store=LocalStore(folder / "store", int(share * sum(sizes))))
    fetched: list[int] = []
    fill = reader.files._fill
    reader.files._fill = lambda key, *rest: (fetched.append(sizes[key]), fill(key, *rest))[1]
    collate = collate_anchors(random_anchors(ANCHORS, 0, 0))
    packs = [
        epoch_packs(reader.lengths, BATCH_TOKENS, 0, epoch, reader.shards, together) for epoch in range(2)
    ]
    first = len(packs[0])
    batches = loaded(
        reader, ((pack, collate) for pack in itertools.chain(*packs)), reader.layer_ids, BATCH_TOKENS, CPU
    )
    uses = sum(len(set(reader.shards[pack].tolist())) for pack in packs[1])
    for number, _ in enumerate(batches, 1):
        if number == first:
            before = len(fetched)  # a few of them for the second epoch, ahead
    again = fetched[before:]
    return sum(again) / sum(sizes), 1 - len(again) / uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1 / 3, help="size of the store by the cache's")
    options = parser.parse_args()
    rows = []
    with s3_server(), tempfile.TemporaryDirectory() as name:
        address = Address(f"s3://{BUCKET}/cache")
        sync(options.cache, address)
        for together in SHUFFLES:
            bytes_read, hits = epochs(address, together, Path(name) / str(together), options.share)
            case = f"store of {options.share:.2f}, " + (
                "all shuffled" if together is None else f"{together} shards shuffled together"
            )
            rows.append((case, "fetched an epoch", bytes_read, "of what it reads"))
            rows.append((case, "hit rate", hits, ""))
    record("far_epochs", CPU, rows)


if __name__ == "__main__":
    main()
