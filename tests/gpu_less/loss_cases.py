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

from tests import vocabulary_reference
from train.losses import chunks
from train.losses.fused import LowRankBias, SlotOperands, vocabulary_loss
from train.losses.reach import teacher_reach
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
    soft: bool = False
    """With weights for the cross entropy with the teacher."""
    own_head: bool = False
    """The draft's head is not the teacher's."""
    target_vocab: int | None = None
    """The target's tokens, of which `vocab` are the draft's; None for no others."""
    whole: bool = False
    """Compare with the target's whole vocabulary; else with its probabilities of the draft's alone."""
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
        if self.soft:
            made["soft_weights"] = torch.rand(self.slots, generator=generator)
        if self.own_head:
            made["teacher_head"] = normal(self.vocab, HIDDEN) / 2
        if self.target_vocab is not None:
            made |= self._of_a_part(generator)
        if self.change is not None:
            self.change(made)
        made = {n: t.to(dtype) if t.is_floating_point() else t for n, t in made.items()}
        if self.whole:
            given = made["teacher_hidden"], made["target_head"], made["kept"], self.softcap, self.scale
            made["teacher_mass"], made["reachable"] = teacher_reach(*given)
        return made

    def _of_a_part(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the target's head, the tokens kept of it and their head, and labels, some not kept."""
        assert self.target_vocab is not None
        head = torch.randn(self.target_vocab, HIDDEN, generator=generator) / 2
        kept = torch.randperm(self.target_vocab, generator=generator)[: self.vocab].sort().values
        numbers = torch.full((self.target_vocab,), -1)
        numbers[kept] = torch.arange(self.vocab)
        tokens = torch.randint(self.target_vocab, (self.slots,), generator=generator)
        of_teacher = "teacher_head" if self.own_head else "head"
        return {"target_head": head, "kept": kept, of_teacher: head[kept], "labels": numbers[tokens]}

    def names(self) -> list[str]:
        """Names of the operands that get a gradient."""
        return [name for name in self.trained if self.bias or name in ("hidden", "head")]


def compute(
    case: LossCase, kernel: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return losses, gradients by the operands' names, and where the most likely tokens match."""
    return _compute(case, {name: tensor.to(device) for name, tensor in case.operands(dtype).items()}, kernel)


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
    further = ("soft_weights", "teacher_head", "teacher_mass", "reachable")
    operands = SlotOperands(
        **{name: x[name] for name in names},
        **{name: x.get(name) for name in further},
        teacher_hidden=x["teacher_hidden"] if case.teacher else None,
        bias=bias if case.bias else None,
        softcap=case.softcap,
        logit_scale=case.scale,
    )
    matches = torch.zeros(case.slots, dtype=torch.bool, device=device)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=case.autocast)
    with half, patch.object(chunks, "CHUNK_ELEMENTS", case.rows * case.vocab):
        losses = vocabulary_loss(operands, kernel=kernel, matches=matches)
    gradients = torch.autograd.grad(3 * losses.sum, trained) if trained else ()
    assert (losses.l1 is not None) == case.teacher
    assert (losses.soft_ce is not None) == (case.soft and case.teacher)
    l1 = torch.zeros_like(losses.ce) if losses.l1 is None else losses.l1
    found = {"total": losses.sum.detach(), "ce": losses.ce, "l1": l1, "matches": matches}
    found |= {} if losses.soft_ce is None else {"soft_ce": losses.soft_ce}
    found |= dict(zip(case.names(), gradients, strict=True))
    return {name: tensor.cpu() for name, tensor in found.items()}


def define(case: LossCase) -> dict[str, Tensor]:
    """Return the same by `train/losses/slots.py` and autograd, in float64."""
    x = case.operands(torch.float64)
    if case.autocast:
        halved = ("hidden", "head", "teacher_hidden", "teacher_head", "latent", "weight")
        x |= {name: x[name].bfloat16().double() for name in halved if name in x}
    trained = [x[name].requires_grad_(True) for name in case.names()]

    def capped(states: Tensor, head: Tensor) -> Tensor:
        logits = states @ head.T * case.scale
        return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)

    logits = capped(x["hidden"], x["head"])
    if case.bias:
        latents = x["latent"][x["positions"]] if case.bias == "position" else x["latent"]
        logits = logits + latents @ x["weight"].T
    teacher, mass = None, None
    matches = torch.zeros(case.slots, dtype=torch.bool)
    if case.teacher:
        teacher = capped(x["teacher_hidden"], x.get("teacher_head", x["head"]))[x["positions"]].detach()
        matches = logits.argmax(-1) == teacher.argmax(-1)
    if case.whole:
        mass = x["teacher_mass"][x["positions"]]
        matches &= x["reachable"][x["positions"]]
    losses = slot_losses(logits, x["labels"], teacher, mass=mass, soft=case.soft)
    found = {"ce": losses.ce, "l1": torch.zeros_like(losses.ce) if losses.l1 is None else losses.l1}
    found |= {} if losses.soft_ce is None else {"soft_ce": losses.soft_ce}
    return _differentiated(case, x, found | {"matches": matches}, trained)


def define_naively(case: LossCase) -> dict[str, Tensor]:
    """Return the same slot by slot, by `tests/vocabulary_reference.py` and autograd, in float64."""
    x = case.operands(torch.float64)
    trained = [x[name].requires_grad_(True) for name in case.names()]
    found = vocabulary_reference.slots(naive_inputs(case, x))
    if not (case.soft and case.teacher):
        del found["soft_ce"]
    if not case.teacher:
        found |= {"l1": torch.zeros_like(found["ce"]), "matches": torch.zeros_like(found["matches"])}
    return _differentiated(case, x, found, trained)


def naive_inputs(case: LossCase, x: dict[str, Tensor]) -> vocabulary_reference.Inputs:
    """Return a case's operands in float64 for the reference."""
    target_head = x.get("target_head", x.get("teacher_head", x["head"]))
    return vocabulary_reference.Inputs(
        hidden=x["hidden"],
        head=x["head"],
        latent=x["latent"] if case.bias else None,
        weight=x["weight"] if case.bias else None,
        by_position=case.bias == "position",
        target_head=target_head,
        kept=x["kept"].tolist() if "kept" in x else list(range(case.vocab)),
        whole=case.whole,
        teacher_hidden=x["teacher_hidden"],
        positions=x["positions"].tolist(),
        labels=x["labels"].tolist(),
        softcap=case.softcap,
        scale=case.scale,
    )


def _differentiated(
    case: LossCase, x: dict[str, Tensor], found: dict[str, Tensor], trained: list[Tensor]
) -> dict[str, Tensor]:
    """Add the weighted sum and its gradients to the losses of slots."""
    weighted = [("ce", "ce_weights"), ("l1", "l1_weights"), ("soft_ce", "soft_weights")]
    total = sum((x[weights] * found[name]).sum() for name, weights in weighted if name in found)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(3 * total, trained) if trained else ()
    found = {name: tensor.detach() for name, tensor in ({"total": total} | found).items()}
    return found | dict(zip(case.names(), gradients, strict=True))


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Values to the tolerance; gradients likewise, relative to their largest."""
    assert got.keys() == wanted.keys()
    assert torch.equal(got["matches"], wanted["matches"])
    for name, right in wanted.items():
        right = right.double()
        scale = torch.cat([right.new_ones(1), right[right.isfinite()].abs()]).max()
        torch.testing.assert_close(
            got[name].double() / scale,
            right / scale,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


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
