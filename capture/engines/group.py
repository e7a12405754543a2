"""Ranks, started by torchrun, that run one target together: rank 0 leads, the others follow.

Rank 0 announces each forward through torchrun's store. Inside a forward the ranks agree before every
collective that none of them has failed, so that an error of one (out of memory) ends the forward of all, and
no rank waits in a collective that another never joins. A rank that died closes its connection, which ends the
others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from capture.engines.options import EngineOptions
from pipeline.device import out_of_memory, use_device
from pipeline.errors import EngineError, TargetError, UsageError
from pipeline.process import WorkerPlace, torchrun_place
from pipeline.text import reason

T = TypeVar("T")
# Time that a rank waits for another one inside a forward or a load. One that died is noticed at once.
TIMEOUT = timedelta(minutes=30)
# Seconds between two looks of a follower at its signals, and seconds in which a rank ends.
POLL, GRACE = 1, 20
# States of a rank in a forward; the worst one counts.
_FINE, _NO_MEMORY, _FAILED = range(3)
# Namespaces of operations that communicate, and the ones of them that only wait.
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_WAITS = ("wait_tensor",)


class Group:
    """The ranks of one target, seen from this one.

    Args:
        place: this process's place among torchrun's.
        store: a store of all ranks.
    """

    def __init__(self, place: WorkerPlace, store: dist.Store):
        self.place = place
        self.device = torch.device("cpu")
        self.lost = False
        """True after a rank was found dead or silent."""
        self._store, self._messages = store, 0
        self._control: dist.ProcessGroup | None = None
        self._agreed: BaseException | None = None
        """The error with which all ranks end this forward."""

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    # Messages of rank 0

    def tell(self, **message: Any) -> None:
        """Send a message to all followers. Every rank has heard the one before."""
        self._store.set(f"message {self._messages}", json.dumps(message))
        if self._messages:
            self._store.delete_key(f"message {self._messages - 1}")
        self._messages += 1

    def hear(self, waiting: Callable[[float], None] = lambda seconds: None) -> dict[str, Any]:
        """Return the next message of rank 0, however long it takes.

        Args:
            waiting: called every second of the wait with the seconds that it lasts; raises to end it.

        Raises:
            EngineError: rank 0 died.
        """
        key, began = f"message {self._messages}", time.monotonic()
        while True:
            try:
                self._store.wait([key], timedelta(seconds=POLL))
                break
            except dist.DistStoreError:
                waiting(time.monotonic() - began)
            except RuntimeError as error:
                raise self._lost(error) from None
        self._messages += 1
        return json.loads(self._store.get(key))

    # What all ranks do at the same time

    def join(self, device: torch.device) -> None:
        """Connect the ranks. All of them call it.

        Args:
            device: of this rank's part of the target.

        Raises:
            EngineError: they can't be connected.
        """
        self.device = device
        use_device(device)
        cuda = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=dist.PrefixStore("ranks", self._store),
                rank=self.place.rank,
                world_size=self.place.world,
                timeout=TIMEOUT,
                device_id=device if cuda else None,
            )
            # On the CPU also where the target is on GPUs, so that no agreement waits for a GPU.
            self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            raise self._lost(error) from None

    def together(self, work: Callable[[], T]) -> T:
        """Do some work on all ranks, without collectives. An error on one rank ends it on all.

        Raises:
            DSparkError: this rank's error, else the one of the first rank that has one.
        """
        result: T | None = None
        problem: Exception | None = None
        try:
            result = work()
        except Exception as error:
            problem = error
        problems: list[Any] = [None] * self.place.world
        try:
            dist.all_gather_object(problems, problem and reason(problem), group=self._control)
        except RuntimeError as error:
            raise self._lost(error) from None
        if problem is not None:
            raise problem
        for rank, text in enumerate(problems):
            if text is not None:
                raise TargetError(f"rank {rank}: {text}")
        return result  # type: ignore[return-value]

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """Run a `with` block on all ranks whose collectives begin only while no rank has failed.

        Raises:
            MemoryError: another rank has too little memory for it.
            TargetError: another rank failed; raised on rank 0.
            EngineError: a rank died or hangs.
        """
        try:
            try:
                with _Lockstep(self):
                    yield
            except BaseException as error:
                if error is not self._agreed:
                    self._agree(error)
                raise
            self._agree()
        finally:
            self._agreed = None  # its traceback keeps the memory of the forward

    def _agree(self, problem: BaseException | None = None) -> None:
        """Tell all ranks of this one's state, and raise the error of the worst of the others.

        Args:
            problem: this rank's error, which the caller raises.
        """
        state = _FINE if problem is None else _NO_MEMORY if out_of_memory(problem) else _FAILED
        worst = torch.tensor(state * self.place.world + self.place.rank)
        texts: list[Any] = [None] * self.place.world
        try:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._control)
            state, rank = divmod(int(worst), self.place.world)
            if state == _FAILED:
                dist.all_gather_object(texts, problem and reason(problem), group=self._control)
        except RuntimeError as error:
            raise self._lost(problem or error) from None
        if state == _FINE or problem is not None:
            return
        if state == _NO_MEMORY:
            self._agreed = MemoryError(f"rank {rank} is out of memory")
        else:
            self._agreed = TargetError(f"rank {rank} of {self.place.world} failed: {texts[rank]}")
        raise self._agreed

    def _lost(self, error: BaseException) -> EngineError:
        """Return the error for a rank that is gone."""
        self.lost = True
        others = "rank 0" if not self.leads else "another rank"
        self._agreed = EngineError(
            f"rank {self.place.rank} of {self.place.world} lost {others} ({reason(error)}): look for its "
            "error above; the same command continues the capture"
        )
        return self._agreed

    # The end

    def end(self) -> None:
        """End the followers, as rank 0; or tell rank 0 that this follower has ended. Waits a moment."""
        with suppress(RuntimeError):
            if self.leads:
                self.tell(end=True)
                ended = [f"ended {rank}" for rank in range(1, self.place.world)]
                self._store.wait(ended, timedelta(seconds=POLL if self.lost else GRACE))
            else:
                self._store.set(f"ended {self.place.rank}", "")
            if self._control is not None and not self.lost:
                if self.device.type == "cpu":
                    time.sleep(0.3)  # gloo's threads need Python's lock to end, see train's Ranks.meet
                dist.destroy_process_group()
                self._control = None


class _Lockstep(TorchDispatchMode):
    """Let all ranks agree before each collective."""

    supports_higher_order_operators = True

    def __init__(self, group: Group):
        super().__init__()
        self._group = group

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor's own operations on the parts come here again
        if getattr(func, "namespace", "") in _COLLECTIVES and func._opname not in _WAITS:
            self._group._agree()
        return func(*args, **(kwargs or {}))


@contextmanager
def open_group(options: EngineOptions) -> Iterator[Group | None]:
    """Meet the other ranks of a target that transformers splits; None for any other target.

    The ranks are connected later, by `Group.join`. When the block ends on rank 0, the followers end.

    Raises:
        UsageError: torchrun did not start as many processes as the target is split over.
        EngineError: torchrun's store is not found.
    """
    if not options.is_split:
        yield None
        return
    place, ranks = torchrun_place(), options.tensor_parallel
    if place.world != ranks:
        raise UsageError(
            f"--tensor-parallel {ranks} by transformers needs {ranks} processes, got {place.world}: start "
            f"torchrun --nproc-per-node {ranks} -m pipeline capture --tensor-parallel {ranks} ..."
        )
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    except (ValueError, RuntimeError) as error:
        raise EngineError(
            f"rank {place.rank} of {place.world} can't join the others ({reason(error)}): start all with "
            "torchrun"
        ) from None
    group = Group(place, dist.PrefixStore("dspark", store))
    try:
        yield group
    finally:
        group.end()
