"""Training loop: trains a draft from a cache."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import config as configuration
from pipeline.device import reuse_freed_memory
from pipeline.errors import RunError, StoppedError
from pipeline.remote.address import Place
from pipeline.signals import StopRequest, stop_on_signals
from train.config import RunConfig
from train.data.loader import Collate, loaded
from train.data.packing import Step, steps_from
from train.eval.validate import gives_finite_losses, headline, validate
from train.losses.slots import LossSums
from train.runs.changes import LENGTH, changed_settings, flat_settings, lengthen, record_changes
from train.runs.checkpoint import check_finite, newest, save_checkpoint
from train.runs.directory import begin, check_run, load_run_config, locked
from train.runs.names import CHECKPOINTS, METRICS, TRACE, TRACKERS
from train.runs.page import TrainingPage, read_training
from train.runs.state import Best, Progress
from train.runtime.compiled import compiles
from train.runtime.console import Display, say
from train.runtime.distributed import Ranks, open_ranks
from train.runtime.precision import autocast
from train.runtime.profiler import check_profile, step_profiler
from train.runtime.trackers import Trackers
from train.trainer.optimizer import learning_rate, normalise_gradients, set_learning_rate
from train.trainer.parts import Checkpoint, Parts, build_parts
from train.trainer.setup import Setup, count_run_steps, set_up, steps_lines


def train(
    cache: Place,
    config: RunConfig,
    run: Path,
    *,
    device: str = "auto",
    fresh: bool = False,
    profile_steps: int = 0,
) -> dict[str, Any] | None:
    """Train a draft from a cache, or continue the run in that directory. The target is never loaded.

    Under torchrun, all processes must call this; they share each step. Writes to `run`: `config.toml`,
    `run.json`, `metrics.jsonl` (one JSON object per logged step), `checkpoints/step-N`, `latest` and `best`.

    Args:
        fresh: clear an existing run first.
        profile_steps: write a Chrome trace of this many steps, after the first few, to `trace.json`.

    Returns:
        The last held-out evaluation; None if nothing was held out.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    with open_ranks(device) as ranks, stop_on_signals() as stop, ExitStack() as held:
        if ranks.device.type == "cpu":
            reuse_freed_memory()
        # A job that torchrun restarts continues from its own checkpoints.
        fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        with ranks.together():
            begins = fresh or not any(run.glob(f"{CHECKPOINTS}/*step-*"))
            setup = set_up(cache, config, ranks.device, ranks.world, begins=begins)
            identity, skipped = setup.reader.manifest.identity, setup.reader.manifest.skipped.sample
            check_run(run, setup.config, identity, fresh=fresh, skipped=skipped)
            if profile_steps:
                _check_profile(profile_steps, setup, None if fresh else _newest(run, setup))
        if ranks.leads:
            say(configuration.to_toml(setup.config), err=False)
        with ranks.together():
            if ranks.leads:
                held.enter_context(locked(run))
                # again, now under the lock
                check_run(run, setup.config, identity, fresh=fresh, skipped=skipped)
                begin(run, setup.config, identity, fresh=fresh, skipped=skipped)
        with ranks.together():
            checkpoint = _newest(run, setup)
        found = checkpoint and checkpoint.folder.name
        facts = {"config": setup.config, "cache": identity, "skipped samples": skipped}
        ranks.agree(facts | {"newest checkpoint": found})
        if checkpoint is not None and checkpoint.page.progress.complete:
            if ranks.leads:
                say(f"run {run}: complete, nothing is left to train", err=False)
            return checkpoint.page.progress.evaluation
        with ranks.together():
            if ranks.leads:
                step = checkpoint.page.progress.step if checkpoint else 0
                changes = record_changes(run, load_run_config(run), setup.config, step)
                if changes:
                    say(changes)
        parts = build_parts(ranks, setup, run, checkpoint)
        return Training(ranks, setup, run, parts, stop, checkpoint).run(profile_steps).evaluation


def _newest(run: Path, setup: Setup) -> Checkpoint | None:
    """Return the checkpoint to continue from, with the number of steps that the config asks for now."""
    folder = newest(run)
    if folder is None:
        return None
    page = read_training(folder)
    if changed_settings(page.config, setup.config).keys() & {*LENGTH}:
        lengthen(run, page.progress, count_run_steps(setup))
    return Checkpoint(folder, page)


def _check_profile(steps: int, setup: Setup, checkpoint: Checkpoint | None) -> None:
    """Check that a run has enough steps left to trace; a complete run needs none."""
    if checkpoint is None:
        check_profile(steps, count_run_steps(setup))
        return
    progress = checkpoint.page.progress
    if not progress.complete:
        check_profile(steps, progress.total_steps - progress.step)


class Training:
    """A running training.

    Args:
        ranks: the ranks that train.
        setup: the checked config, cache and samples.
        run: the run's directory.
        parts: draft, optimisers, progress and files.
        stop: set by a signal that asks to stop.
        checkpoint: checkpoint that the run continues from, if any.
    """

    def __init__(
        self,
        ranks: Ranks,
        setup: Setup,
        run: Path,
        parts: Parts,
        stop: StopRequest,
        checkpoint: Checkpoint | None = None,
    ):
        self.ranks, self.setup, self.path, self.parts, self.stop = ranks, setup, run, parts, stop
        self.checkpoint = checkpoint
        self.reader, self.config = setup.reader, setup.config
        self.spread, self.progress, self.window = parts.spread, parts.progress, parts.window
        self.model = parts.module.draft_model
        self.display = Display(ranks, self.progress.total_steps, self.progress.step)
        self.saved = time.monotonic()
        self.stop_agreed = False  # a signal that all ranks know of
        self.denominator = torch.ones((), device=ranks.device)

    def run(self, profile_steps: int = 0) -> Progress:
        """Train to the end, or until a signal.

        Raises:
            StoppedError: a signal stopped the run, after a checkpoint was saved.
            RunError: too many steps in a row had a non-finite loss or gradient.
        """
        train, progress = self.config.train, self.progress
        left = progress.total_steps - progress.step
        profiler = step_profiler(profile_steps if self.ranks.leads else 0, left, self.path / TRACE)
        self._say_where()
        steps = steps_from(
            *self.setup.order,
            train,
            progress.epoch,
            progress.steps_of_epoch,
            self.ranks.rank,
            self.ranks.world,
        )
        steps, ahead = itertools.tee(itertools.islice(steps, left))
        self.batches = loaded(
            self.reader,
            ((members, self._collate(step.epoch)) for step in ahead for members in step.packs),
            tuple(self.setup.shape.target_layer_ids),
            train.batch_tokens,
            self.ranks.device,
            partial(self.setup.kind.flops, self.setup.shape),
            self.setup.reads(self.display.say),
        )
        with self.ranks.together():
            names = train.report_to if self.ranks.leads else ()
            self.trackers = Trackers(
                names,
                run=self.path,
                identity_file=self.path / TRACKERS,
                config=flat_settings(self.config),
                step=progress.step,
            )
        with self.trackers, closing(self.display):
            if self._evaluation_due() and progress.evaluated < progress.step:  # a signal interrupted it
                self._between_steps(checkpoint_due=False)
            for step in steps:
                if progress.complete:
                    break
                due = self._step(step)
                profiler.step()
                self._between_steps(checkpoint_due=due)
        return progress

    def _say_where(self) -> None:
        """Print the machine's facts, and those that have changed since the checkpoint was saved."""
        progress, parts = self.progress, self.parts
        self.display.say(", ".join(f"{name} {value}" for name, value in parts.machine.items()))
        if self.checkpoint is None or not progress.step:
            for line in steps_lines(self.setup, progress.total_steps):
                self.display.say(line)
            return
        self.display.say(f"continuing from step {progress.step} of {progress.total_steps}")
        last, now = ({**page.machine, **page.version} for page in (self.checkpoint.page, self._page()))
        changed = [f"{k}: {last[k]}, now {v}" for k, v in now.items() if last.get(k, v) != v]
        if changed:
            self.display.say(f"changed since the checkpoint ({'; '.join(changed)}): rounding may differ")

    def _collate(self, epoch: int) -> Collate:
        train, kind = self.config.train, self.setup.kind
        blocks = train.anchors_per_batch if compiles(train.compile, self.ranks.device) else 0
        return kind.collate(kind.training_anchors(train, epoch), blocks)

    def _step(self, step: Step) -> bool:
        """Take an optimiser step. Return whether a checkpoint is due by time."""
        started, waited = time.perf_counter(), 0.0
        train, progress, ranks = self.config.train, self.progress, self.ranks
        lr = learning_rate(progress.step, progress.total_steps, train)
        set_learning_rate(self.parts.optimizers, lr)
        sums: LossSums | None = None
        losses: list[Tensor] = []
        tokens, flops = 0, 0.0
        for number in range(1, len(step.packs) + 1):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            with self.spread.micro_batch(last=number == len(step.packs)):
                with autocast(ranks.device, train.precision):
                    metrics = self.spread(**batch.tensors(), denominator=self.denominator)
                metrics.loss.backward()
            part = metrics.sums.detach()
            sums = part if sums is None else sums + part
            losses.append(metrics.loss.detach())
            tokens, flops = tokens + batch.num_tokens, flops + batch.flops
        assert sums is not None
        counts = torch.tensor([tokens, flops, waited], dtype=torch.float64)
        *tensors, counts = ranks.total([*sums.tensors(), counts])
        sums = LossSums.from_tensors(list(sums.terms), tensors)
        due = ranks.leads and 0 < train.checkpoint_minutes * 60 <= time.monotonic() - self.saved
        due, self.stop_agreed = ranks.any_of(due, self.stop.signal is not None)
        norm = normalise_gradients(self.model, sums.weight / ranks.world, train.max_grad_norm)
        finite = torch.isfinite(norm + sum(sums.terms.values())).item()
        if finite:
            for optimizer in self.parts.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch, progress.steps_of_epoch = step.epoch, step.number + 1
        if finite:
            self.window.add(sums, norm)
            progress.skipped_in_a_row = 0
        else:
            self._skip(step, losses)
        tokens, flops, waited = counts.tolist()
        seconds = time.perf_counter() - started
        progress.tokens += int(tokens)
        progress.seconds += seconds
        self.window.count(tokens=tokens, flops=flops, seconds=seconds, waited=waited / ranks.world)
        self.display.stepped()
        return due

    def _skip(self, step: Step, losses: list[Tensor]) -> None:
        """Count a step whose loss or gradient is not finite. End the run after too many in a row."""
        progress, most = self.progress, self.config.train.max_skipped_steps
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        self.window.count(skipped=1)
        guilty = [pack for pack, loss in zip(step.packs, losses, strict=True) if not torch.isfinite(loss)]
        all_ranks = self.ranks.gather((guilty, step.packs))
        guilty = [pack for found, _ in all_ranks for pack in found]
        packs = guilty or [pack for _, found in all_ranks for pack in found]
        ids = [self.reader.sample_ids[i].tobytes().hex() for pack in packs for i in pack]
        self._log({"step": progress.step, "skipped": {"samples": ids}})
        if progress.skipped_in_a_row < most:
            return
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more in {self.path / METRICS}" if ids[8:] else "")
        what = "loss" if guilty else "gradient"
        self.ranks.fail(
            RunError(
                f"step {progress.step}: the {what} was not finite, {most} steps in a row. Samples of the "
                f"last batch: {shown}. See `dspark inspect {self.reader.place} --sample ID` or lower train.lr"
            )
        )

    def _between_steps(self, *, checkpoint_due: bool) -> None:
        """Log, evaluate and save what is due."""
        train, progress = self.config.train, self.progress
        last = progress.step == progress.total_steps
        if last or progress.step % train.log_every == 0:
            self._log_window()
        better = self._evaluation_due() and self._evaluate()
        patience = train.early_stopping_patience
        if patience and progress.evaluations_without_gain >= patience and not last:
            last = True
            self._log_window()
            figure = "tau" if self.reader.has_last_hidden else "cross entropy"
            self.display.say(f"stopped early: {patience} evaluations without a better held-out {figure}")
        progress.complete = last and (progress.evaluated == progress.step or not self._evaluation_due())
        if train.checkpoint_every and progress.step % train.checkpoint_every == 0:
            checkpoint_due = True
        if last or self.stop_agreed or checkpoint_due or better:
            self._check_draft(last=last)
            self._save()
        if self.stop_agreed and not progress.complete:
            number = self.stop.signal or signal.SIGTERM  # another rank may have received the signal
            kept = f"{self.path} is saved at step {progress.step}, the same command continues"
            self.ranks.fail(StoppedError(number, f"stopped by {number.name}: {kept}"))

    def _check_draft(self, *, last: bool) -> None:
        """End the run if the draft to be saved has no finite figures.

        A skipped step is no harm if an evaluation after it is finite. Where nothing is held out, a few
        training samples show that.
        """
        progress = self.progress
        values = {}
        if progress.measured is not None:
            values["the held-out loss"] = torch.tensor(progress.measured["loss"], device="cpu")
        elif last and progress.complete and progress.skipped_in_a_row:
            setup, parts = self.setup, self.parts
            sound = gives_finite_losses(parts.module, self.reader, setup.samples, self.config, self.ranks)
            loss = 0.0 if sound else math.nan
            values["the loss of most training samples"] = torch.tensor(loss, device="cpu")
        with self.ranks.together():
            check_finite(self.path, progress.step, values)

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.train.eval_every
        due = step == self.progress.total_steps or (every and step and step % every == 0)
        return bool(len(self.setup.held_out) and due)

    def _evaluate(self) -> bool:
        """Measure the draft on the held-out samples. Return whether it is the best so far."""
        progress, ranks = self.progress, self.ranks
        figures = validate(
            self.parts.module,
            self.reader,
            self.setup.held_out,
            self.config,
            ranks,
            interrupted=lambda: ranks.any(self.stop.signal is not None),
        )
        if figures is None:
            self.stop_agreed = True
            return False
        result = {"step": progress.step, **figures}
        progress.evaluated, progress.evaluation = progress.step, result
        cost = {"tokens": progress.tokens, "seconds": progress.seconds}
        self._log({"step": progress.step, **cost, "held_out": result})
        self.display.say(f"step {progress.step}: {headline(result)}, loss {result['loss']:.4f}")
        best = Best.of(result)
        if best.beats(progress.best):
            progress.best = best
            progress.evaluations_without_gain = 0
            return True
        progress.evaluations_without_gain += 1
        return False

    def _log_window(self) -> None:
        """Log the sums since the last line, if a step was taken."""
        progress = self.progress
        if not self.window.empty:
            lr = learning_rate(progress.step - 1, progress.total_steps, self.config.train)
            line = self.window.line(progress.step, progress.epoch, lr)
            self._log(line)
            self.display.figures(line)

    def _log(self, line: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and its figures to the trackers."""
        with self.ranks.together():
            if self.parts.metrics is not None:
                self.parts.metrics.append(line)
                self.trackers.log(self.progress.step, line)

    def _save(self) -> None:
        progress = self.progress
        with self.ranks.together():
            if self.parts.metrics is not None:
                progress.metrics_bytes = self.parts.metrics.sync()
        progress.window = self.window.state()
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.path, self.model, self.parts.optimizers, self._page(), self.ranks, keep=keep)
        self.saved = time.monotonic()

    def _page(self) -> TrainingPage:
        return self.parts.page(self.config, self.reader.manifest.identity)
