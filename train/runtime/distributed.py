"""Processes that train one draft together, as torchrun starts them; one alone is the simplest case."""

from __future__ import annotations

import inspect
import os
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

from pipeline.device import resolve_device
from pipeline.errors import DSparkError, RunError, UsageError, WriteError
from pipeline.process import WorkerPlace, torchrun_place

# How long a rank waits for the others; torchrun ends a job sooner when one of its processes dies.
TIMEOUT = timedelta(minutes=30)


class Ranks:
    """All processes of a run, and this one's place among them.

    Args:
        place: of this process.
        device: that it computes on.
    """

    def __init__(self, place: WorkerPlace, device: torch.device):
        self.rank, self.world, self.device = place.rank, place.world, device
        self.met = False
        """Whether all have come to the end."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that talks and writes."""
        return self.rank == 0

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor, added up over all ranks."""
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
        """Every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, module: nn.Module) -> None:
        """Give every rank the first one's parameters and buffers."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that no rank leaves alone: what one of them can't do ends all, with one message."""
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
        """End the run where ranks are not about to do the same: names what differs.

        Raises:
            RunError: on the first rank.
        """
        seen = self.gather(facts)
        for name, value in facts.items():
            values = [other[name] for other in seen]
            if any(other != value for other in values):
                short = all(isinstance(other, str | None) for other in values)
                what = f"{name} ({', '.join(other or 'none' for other in values)})" if short else name
                self.fail(
                    RunError(
                        f"the ranks see different things: {what}. Cache and --run have to be the same on all "
                        "machines, on a file system that they share"
                    )
                )

    def fail(self, error: DSparkError) -> NoReturn:
        """End the run for a reason that every rank knows: one of them says it."""
        self.meet()
        if self.leads:
            raise error
        raise SystemExit(error.exit_code)

    def meet(self) -> None:
        """Wait for all ranks, and for gloo's threads; the end of a run begins with it.

        A thread of gloo's that has not let go of its last tensor yet needs Python's lock for that, which
        whoever ends the process group holds while waiting for the thread: a deadlock (seen with torch 2.13).
        """
        if self.world > 1:
            dist.barrier()
            if self.device.type == "cpu":
                time.sleep(0.3)  # without the lock
            self.met = True


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun's environment says, connected; without one, this process alone.

    Args:
        device: `auto`, `cuda` (a GPU a process), `cuda:1`, `cpu`.

    Raises:
        UsageError: a device that torch lacks, or fewer GPUs than processes.
        RunError: another rank died.
    """
    place = torchrun_place()
    here = resolve_device(place.device(device))
    cuda = here.type == "cuda"
    if cuda:
        torch.cuda.set_device(here)
    if place.world == 1:
        yield Ranks(place, here)
        return
    if cuda:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if processes > torch.cuda.device_count() or device not in ("auto", "cuda"):
            if place.local_rank:  # one of them says so
                raise SystemExit(UsageError.exit_code)
            raise UsageError(
                f"{processes} processes on this machine for {torch.cuda.device_count()} GPUs and --device "
                f"{device}: start one a GPU, with --device cuda"
            )
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=here if cuda else None)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
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
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"rank {place.rank} lost the others ({reason}): see what ended them; the same command continues "
            "from the last checkpoint"
        ) from None
    finally:
        if ranks.met:  # else it could wait for one that never comes
            dist.destroy_process_group()


class SpreadModule:
    """A module on all ranks, called like the module itself; gradients are means over the ranks.

    Args:
        module: the trainer module; the first rank's weights count.
        ranks: who trains it.
        layers: its parts of which there are many, sharded one by one.
        parallelism: `ddp`, a copy a rank, or `fsdp`, what is trained sharded over the ranks.
        precision: `bf16` gathers sharded parameters in that precision.
    """

    def __init__(
        self, module: nn.Module, ranks: Ranks, layers: Sequence[nn.Module], parallelism: str, precision: str
    ):
        self._module: Callable[..., Any] = module
        if ranks.world == 1:
            return
        if parallelism == "ddp":  # it copies the first rank's weights itself
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
        """Around a forward and its backward: only in a step's last one do ranks exchange gradients."""
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(last)
            self._module.set_is_last_backward(last)
        if isinstance(self._module, DistributedDataParallel) and not last:
            return self._module.no_sync()
        return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the ranks, in one piece. All ranks ask for the same one at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
