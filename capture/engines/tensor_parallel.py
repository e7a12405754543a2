"""The target split over several processes by transformers: rank 0 captures, the others run its forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capture.engines.group import GRACE, Group, open_group
from capture.engines.huggingface import HuggingFaceEngine
from capture.engines.options import EngineOptions
from capture.example import with_example
from pipeline.errors import EngineError, StoppedError, TargetError
from pipeline.hooks import find_decoder, rows_taken_as_given
from pipeline.process import torchrun_place
from pipeline.signals import StopRequest, stop_on_signals
from pipeline.target_model.load import DTYPES, Target, open_target
from pipeline.target_model.options import TargetOptions
from pipeline.target_model.parallel import is_split, split_device, whole_ends


class TensorParallelEngine(HuggingFaceEngine):
    """A `CaptureEngine` on rank 0 of a group: each forward runs on all ranks.

    Args:
        group: the ranks, not yet connected.
        target: the target, which this loads on all ranks.
        layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: a rank can't load its part.
        EngineError: a rank died.
    """

    def __init__(self, group: Group, target: Target, layer_ids: Sequence[int]):
        self._group, self._running = group, False
        dtype = next(name for name, dtype in DTYPES.items() if dtype == target.dtype)
        group.tell(dtype=dtype)
        model, (embedding, self._head) = _load(group, lambda: target)
        tied = embedding is self._head
        self._embedding = embedding if tied else embedding.cpu()  # it is only written
        super().__init__(model, layer_ids)
        self._width = model.config.get_text_config().hidden_size
        for module in (find_decoder(model), model):
            module.forward = self._on_all_ranks(module.forward, whole=module is model)

    @property
    def device(self) -> torch.device:
        """The device of this rank's part, where token ids go."""
        return self._group.device

    @property
    def embedding(self) -> Tensor:
        return self._embedding

    @property
    def head(self) -> Tensor:
        return self._head

    def _forward(self, input_ids: Tensor) -> dict[int | str, Tensor]:
        states = super()._forward(input_ids)
        for key, rows in states.items():
            if is_split(rows) or rows.shape[-1] != self._width:
                raise TargetError(
                    f"transformers' plan to split {type(self.target.model).__name__} leaves only a part of "
                    f"the states at {key} on a process: drop --tensor-parallel, or give --engine vllm"
                )
        return states

    def _on_all_ranks(self, forward: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
        """Return a module's forward that the followers run too.

        Args:
            whole: True for the model with its head, False for the decoder inside it.
        """

        def run(input_ids: Tensor, **options: Any) -> Any:
            if self._running:  # the decoder, inside the whole model
                return forward(input_ids=input_ids, **options)
            assert options.get("attention_mask") is None, "followers are not told of a mask"
            self._running = True
            try:
                self._group.tell(shape=list(input_ids.shape), whole=whole)
                with self._group.lockstep():
                    dist.broadcast(input_ids, 0)
                    return forward(input_ids=input_ids, **options)
            finally:
                self._running = False

        return run


def follows(options: EngineOptions) -> bool:
    """Return whether this process only runs forwards for rank 0."""
    return options.is_split and torchrun_place().rank > 0


def follow(options: EngineOptions, target: TargetOptions) -> None:
    """Run this rank's part of rank 0's forwards until rank 0 ends.

    An error that rank 0 is told of is rank 0's to say.

    Raises:
        UsageError: torchrun did not start as many processes as the target is split over.
        EngineError: rank 0 died.
        StoppedError: a signal asked to stop, and rank 0 no longer runs anything.
    """
    with open_group(options) as group:
        assert group is not None
        message = group.hear()
        if "dtype" in message:
            own = replace(with_example(target), dtype=message["dtype"])
            try:
                model = _load(group, lambda: open_target(own))[0]
            except EngineError:
                raise
            except Exception:
                group.hear()
            else:
                _serve(group, model)


def _serve(group: Group, model: nn.Module) -> None:
    """Run rank 0's forwards until it ends."""
    decoder = find_decoder(model)
    with stop_on_signals() as stop, torch.no_grad():
        while "end" not in (message := group.hear(lambda seconds: _check_stop(stop, seconds))):
            try:
                _run(group, model if message["whole"] else decoder, message["shape"], whole=message["whole"])
            except EngineError:
                raise
            except Exception:  # all ranks know of it
                torch.cuda.empty_cache()


def _run(group: Group, module: nn.Module, shape: Sequence[int], *, whole: bool) -> None:
    with group.lockstep():
        ids = torch.empty(shape, dtype=torch.long, device=group.device)
        dist.broadcast(ids, 0)
        if whole:
            module(input_ids=ids, use_cache=False)
        else:
            with rows_taken_as_given():
                module(input_ids=ids, use_cache=False)


def _check_stop(stop: StopRequest, seconds: float) -> None:
    """Raise StoppedError after a signal if rank 0, which had it too, runs nothing more."""
    if stop.signal is not None and seconds > GRACE:
        raise StoppedError(stop.signal, f"stopped by {stop.signal.name}")


def _load(group: Group, opened: Callable[[], Target]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Connect the ranks, load this rank's part, and gather embedding and head `[V, H]` from all."""
    group.join(split_device(group.place.local_rank))
    target = group.together(opened)
    model = group.together(lambda: target.model(group.place.world))
    with torch.no_grad(), group.lockstep():
        return model, whole_ends(model)
