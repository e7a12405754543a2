"""Ranks that train one draft together, started by torchrun; a single process is a world of size 1."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.device import resolve_device, use_device
from pipeline.errors import DSparkError, RunError, UsageError, WriteError
from pipeline.process import WorkerPlace, torchrun_place
from pipeline.text import one_line

# Time that a rank waits for the others. When a process dies, torchrun ends the job sooner.
TIMEOUT = timedelta(minutes=30)


class Ranks:
    """The ranks of a run, seen from this one.

    Args:
        place: rank and world size of this process.
        device: device that this rank computes on.
    """

    def __init__(self, place: WorkerPlace, device: torch.device):
        self.rank, self.world, self.device = place.rank, place.world, device
        self.met = False
        """True after all ranks have met at the end of the run."""

    @property
    def leads(self) -> bool:
        """True on the first rank, which prints and writes files."""
        return self.rank == 0

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of each tensor over all ranks."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([t.detach().to(self.device, torch.float64).flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def any_of(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if self.world == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        return self.any_of(flag)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, module: nn.Module) -> None:
        """Broadcast the first rank's parameters and buffers to all ranks."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a `with` block on all ranks. An error on any rank ends all of them, with one message."""
        problem: DSparkError | None = None
        try:
            yield
        except DSparkError as error:
            problem = error
        except OSError as error:
            problem = WriteError(f"{error.filename or 'a file'}: {error.strerror or error}")
        problems = self.gather(problem and (str(problem), problem.exit_code))
        if any(problems):
            rank = next(i for i, found in enumerate(problems) if found)
            message, code = problems[rank]
            error = RunError(f"rank {rank}: {message}")
            error.exit_code = code
            self.fail(problem or error)

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that all ranks hold the same facts; end the run if they don't.

        Args:
            facts: values by the names that the message gives them.

        Raises:
            RunError: the facts differ; raised on the first rank.
            SystemExit: the facts differ; raised on the other ranks.
        """
        seen = self.gather(facts)
        for name, value in facts.items():
            values = [other[name] for other in seen]
            if any(other != value for other in values):
                short = all(isinstance(other, str | None) for other in values)
                what = f"{name} ({', '.join(other or 'none' for other in values)})" if short else name
                self.fail(
                    RunError(
                        f"the ranks disagree on {what}: use the same settings, cache and --run on all "
                        "machines, on a file system that they share"
                    )
                )

    def fail(self, error: DSparkError) -> NoReturn:
        """End the run for a reason that every rank knows. The first rank raises it, the others exit."""
        self.meet()
        if self.leads:
            raise error
        raise SystemExit(error.exit_code)

    def meet(self) -> None:
        """Wait for all ranks and for gloo's threads. Call it before the process group is destroyed.

        Destroying the process group holds Python's lock while it waits for gloo's threads. A thread that
        still has to release its last tensor needs that lock: a deadlock (seen with torch 2.13).
        """
        if self.world > 1:
            dist.barrier()
            if self.device.type == "cpu":
                time.sleep(0.3)  # releases the lock
            self.met = True


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Connect the ranks named in torchrun's environment; without torchrun, a world of size 1.

    Args:
        device: `auto`, `cuda` (one GPU per process), `cuda:1`, `cpu`.

    Raises:
        UsageError: torch lacks the device, or two ranks were given one GPU.
        RunError: another rank died.
    """
    place = torchrun_place()
    here = resolve_device(place.device(device))
    cuda = here.type == "cuda"
    use_device(here)
    if place.world == 1:
        yield Ranks(place, here)
        return
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if cuda:
            _refuse_shared_gpus(place, str(torch.cuda.get_device_properties(here).uuid), store)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world,
            timeout=TIMEOUT,
            device_id=here if cuda else None,
        )
    except (ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise RunError(
            f"rank {place.rank} of {place.world} can't join the others ({reason}): start all with torchrun"
        ) from None
    ranks = Ranks(place, here)
    try:
        yield ranks
        ranks.meet()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = one_line(error)
        raise RunError(
            f"rank {place.rank} lost the other ranks ({reason}): fix the error in their output, then run the "
            "same command again; it continues from the last checkpoint"
        ) from None
    finally:
        if ranks.met:  # else this could wait forever for a rank that died
            dist.destroy_process_group()


def _refuse_shared_gpus(place: WorkerPlace, gpu: str, store: dist.Store) -> None:
    """Check that each rank has a GPU of its own, whatever its launcher calls it.

    Some launchers show each process all GPUs of the machine, others only its own. So numbers and counts of
    visible GPUs say nothing.

    Args:
        gpu: the UUID of this rank's GPU.
        store: a store of all ranks.

    Raises:
        UsageError: two ranks have the same GPU; raised on the first rank.
        SystemExit: likewise, on the other ranks.
    """
    store.set(f"gpu of rank {place.rank}", gpu)
    owners: dict[str, int] = {}
    for rank in range(place.world):
        gpu = store.get(f"gpu of rank {rank}").decode()
        first = owners.setdefault(gpu, rank)
        if first != rank:
            if place.rank:
                raise SystemExit(UsageError.exit_code)
            raise UsageError(
                f"ranks {first} and {rank} have the same GPU ({gpu}): start one process per GPU, with "
                "--device cuda; a launcher that shows each process one GPU must show each its own"
            )


class SpreadModule:
    """A module on all ranks, called like the module itself. Gradients are means over the ranks.

    Args:
        module: the trainer module; all ranks start from the first rank's weights.
        ranks: the ranks that train it.
        layers: its layers, each sharded on its own by `fsdp`.
        parallelism: `ddp` replicates the module on each rank, `fsdp` shards its trained parameters.
        precision: `bf16` gathers sharded parameters in bf16.
    """

    def __init__(
        self, module: nn.Module, ranks: Ranks, layers: Sequence[nn.Module], parallelism: str, precision: str
    ):
        self._module: Callable[..., Any] = module
        if ranks.world == 1:
            return
        if parallelism == "ddp":  # DDP broadcasts the first rank's weights itself
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self._module = DistributedDataParallel(
                module,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{buffers: False},  # the rotary frequencies never change
            )
            return
        ranks.copy_from_first(module)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "bf16":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        frozen = {p for p in module.parameters() if not p.requires_grad}
        for part in (*layers, module):
            fully_shard(part, mp_policy=policy, ignored_params=frozen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def micro_batch(self, *, last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch. Ranks exchange gradients in the last one of a step only."""
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(last)
            self._module.set_is_last_backward(last)
        if isinstance(self._module, DistributedDataParallel) and not last:
            return self._module.no_sync()
        return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded. For a sharded tensor, all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
