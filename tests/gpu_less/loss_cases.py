"""Losses computed by either kernel, from a few words that this process and the interpreter's share."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from train.losses import chunks
from train.losses.fused import LowRankBias, SlotOperands, vocabulary_loss
from train.losses.slots import slot_losses

HIDDEN, RANK = 8, 4


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """A loss, with random operands."""

    slots: int = 9
    positions: int = 4
    vocab: int = 47
    bias: str | None = "position"
    """A row a `position`, a row a `slot`, or None."""
    teacher: bool = True
    softcap: float | None = None
    scale: float = 1.0
    autocast: bool = False
    """Products in bf16."""
    rows: int = 1000
    """At most so many slots in a chunk, and at least 16."""
    trained: tuple[str, ...] = ("hidden", "latent", "weight")
    change: Callable[[dict[str, Tensor]], None] | None = None
    """Changes the random operands, by their names in `operands`."""

    def operands(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the tensors, in the dtype of floating-point numbers given."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        made = {
            "hidden": normal(self.slots, HIDDEN),
            "head": normal(self.vocab, HIDDEN) / 2,
            "teacher_hidden": normal(self.positions, HIDDEN),
            "latent": normal(self.positions if self.bias == "position" else self.slots, RANK),
            "weight": normal(self.vocab, RANK) / 2,
            "labels": torch.randint(self.vocab, (self.slots,), generator=generator),
            "positions": torch.randint(self.positions, (self.slots,), generator=generator),
            "ce_weights": torch.rand(self.slots, generator=generator),
            "l1_weights": torch.rand(self.slots, generator=generator),
        }
        if self.change is not None:
            self.change(made)
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in made.items()}

    def names(self) -> list[str]:
        """Names of the operands that get a gradient."""
        return [name for name in self.trained if self.bias or name == "hidden"]


def compute(case: LossCase, kernel: str, device: str = "cpu") -> dict[str, Tensor]:
    """Return losses, gradients by the operands' names, and where the most likely tokens match."""
    return _compute(case, {name: tensor.to(device) for name, tensor in case.operands().items()}, kernel)


def compute_with_other_weights(case: LossCase) -> list[list[float]]:
    """Return the loss by either kernel, again after the bias's weight changed, and after the head did."""
    x, found = case.operands(), []
    for changed in (None, "weight", "head"):
        if changed:
            with torch.no_grad():
                x[changed].mul_(1.5)
        found.append([_compute(case, x, kernel)["total"].item() for kernel in ("torch", "triton")])
    return found


def compute_without_gradients(case: LossCase) -> list[float]:
    """Return the loss by the kernel in inference mode, with gradients, and in inference mode again."""
    x, found = case.operands(), []
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            bare = replace(case, trained=()) if inference else case
            found.append(_compute(bare, x, "triton")["total"].item())
    return found


def _compute(case: LossCase, x: dict[str, Tensor], kernel: str) -> dict[str, Tensor]:
    device = x["hidden"].device.type
    trained = [x[name].requires_grad_(True) for name in case.names()]
    bias = LowRankBias(latent=x["latent"], weight=x["weight"], by_position=case.bias == "position")
    names = ("hidden", "head", "labels", "positions", "ce_weights", "l1_weights")
    operands = SlotOperands(
        **{name: x[name] for name in names},
        teacher_hidden=x["teacher_hidden"] if case.teacher else None,
        bias=bias if case.bias else None,
        softcap=case.softcap,
        logit_scale=case.scale,
    )
    matches = torch.zeros(case.slots, dtype=torch.bool, device=device)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=case.autocast)
    with half, patch.object(chunks, "CHUNK_ELEMENTS", case.rows * case.vocab):
        total, ce, l1 = vocabulary_loss(operands, kernel=kernel, matches=matches)
    gradients = torch.autograd.grad(3 * total, trained) if trained else ()
    found = {"total": total.detach(), "ce": ce, "l1": l1, "matches": matches}
    found |= dict(zip(case.names(), gradients, strict=True))
    return {name: tensor.cpu() for name, tensor in found.items()}


def define(case: LossCase) -> dict[str, Tensor]:
    """Return the same by `train/losses/slots.py` and autograd, in float64."""
    x = case.operands(torch.float64)
    if case.autocast:
        halved = ("hidden", "head", "teacher_hidden", "latent", "weight")
        x |= {name: x[name].bfloat16().double() for name in halved}
    trained = [x[name].requires_grad_(True) for name in case.names()]

    def capped(states: Tensor) -> Tensor:
        logits = states @ x["head"].T * case.scale
        return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)

    logits = capped(x["hidden"])
    if case.bias:
        latents = x["latent"][x["positions"]] if case.bias == "position" else x["latent"]
        logits = logits + latents @ x["weight"].T
    teacher = capped(x["teacher_hidden"])[x["positions"]].detach() if case.teacher else None
    ce, l1 = slot_losses(logits, x["labels"], teacher)
    total = (x["ce_weights"] * ce).sum()
    matches = torch.zeros(case.slots, dtype=torch.bool)
    if l1 is not None and teacher is not None:
        total = total + (x["l1_weights"] * l1).sum()
        matches = logits.argmax(-1) == teacher.argmax(-1)
    gradients = torch.autograd.grad(3 * total, trained) if trained else ()
    l1 = torch.zeros_like(ce) if l1 is None else l1
    found = {"total": total, "ce": ce, "l1": l1, "matches": matches}
    found = {name: tensor.detach() for name, tensor in found.items()}
    return found | dict(zip(case.names(), gradients, strict=True))


def computed_with(head: str) -> dict[str, dict[str, Any]]:
    """Return loss and gradients of a small draft with a Markov head, or "none", by the name of the kernel."""
    from tests.train.drafts import as_pack, random_samples, small_model
    from train.draft.dspark.module import DSparkTrainerModule

    masks, anchors = [[0, 1, 1, 1, 1, 1] * 5, [1, 1, 1, 0, 1, 1] * 4], [[1, 3, 4, 20], [0, 1, 4, 18]]
    batch = as_pack(random_samples(masks), anchors)
    batch = {n: t.float() if t.is_floating_point() else t for n, t in batch.items()}
    settings = (
        {"markov_head_type": head}
        if head != "none"
        else {"markov_rank": 0, "confidence_head_with_markov": False}
    )
    found = {}
    for kernel in ("torch", "triton"):
        model = small_model(**settings).float()
        model.initialize_embeddings_and_head(
            embed_tokens=model.embed_tokens.weight, lm_head=model.lm_head.weight
        )
        module = DSparkTrainerModule(model, 4.0)
        module.loss_kernel = kernel
        metrics = module(**batch, observe=True)
        metrics.loss.backward()
        found[kernel] = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        found[kernel] |= {
            "loss": metrics.loss.detach().numpy(),
            "tau": metrics.tau.numpy(),
            "matches": metrics.slots.matches.numpy(),
        }
    return found


class Interpreter:
    """A process of its own in which Triton interprets kernels: it must know so before it is imported."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)

    def close(self) -> None:
        self._pool.shutdown()

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Return what a function of this module returns there."""
        return self._pool.submit(function, *arguments).result()

    def compute(self, case: LossCase) -> dict[str, Tensor]:
        """Return `compute` of the case by the kernel."""
        return {name: torch.from_numpy(a) for name, a in self.call(_arrays, case).items()}


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def _arrays(case: LossCase) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in compute(case, "triton").items()}
