"""What a run did since its last log line: sums divided once, and how fast it was."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from train.batches import Batch
from train.config import LossConfig
from train.losses import LossSums, divide


class Window:
    """Adds up micro-batches between two log lines.

    Args:
        loss: the weights of the three terms.
        device: where the draft is trained.
        peak: the device's FLOP/s in the run's precision, if known.
    """

    def __init__(self, loss: LossConfig, device: torch.device, peak: float | None):
        self._loss, self._device, self._peak = loss, device, peak
        self._begin()

    def _begin(self) -> None:
        self._sums: LossSums | None = None
        self._tokens, self._flops, self._waited = 0, 0.0, 0.0
        self._start = time.perf_counter()

    def add(self, sums: LossSums, batch: Batch) -> None:
        """Count a micro-batch that was drafted."""
        sums = sums.detach()
        self._sums = sums if self._sums is None else self._sums + sums
        self._tokens += batch.num_tokens
        self._flops += batch.flops

    def waited(self, seconds: float) -> None:
        """Count time in which there was no batch to work on."""
        self._waited += seconds

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._start += seconds

    def line(self, step: int, lr: float) -> dict[str, Any]:
        """The log line, and a new beginning."""
        assert self._sums is not None
        loss = self._loss
        metrics = divide(self._sums, loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha)
        values: dict[str, Any] = {
            "step": step,
            "loss": metrics.loss.item(),
            "ce_loss": metrics.ce_loss.item(),
            "l1_loss": metrics.l1_loss.item(),
            "confidence_loss": metrics.confidence_loss.item(),
            "accept_rate": metrics.accept_rate.item(),
            "tau": metrics.tau.item(),
            "lr": lr,
        }
        seconds = time.perf_counter() - self._start  # after .item(): the device is done with what is timed
        flops = self._flops / seconds
        values |= {
            "tokens_per_s": self._tokens / seconds,
            "blocks_per_s": self._sums.blocks.item() / seconds,
            "data_wait_percent": 100 * self._waited / seconds,
            "model_flops_per_s": flops,
            "peak_flops_percent": None if self._peak is None else 100 * flops / self._peak,
            "peak_memory_bytes": peak_memory(self._device),
        }
        self._begin()
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on a GPU, or on a CPU this whole process, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
