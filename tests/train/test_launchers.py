"""A rank takes a GPU of its own, whatever its launcher shows it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import UsageError
from pipeline.process import WorkerPlace
from train.runtime import distributed


def start(monkeypatch: pytest.MonkeyPatch, gpus: list[list[str]], device: str = "auto") -> list[object]:
    """Open one rank for each entry of `gpus`, the GPUs that it sees; return what became of each.

    The ranks are threads. NCCL is not asked, and each rank has the store that torchrun would give it.
    """
    mine, store = threading.local(), dist.HashStore()
    cuda = torch.cuda
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(gpus)))
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: len(gpus[mine.rank]))
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[mine.rank][device.index or 0])
    )
    monkeypatch.setattr(
        distributed, "torchrun_place", lambda: WorkerPlace(mine.rank, len(gpus), local_rank=mine.rank)
    )
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, mine.rank, len(gpus))]))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    outcomes: list[object] = [None] * len(gpus)

    def run(rank: int) -> None:
        mine.rank = rank
        try:
            with distributed.open_ranks(device) as ranks:
                outcomes[rank] = gpus[rank][ranks.device.index]
        except (UsageError, SystemExit) as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


EIGHT = [f"GPU-{number}" for number in range(8)]


def test_ranks_that_see_all_gpus_take_one_each(monkeypatch) -> None:
    assert start(monkeypatch, [EIGHT] * 8) == EIGHT


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_ranks_that_see_one_gpu_each_are_accepted(monkeypatch, device) -> None:
    assert start(monkeypatch, [[gpu] for gpu in EIGHT], device) == EIGHT


@pytest.mark.parametrize(
    ("gpus", "device", "shared"),
    [
        ([["GPU-0"]] * 2, "auto", "ranks 0 and 1 have the same GPU (GPU-0)"),
        ([EIGHT[:2]] * 3, "cuda", "ranks 0 and 2 have the same GPU (GPU-0)"),
        ([EIGHT[:2]] * 2, "cuda:1", "ranks 0 and 1 have the same GPU (GPU-1)"),
        ([["GPU-0"], ["GPU-1"], ["GPU-1"]], "auto", "ranks 1 and 2 have the same GPU (GPU-1)"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_once(monkeypatch, gpus, device, shared) -> None:
    first, *others = start(monkeypatch, gpus, device)
    assert isinstance(first, UsageError)
    assert shared in str(first)
    assert "one process per GPU" in str(first)
    assert [type(other) for other in others] == [SystemExit] * len(others)
    assert {other.code for other in others} == {2}
