"""Evaluation of a draft on a cache's held-out samples alone: `dspark evaluate`.

The figures lie beside the draft, in its checkpoint's folder: `dspark speculate` prints them beside what is
accepted live, `dspark report` draws them.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError
from pipeline.text import figure_table
from train.config import RunConfig
from train.data.sampling import drawn_anchors
from train.draft import DRAFTS
from train.draft.kind import TrainerModule
from train.eval import metrics
from train.eval.heldout import measure
from train.eval.validate import validate
from train.losses.slots import TITLES
from train.runs.figures import CacheFacts, Evaluation, Untrained
from train.runtime.distributed import Ranks


def evaluate(
    module: TrainerModule,
    reader: CacheReader,
    samples: np.ndarray,
    config: RunConfig,
    ranks: Ranks,
    *,
    step: int,
    anchors: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure everything that the cache can tell of a draft; the same on every rank, and every time.

    Args:
        samples: sample numbers, of the held-out split.
        step: optimiser step of the draft.
        anchors: number per sample, drawn by (seed, sample id); None is every candidate position.

    Raises:
        ConfigError: the samples have no anchors.
    """
    blocks = measure(module, reader, samples, config, ranks, drawn_anchors(anchors, seed))
    with ranks.together():
        if not len(blocks):
            raise ConfigError(
                f"the {len(samples)} held-out samples have no two supervised tokens in a row, so no anchors: "
                "set train.held_out higher, or capture longer answers"
            )
    untrained = _untrained(module.draft_model, config, ranks)
    before = validate(untrained, reader, samples, config, ranks) or {}
    return Evaluation(
        step=step,
        samples=len(samples),
        blocks=len(blocks),
        anchors="all" if anchors is None else anchors,
        **vars(metrics.loss_terms(blocks, config.loss)),
        **vars(metrics.acceptance(blocks)),
        decoding=metrics.decoding(blocks) if anchors is None else None,
        confidence=metrics.calibration(blocks),
        thresholds=metrics.threshold_sweep(blocks),
        by_source=metrics.by_group(blocks, _sources(reader, samples), config.loss),
        by_length=metrics.by_group(blocks, _lengths(reader, samples), config.loss),
        by_context=metrics.by_context(blocks, config.loss),
        untrained=Untrained(
            tau=before["tau"],
            accept_by_position=tuple(before["accept_by_position"]),
            blocks=before["blocks"],
        ),
        cache=cache_facts(reader),
    )


def _untrained(model: PreTrainedModel, config: RunConfig, ranks: Ranks) -> TrainerModule:
    """Return the same draft with random weights, to compare with; it shares embedding and head."""
    torch.manual_seed(config.train.seed)
    kind = DRAFTS[config.draft.kind]
    fresh = kind.build(model.config)
    fresh.adopt(model)
    return kind.on(fresh.to(ranks.device), config, ranks.device)


def _sources(reader: CacheReader, samples: np.ndarray) -> dict[int, str]:
    files = reader.manifest.identity.data.sources  # without their directories, so some may be the same
    names = [name if files.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(files, 1)]
    return {i: names[reader.sources[i]] for i in sorted(samples.tolist(), key=lambda i: reader.sources[i])}


def _lengths(reader: CacheReader, samples: np.ndarray) -> dict[int, str]:
    order = sorted(samples.tolist(), key=lambda i: reader.lengths[i])
    return {i: metrics.length_bucket(reader.lengths[i]) for i in order}


def cache_facts(reader: CacheReader) -> CacheFacts:
    """Return what a cache is and what it costs, for readers of figures that were taken from it."""
    manifest = reader.manifest
    features = manifest.identity.features
    return CacheFacts(
        target=manifest.identity.target.name,
        target_weights=manifest.identity.target.weights,
        data_sha256=manifest.identity.data.sha256,
        sources=manifest.identity.data.sources,
        samples=manifest.num_samples,
        tokens=manifest.num_tokens,
        bytes=manifest.num_bytes,
        bytes_per_token=sum(manifest.shards.bytes) / manifest.num_tokens,
        layer_ids=features.layer_ids,
        context_codec=features.context_codec,
        last_codec=features.last_codec,
        fidelity=dict(manifest.fidelity),
    )


def _losses(result: Evaluation) -> list[tuple[str, float | None]]:
    """Return the loss and its terms, by their names for people."""
    terms = {name: getattr(result, f"{name}_loss") for name in ("ce", "l1", "confidence")}
    terms |= result.further_losses
    return [("loss", result.loss), *((TITLES.get(name, name), value) for name, value in terms.items())]


def format_evaluation(result: Evaluation) -> str:
    """Lay the figures out for a terminal."""
    anchors = "every candidate an anchor" if result.anchors == "all" else f"{result.anchors} each"
    rows = [
        ("position", [str(k + 1) for k in range(len(result.accept_by_position))]),
        ("acceptance, sampling", result.accept_by_position),
        ("  given the tokens before it", result.accept_given_prefix),
        ("  of an untrained draft", result.untrained.accept_by_position),
        ("acceptance, greedy", result.greedy_accept_by_position),
        ("  given the tokens before it", result.greedy_accept_given_prefix),
    ]
    if result.confidence is not None:
        slot, prefix = result.confidence.slot, result.confidence.prefix
        rows += [
            ("confidence, calibration error", slot.ece_by_position),
            ("  area under the ROC curve", slot.auc_by_position),
            ("  error up to here", prefix.ece_by_position),
        ]
    lines = [
        f"held-out tau {result.tau:.3f} sampling, {result.greedy_tau:.3f} greedy, over "
        f"{result.blocks:,} blocks of {result.samples:,} samples ({anchors})",
        "  " + ", ".join(f"{title} {value:.4f}" for title, value in _losses(result) if value is not None),
        *figure_table(rows),
    ]
    if result.decoding is not None:
        sampling, greedy = result.decoding.sampling, result.decoding.greedy
        lines.append(
            f"  decoding these texts: {sampling.tokens_per_round:.3f} tokens per round sampling, "
            f"{greedy.tokens_per_round:.3f} greedy (a round begins where the last one ended)"
        )
    for title, groups in (
        ("source", result.by_source),
        ("tokens", result.by_length),
        ("context", result.by_context),
    ):
        found = [(name, [row.samples, row.blocks, row.tau, row.greedy_tau]) for name, row in groups.items()]
        lines += figure_table([(title, ["samples", "blocks", "tau", "greedy"]), *found])
    return "\n".join(lines)
