"""Train NVIDIA's published DSpark draft, of the package nemo-automodel, with its own loss on our batches.

benchmarks/acceptance.py runs it. The draft's code, its first weights and its loss are theirs. Ours are the
batches and anchors, the optimiser with its schedule, and the evaluation. It begins anew when it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import config as configuration
from train.data.loader import loaded
from train.data.packing import steps_from
from train.draft.settings import run_config
from train.eval.validate import validate
from train.runtime.distributed import Ranks, open_ranks
from train.runtime.precision import autocast, resolve_precision
from train.trainer.optimizer import build_optimizers, learning_rate, normalise_gradients, set_learning_rate
from train.trainer.setup import Setup, build_draft, count_run_steps, set_up


def their_module(setup: Setup) -> nn.Module:
    """Return NVIDIA's module with fresh weights, for the shape of our draft."""
    from nemo_automodel.components.speculative.dspark.core import DSparkTrainerModule
    from nemo_automodel.components.speculative.dspark.draft_qwen3 import Qwen3DSparkModel

    loss, target = setup.config.loss, setup.reader.manifest.identity.target
    if (target.embedding_scale, target.logit_scale, target.final_logit_softcapping) != (1, 1, None):
        sys.exit(f"NVIDIA's module has no scales and no soft cap, {target.name} has: choose another target")
    setup.shape._attn_implementation = "sdpa"
    torch.manual_seed(setup.config.train.seed)
    draft = Qwen3DSparkModel(setup.shape).float()
    frozen = setup.reader.frozen()
    for name in ("embed_tokens", "lm_head"):
        weight = nn.Parameter(frozen[f"{name}.weight"].float(), requires_grad=False)
        getattr(draft, name).weight = weight
    return DSparkTrainerModule(
        draft,
        loss_decay_gamma=loss.decay_gamma,
        ce_loss_alpha=loss.ce_alpha,
        l1_loss_alpha=loss.l1_alpha,
        confidence_head_alpha=loss.confidence_alpha,
    )


def give_anchors(batch: dict[str, torch.Tensor]) -> None:
    """Make NVIDIA's forward take a batch's anchors instead of drawing its own."""
    from nemo_automodel.components.speculative.dspark import draft_qwen3

    chosen = batch["anchor_positions"], batch["block_keep_mask"]
    draft_qwen3.sample_anchor_positions = lambda **_: chosen


def their_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a pack as NVIDIA's packed forward takes it."""
    documents = batch["document_ids"][0]
    _, lengths = torch.unique_consecutive(documents, return_counts=True)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
    last = torch.repeat_interleave(lengths, lengths) - 1
    return {
        "input_ids": batch["input_ids"].long(),
        "target_hidden_states": batch["target_hidden_states"].flatten(2),
        "loss_mask": batch["loss_mask"],
        "target_last_hidden_states": batch["target_last_hidden_states"],
        "position_ids": positions[None],
        "seq_lens": lengths[None],
        "doc_remaining": (last - positions)[None],
    }


def train(setup: Setup, ranks: Ranks) -> dict[str, object]:
    """Train and evaluate. Return the evaluation, the tokens trained on and the seconds of the steps."""
    config, reader = setup.config, setup.reader
    train, total = config.train, count_run_steps(setup)
    module = their_module(setup)
    optimizers = build_optimizers(module.draft_model, train, setup.kind.lr_scales(train), setup.kind.matrices)
    steps = itertools.islice(steps_from(*setup.order, train), total)
    steps, ahead = itertools.tee(steps)
    chosen = (
        (members, setup.kind.collate(setup.kind.training_anchors(train, step.epoch)))
        for step in ahead
        for members in step.packs
    )
    batches = loaded(reader, chosen, tuple(setup.shape.target_layer_ids), train.batch_tokens, ranks.device)
    tokens, seconds = 0, 0.0
    for number, step in enumerate(steps):
        started = time.perf_counter()
        set_learning_rate(optimizers, learning_rate(number, total, train))
        for _ in step.packs:
            batch = next(batches)
            tensors = batch.tensors()
            if (
                resolve_precision(ranks.device, train.precision) == "fp32"
            ):  # without autocast their layers take no bf16
                tensors = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
            give_anchors(tensors)
            with autocast(ranks.device, train.precision):
                metrics = module(**their_batch(tensors))
            metrics.loss.backward()
            tokens += batch.num_tokens
        normalise_gradients(module.draft_model, torch.tensor(float(len(step.packs))), train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        if (number + 1) % train.log_every == 0:
            print(f"step {number + 1} of {total}: loss {metrics.loss.item():.4f}", flush=True)
    ours = build_draft(setup)
    ours.load_state_dict(module.draft_model.state_dict(), strict=True)
    evaluation = validate(setup.kind.on(ours, config, ranks.device), reader, setup.held_out, config, ranks)
    return {"evaluation": evaluation, "tokens": tokens, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    values = configuration.load_toml(options.config)
    for setting in options.settings:
        key, value = setting.split("=", 1)
        table, name = key.split(".")
        values.setdefault(table, {})[name] = json.loads(value)
    with open_ranks("cpu") as ranks:
        setup = set_up(options.cache, run_config(values), ranks.device)
        figures = train(setup, ranks)
    options.run.mkdir(parents=True, exist_ok=True)
    (options.run / "figures.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
