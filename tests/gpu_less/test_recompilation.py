"""Graphs that a run on a GPU compiles, counted on the CPU: flex_attention, traced but not made into kernels.

The compiler's backend is `aot_eager`, which compiles the same graphs as on a GPU and runs them with torch's
own operations. So these tests see what is traced again, and that compiling changes no number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from tests.conftest import run_ok
from tests.train.drafts import as_pack, random_samples, small_model
from tests.train.runs import lines_of, train_arguments
from train.config import TrainConfig
from train.draft.blocks import module
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.settings import run_config
from train.runtime import compiled as compiling

pytestmark = [
    pytest.mark.gpu_less,
    # Of torch's own code, while it traces the indexing of a mask.
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
]


@dataclass
class Traced:
    """Compiled graphs, and the shapes that were seen."""

    graphs: Counter[str] = field(default_factory=Counter)
    """Graphs by the name of the function, with "and backward" where gradients were wanted."""
    widths: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    """Numbers of blocks of the packs, with and without gradients."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    """Do as on a GPU where flex_attention runs, with a compiler that counts."""
    seen, real = Traced(), torch.compile

    @cache  # as torch's own backend, the same for all compilations with the same options
    def counting(name: str) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
            seen.graphs[name + (" and backward" if torch.is_grad_enabled() else "")] += 1
            return aot_eager(graph, inputs)

        return backend

    def compile_counted(
        function: Callable[..., Any], dynamic: bool | None = None, **_: Any
    ) -> Callable[..., Any]:
        return real(function, dynamic=dynamic, backend=counting(function.__name__))

    forward = DSparkTrainerModule.forward

    def noted(self: DSparkTrainerModule, *arguments: Any, **named: Any) -> Any:
        seen.widths[torch.is_grad_enabled()].add(named["anchor_positions"].shape[1])
        return forward(self, *arguments, **named)

    compiling.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", compile_counted)
    monkeypatch.setattr(DSparkTrainerModule, "forward", noted)
    monkeypatch.setattr(module, "resolve_attention", lambda *_: "flex")
    monkeypatch.setattr(module, "flex_options", lambda *_: {"FORCE_USE_FLEX_ATTENTION": True})
    # Compiled flex_attention has no backward on a CPU.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None, raising=False)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield seen
    compiling.compiled.cache_clear()
    torch._dynamo.reset()


def pack(lengths: tuple[int, ...], positions: int = 160, blocks: int = 32) -> dict[str, torch.Tensor]:
    """A pack of samples, supervised from a third of each on, with a block at every third candidate."""
    samples = [[0] * (n // 3) + [1] * (n - n // 3) for n in lengths]
    anchors = [list(range(n // 3, n - 2, 3)) for n in lengths]
    batch = as_pack(random_samples(samples), anchors, padding=positions - sum(lengths))
    batch["document_ids"] = batch["document_ids"].int()
    for name in ("anchor_positions", "block_keep_mask"):
        batch[name] = F.pad(batch[name][:, :blocks], (0, blocks - batch[name].shape[1]))
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


def test_a_run_compiles_each_function_once_for_training_and_once_for_evaluation(
    cache_dir: Path, tmp_path: Path, traced: Traced
) -> None:
    """Packs of an epoch, of which the last is not full, with evaluations between them and a command after."""
    settings = {"train__compile": "on", "draft__head_dim": 16, "train__anchors_per_batch": 96}
    settings |= {"train__max_steps": 9, "train__eval_every": 3, "train__log_every": 1}
    settings |= {"train__held_out": 0.5, "train__eval_anchors": 100}
    run_ok(*train_arguments(cache_dir, tmp_path / "run", **settings))
    assert sum("held_out" in line for line in lines_of(tmp_path / "run")) == 3
    assert traced.widths[True] == {96}
    assert len(traced.widths[False]) > 2
    # The loss computes its own gradients, in the forward.
    wanted = {"backbone and backward": 1, "backbone": 1, "differentiate": 1}
    assert traced.graphs == wanted
    # Packs of all anchors, in parts, by the draft and by an untrained one.
    run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "run", "--device", "cpu")
    assert len(traced.widths[False]) > 5
    assert traced.graphs == wanted
    assert not counters["graph_break"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_step_gives_the_numbers_of_the_plain_one(precision: str, traced: Traced) -> None:
    del traced  # compiles as on a GPU
    losses: dict[str, list[torch.Tensor]] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for attention in ("sdpa", "flex"):
        model = small_model(head_dim=16, num_hidden_layers=1).float()
        for frozen in (model.embed_tokens, model.lm_head):
            frozen.requires_grad_(False)
        step = DSparkTrainerModule(model, 4.0)
        if attention == "flex":
            train = TrainConfig(compile="on", precision="fp32", activation_checkpointing=True)
            step.prepare(run_config({"train": train}), torch.device("cpu"))
            assert model.attention == "flex"
        losses[attention] = []
        for lengths in ((54, 42, 40), (30, 70), (100,)):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                metrics = step(**pack(lengths))
            metrics.loss.backward()
            losses[attention].append(metrics.loss.detach())
        gradients[attention] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    near = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    torch.testing.assert_close(losses["flex"], losses["sdpa"], rtol=near, atol=0)
    assert len(gradients["sdpa"]) > 15
    for name, wanted in gradients["sdpa"].items():
        moved = (gradients["flex"][name] - wanted).norm() / wanted.norm()
        assert moved < near, f"{name}: {moved}"
