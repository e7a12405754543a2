"""Sequential temperature scaling of the confidence head: `dspark calibrate`.

DSpark paper, section 3.2.1: positions are fitted from left to right. Each gets the temperature of a grid that
minimises the calibration error of the product of confidences up to it, with the earlier ones as fitted. The
temperatures lie beside the draft, in the form that SGLang takes (`--speculative-dspark-confidence-sts-path`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, RunError
from pipeline.text import figure_table
from train.data.sampling import drawn_anchors
from train.draft import DRAFTS
from train.eval import metrics
from train.eval.heldout import Blocks, measure
from train.runs.figures import Calibration, CalibrationReport, Counts, Sweeps
from train.runs.open import DraftOnCache
from train.runtime.distributed import Ranks

# From a tenth to ten, 41 steps, evenly in the logarithm: SGLang's grid.
GRID = np.logspace(-1, 1, 41)


def fit_temperatures(blocks: Blocks, grid: np.ndarray = GRID) -> np.ndarray:
    """Fit the temperature of each position, `[K]`; 1 where no slot is supervised.

    Of equally good temperatures it takes the one nearest to 1.

    Args:
        blocks: of a draft with a confidence head.
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
        errors = [metrics.ece(predicted[valid] * metrics.sigmoid(logits / t), outcomes) for t in order]
        temperatures[k] = order[int(np.argmin(errors))]
        predicted = predicted * metrics.sigmoid(blocks.confidence[:, k] / temperatures[k])
    return temperatures


def halves(reader: CacheReader, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split samples into those to fit on and those to report on, by a bit of their ids.

    The same sample is in the same half of every cache.

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


def calibrate(draft: DraftOnCache, ranks: Ranks, *, anchors: int | None = None, seed: int = 0) -> Calibration:
    """Fit on one half of the held-out samples, and report on the other, before and after.

    Args:
        anchors: number per sample, drawn by (seed, sample id); None is every candidate position.

    Raises:
        RunError: the draft has no confidence head.
        ConfigError: too few samples are held out.
    """
    with ranks.together():
        if not getattr(draft.config.draft, "confidence_head", False):
            title = DRAFTS[draft.config.draft.kind].title
            able = hasattr(draft.config.draft, "confidence_head")
            remedy = "train with draft.confidence_head" if able else f"{title} drafts have none"
            raise RunError(f"{draft.folder} has no confidence head to calibrate: {remedy}")
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
    before, after = (metrics.calibration(reported, t) for t in (None, temperatures))
    assert before is not None
    assert after is not None
    return Calibration(
        temperatures=tuple(temperatures.tolist()),
        dataset=", ".join(draft.reader.manifest.identity.data.sources),
        num_samples=len(fitted),
        ece_before=cut_unreached(before.prefix.ece_by_position),
        ece_after=cut_unreached(after.prefix.ece_by_position),
        step=draft.step,
        fit=Counts(samples=len(parts[0]), blocks=len(fitted)),
        report=CalibrationReport(samples=len(parts[1]), blocks=len(reported), before=before, after=after),
        thresholds=Sweeps(
            before=metrics.threshold_sweep(reported),
            after=metrics.threshold_sweep(reported, temperatures),
        ),
    )


def cut_unreached(errors: Sequence[float | None]) -> tuple[float, ...]:
    """Cut off the positions that no block reaches: SGLang takes no null.

    Entry k stays about position k. A block's supervised slots are its first ones, so the positions that some
    block reaches are the first ones too, and there is nothing after the first None.
    """
    found = tuple(itertools.takewhile(lambda error: error is not None, errors))
    assert not any(error is not None for error in errors[len(found) :]), "a position is skipped"
    return found


def format_calibration(result: Calibration) -> str:
    """Lay the figures out for a terminal."""
    fit, report = result.fit, result.report
    before, after = report.before, report.after
    rows = [
        ("position", [str(k + 1) for k in range(len(result.temperatures))]),
        ("temperature", result.temperatures),
        ("confidence: calibration error before", before.slot.ece_by_position),
        ("  after", after.slot.ece_by_position),
        ("all up to here: calibration error before", before.prefix.ece_by_position),
        ("  after", after.prefix.ece_by_position),
    ]
    lines = [
        f"fitted on {fit.samples:,} held-out samples ({fit.blocks:,} blocks), reported on the other "
        f"{report.samples:,} ({report.blocks:,} blocks)",
        *figure_table(rows),
        f"  all up to each position: calibration error {before.prefix.ece:.4f} before, "
        f"{after.prefix.ece:.4f} after",
    ]
    return "\n".join(lines)
