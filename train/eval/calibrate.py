"""Sequential temperature scaling of the confidence head: `dspark calibrate`.

DSpark paper, section 3.2.1: positions are fitted from left to right; each gets the temperature, from a grid,
that minimises the calibration error of the product of confidences up to it, with those before it as fitted.
The temperatures lie beside the draft, in the form that SGLang takes
(`--speculative-dspark-confidence-sts-path`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, RunError
from train.data.sampling import drawn_anchors
from train.eval import metrics as figures
from train.eval.heldout import Blocks, measure
from train.runs.open import DraftOnCache
from train.runs.results import table
from train.runtime.distributed import Ranks

# From a tenth to ten, 41 steps, evenly in the logarithm: SGLang's grid.
GRID = np.logspace(-1, 1, 41)


def fit_temperatures(blocks: Blocks, grid: np.ndarray = GRID) -> np.ndarray:
    """The temperature of each position, `[K]`; 1 where no slot is supervised.

    Of temperatures equally good the one nearest to 1 is taken.

    Args:
        blocks: with confidences.
        grid: temperatures to choose from.
    """
    assert blocks.confidence is not None
    order = grid[np.argsort(np.abs(np.log(grid)), kind="stable")]
    reached = np.cumprod(np.where(blocks.valid, blocks.accept, 0.0), axis=1)
    predicted = np.ones(len(blocks))
    temperatures = np.ones(blocks.valid.shape[1])
    for k in range(len(temperatures)):
        valid = blocks.valid[:, k]
        if not valid.any():
            break
        logits, outcomes = blocks.confidence[valid, k], reached[valid, k]
        errors = [figures.ece(predicted[valid] * figures.sigmoid(logits / t), outcomes) for t in order]
        temperatures[k] = order[int(np.argmin(errors))]
        predicted = predicted * figures.sigmoid(blocks.confidence[:, k] / temperatures[k])
    return temperatures


def halves(reader: CacheReader, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples to fit on and those to report on, by a bit of their ids: the same in every cache.

    Raises:
        ConfigError: a half is empty.
    """
    first = (reader.sample_ids[samples, 4] & 1) == 0
    if not first.any() or first.all():
        raise ConfigError(
            f"the {len(samples)} held-out samples can't be halved into one part to fit on and one to report "
            "on: train with a higher train.held_out, or capture more data"
        )
    return samples[first], samples[~first]


def calibrate(
    draft: DraftOnCache, ranks: Ranks, *, anchors: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Fit on one half of the held-out samples, report on the other, before and after.

    Args:
        anchors: of each sample, drawn by (seed, sample id); None is every candidate position.

    Raises:
        RunError: the draft has no confidence head.
        ConfigError: too few samples are held out.
    """
    with ranks.together():
        if not draft.config.draft.confidence_head:
            raise RunError(
                f"{draft.trained.folder} has no confidence head to calibrate: train with "
                "draft.confidence_head"
            )
        parts = halves(draft.reader, draft.held_out)
    fitted, reported = (
        measure(
            draft.module,
            draft.reader,
            samples,
            draft.config,
            ranks,
            drawn_anchors(anchors, seed),
            "calibrate",
        )
        for samples in parts
    )
    with ranks.together():
        if not len(fitted) or not len(reported):
            raise ConfigError(
                "a half of the held-out samples has no anchors: train with a higher train.held_out"
            )
    temperatures = fit_temperatures(fitted)
    before, after = (figures.calibration(reported, t) for t in (None, temperatures))
    assert before is not None
    assert after is not None
    return {
        "temperatures": temperatures.tolist(),
        "dataset": ", ".join(draft.reader.manifest.identity.data.sources),
        "num_samples": len(fitted),
        # One a position, and no null among them, or SGLang would refuse the file.
        "ece_before": [error for error in before["prefix"]["ece_by_position"] if error is not None],
        "ece_after": [error for error in after["prefix"]["ece_by_position"] if error is not None],
        "step": draft.trained.step,
        "fit": {"samples": len(parts[0]), "blocks": len(fitted)},
        "report": {"samples": len(parts[1]), "blocks": len(reported), "before": before, "after": after},
        "thresholds": {
            "before": figures.threshold_sweep(reported),
            "after": figures.threshold_sweep(reported, temperatures),
        },
    }


def format_calibration(result: dict[str, Any]) -> str:
    """The figures for a terminal."""
    fit, report = result["fit"], result["report"]
    before, after = (report[name] for name in ("before", "after"))
    rows: list[tuple[str, list[Any]]] = [
        ("position", [str(k + 1) for k in range(len(result["temperatures"]))]),
        ("temperature", result["temperatures"]),
    ]
    for title, key in (("confidence", "slot"), ("all up to here", "prefix")):
        rows += [
            (f"{title}: calibration error before", before[key]["ece_by_position"]),
            ("  after", after[key]["ece_by_position"]),
        ]
    lines = [
        f"fitted on {fit['samples']:,} held-out samples ({fit['blocks']:,} blocks), reported on the other "
        f"{report['samples']:,} ({report['blocks']:,} blocks)",
        *table(rows),
        f"  all up to each position: calibration error {before['prefix']['ece']:.4f} before, "
        f"{after['prefix']['ece']:.4f} after",
    ]
    return "\n".join(lines)
