"""The training loop: cache in, draft out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from pipeline import config as configuration
from pipeline.device import reuse_freed_memory
from pipeline.errors import RunError, StoppedError
from pipeline.signals import StopRequest, stop_on_signals
from train.config import RunConfig
from train.data.loader import loaded
from train.data.sampling import Step, count_steps, steps_from
from train.draft.dspark.flops import peak_flops, training_flops
from train.eval.validate import validate
from train.losses.slots import LossSums
from train.runs.checkpoint import CHECKPOINTS, load_states, load_weights, newest, save_checkpoint
from train.runs.directory import TRACE, MetricsFile, begin, check_run, flat_settings, locked
from train.runs.provenance import code_version, machine_facts
from train.runs.state import Best, Progress, damaged, read_training
from train.runtime.console import Display
from train.runtime.distributed import Ranks, SpreadModule, open_ranks
from train.runtime.precision import autocast, resolve_precision
from train.runtime.profiler import check_profile, step_profiler
from train.runtime.trackers import Trackers
from train.trainer.metrics import Window
from train.trainer.optimizer import build_optimizers, learning_rate, normalise_gradients, set_learning_rate
from train.trainer.setup import Setup, build_draft, initialise, prepare, set_up, trainer_module


def train(
    cache: Path,
    config: RunConfig,
    run: Path,
    *,
    device: str = "auto",
    fresh: bool = False,
    profile_steps: int = 0,
) -> dict[str, Any] | None:
    """Train a draft from a cache, or go on where a run in that directory stopped; the target is never loaded.

    Under torchrun all its processes call this and share each step. Writes to `run`: `config.toml`,
    `run.json`, `metrics.jsonl` (a JSON object a logged step), `checkpoints/step-N`, `latest` and `best`.

    Args:
        fresh: clear a run that is there.
        profile_steps: write a Chrome trace of so many steps, the first few left out, to `trace.json`.

    Returns:
        The held-out evaluation of the last step, if anything was held out.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    with open_ranks(device) as ranks, stop_on_signals() as stop, ExitStack() as held:
        if ranks.device.type == "cpu":
            reuse_freed_memory()
        # A job that torchrun starts again goes on with what it did itself.
        fresh = fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        with ranks.together():
            begins = fresh or not any(run.glob(f"{CHECKPOINTS}/*step-*"))
            setup = set_up(cache, config, ranks.device, ranks.world, begins=begins)
            identity = setup.reader.manifest.identity
            check_run(run, setup.config, identity, fresh=fresh)
            if profile_steps:
                _check_profile(profile_steps, setup, None if fresh else newest(run))
        if ranks.leads:
            click.echo(configuration.to_toml(setup.config))
        with ranks.together():
            if ranks.leads:
                held.enter_context(locked(run))
                check_run(run, setup.config, identity, fresh=fresh)  # now that nobody else changes it
                begin(run, setup.config, identity, fresh=fresh)
        with ranks.together():
            folder = newest(run)
            progress, page = read_training(folder) if folder else (None, {})
        same = {"config": setup.config, "cache": identity, "newest checkpoint": folder and folder.name}
        ranks.agree(same)
        if progress is not None and progress.complete:
            if ranks.leads:
                click.echo(f"run {run}: complete, nothing is left to train")
        else:
            training = Training(ranks, setup, run, folder, progress, page, stop)
            progress = training.run(profile_steps)
        return progress.evaluation


def _check_profile(steps: int, setup: Setup, folder: Path | None) -> None:
    """A run has enough steps left to trace, or none at all because it is complete."""
    if folder is None:
        check_profile(steps, count_steps(setup.reader.lengths[setup.samples], setup.config.train))
        return
    progress, _ = read_training(folder)
    if not progress.complete:
        check_profile(steps, progress.total_steps - progress.step)


class Training:
    """A run at work.

    Args:
        ranks: who trains.
        setup: what.
        run: its directory.
        folder: the checkpoint to go on from, if any.
        progress: that checkpoint's.
        page: all of its `training.json`.
        stop: set by a signal that asks to stop.
    """

    def __init__(
        self,
        ranks: Ranks,
        setup: Setup,
        run: Path,
        folder: Path | None,
        progress: Progress | None,
        page: dict[str, Any],
        stop: StopRequest,
    ):
        self.ranks, self.setup, self.path, self.stop = ranks, setup, run, stop
        self.last_page = page
        self.reader, self.config = setup.reader, setup.config
        train, device = self.config.train, ranks.device
        self.precision = resolve_precision(device, train.precision)
        with ranks.together():
            self.model = build_draft(setup, fresh=folder is None)
            if folder is not None:
                load_weights(self.model, folder)
            self.model.to(device)
            if folder is None and ranks.leads:
                initialise(self.model, setup)
        if progress is None:
            total = count_steps(self.reader.lengths[setup.samples], train)
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            progress = Progress(total_steps=total, parameters=trained)
        self.progress = progress
        self.module = trainer_module(self.model, self.config)
        sharded = ranks.world > 1 and train.parallelism == "fsdp"
        prepare(self.module, self.config, device, by_layer=sharded)
        self.spread = SpreadModule(
            self.module, ranks, list(self.model.layers), train.parallelism, self.precision
        )
        self.optimizers = build_optimizers(self.model, train)
        peak = peak_flops(device, self.precision, train.tf32)
        self.window = Window(self.config.loss, device, None if peak is None else peak * ranks.world)
        if folder is not None:
            with ranks.together():
                load_states(folder, self.model, self.optimizers, progress, ranks)
                if progress.window is not None:
                    self._load_window(folder, progress.window)
        with ranks.together():
            self.metrics = MetricsFile(run, progress.metrics_bytes) if ranks.leads else None
        self.machine = machine_facts(ranks, self.precision, self.model.attention)
        self.display = Display(ranks, progress.total_steps, progress.step)
        self.saved = time.monotonic()
        self.version = code_version()
        self.stop_agreed = False  # what all ranks know of signals
        self.denominator = torch.ones((), device=device)

    def run(self, profile_steps: int = 0) -> Progress:
        """Train to the end, or to a signal.

        Raises:
            StoppedError: a signal came; everything up to here is saved.
            RunError: too many steps in a row were not finite.
        """
        train, progress = self.config.train, self.progress
        left = progress.total_steps - progress.step
        profiler = step_profiler(profile_steps if self.ranks.leads else 0, left, self.path / TRACE)
        self.display.say(", ".join(f"{name} {value}" for name, value in self.machine.items()))
        if progress.step:
            self.display.say(f"continuing from step {progress.step} of {progress.total_steps}")
            last, now = ({**page["machine"], **page["version"]} for page in (self.last_page, self._about()))
            changed = [f"{k}: {last[k]}, now {v}" for k, v in now.items() if last.get(k, v) != v]
            if changed:
                self.display.say(f"not as it was saved ({'; '.join(changed)}): sums may round otherwise")
        steps = steps_from(
            self.reader.lengths[self.setup.samples],
            self.setup.samples,
            train,
            progress.epoch,
            progress.steps_of_epoch,
            self.ranks.rank,
            self.ranks.world,
        )
        steps, ahead = itertools.tee(itertools.islice(steps, left))
        self.batches = loaded(
            self.reader,
            (pack for step in ahead for pack in step.packs),
            tuple(self.model.config.target_layer_ids),
            train.batch_tokens,
            self.ranks.device,
            partial(training_flops, self.model.config),
        )
        with self.ranks.together():
            names = train.report_to if self.ranks.leads else ()
            settings = flat_settings(self.config)
            self.trackers = Trackers(names, run=self.path, config=settings, step=progress.step)
        with self.trackers, closing(self.display):
            if self._evaluation_due() and progress.evaluated < progress.step:  # it was interrupted
                self._between_steps(checkpoint_due=False)
            for step in steps:
                if progress.complete:
                    break
                due = self._step(step)
                profiler.step()
                self._between_steps(checkpoint_due=due)
        return progress

    def _step(self, step: Step) -> bool:
        """Take an optimiser step. Returns whether it is time for a checkpoint."""
        started, waited = time.perf_counter(), 0.0
        train, progress, ranks = self.config.train, self.progress, self.ranks
        lr = learning_rate(progress.step, progress.total_steps, train)
        set_learning_rate(self.optimizers, lr)
        sums: LossSums | None = None
        losses: list[Tensor] = []
        tokens, flops = 0, 0.0
        for number in range(1, len(step.packs) + 1):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            with self.spread.micro_batch(last=number == len(step.packs)):
                with autocast(ranks.device, self.precision):
                    metrics = self.spread(**batch.tensors(), denominator=self.denominator)
                metrics.loss.backward()
            part = metrics.sums.detach()
            sums = part if sums is None else sums + part
            losses.append(metrics.loss.detach())
            tokens, flops = tokens + batch.num_tokens, flops + batch.flops
        due = ranks.leads and 0 < train.checkpoint_minutes * 60 <= time.monotonic() - self.saved
        flags = (due, self.stop.signal is not None)
        numbers = torch.tensor([tokens, flops, waited, *flags], dtype=torch.float64)
        *sums, numbers = ranks.total([*sums, numbers])
        sums = LossSums(*sums)
        norm = normalise_gradients(self.model, sums.weight / ranks.world, train.max_grad_norm)
        finite = torch.isfinite(norm + sums.ce + sums.l1 + sums.confidence).item()
        if finite:
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.epoch, progress.steps_of_epoch = step.epoch, step.number + 1
        if finite:
            self.window.add(sums, norm)
            progress.skipped_in_a_row = 0
        else:
            self._skip(step, losses)
        tokens, flops, waited, due, signalled = numbers.tolist()
        self.stop_agreed = signalled > 0
        seconds = time.perf_counter() - started
        progress.tokens += int(tokens)
        progress.seconds += seconds
        self.window.count(tokens=tokens, flops=flops, seconds=seconds, waited=waited / ranks.world)
        self.display.stepped()
        return bool(due)

    def _skip(self, step: Step, losses: list[Tensor]) -> None:
        """Count a step whose loss or gradient is not finite, and end the run after too many."""
        progress, most = self.progress, self.config.train.max_skipped_steps
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        self.window.count(skipped=1)
        packs = [numbers for numbers, _ in step.packs]
        guilty = [pack for pack, loss in zip(packs, losses, strict=True) if not torch.isfinite(loss)]
        all_ranks = self.ranks.gather((guilty, packs))
        guilty = [pack for found, _ in all_ranks for pack in found]
        packs = guilty or [pack for _, found in all_ranks for pack in found]
        ids = [self.reader.sample_ids[i].tobytes().hex() for pack in packs for i in pack]
        self._log({"step": progress.step, "skipped": {"samples": ids}})
        if progress.skipped_in_a_row < most:
            return
        shown = ", ".join(ids[:8]) + (
            f" and {len(ids) - 8} more in {self.path}/metrics.jsonl" if ids[8:] else ""
        )
        what = "loss" if guilty else "gradient"
        self.ranks.fail(
            RunError(
                f"step {progress.step}: the {what} was not finite, {most} steps in a row. Samples of the "
                f"last batch: {shown}. See `dspark inspect {self.reader.path} --sample ID`, or lower train.lr"
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
            self.display.say(f"stopped early: {patience} evaluations without a better held-out tau")
        progress.complete = last and (progress.evaluated == progress.step or not self._evaluation_due())
        if train.checkpoint_every and progress.step % train.checkpoint_every == 0:
            checkpoint_due = True
        if last or self.stop_agreed or checkpoint_due or better:
            self._save()
        if self.stop_agreed and not progress.complete:
            number = self.stop.signal or signal.SIGTERM  # it may have come to another rank
            kept = f"{self.path} is saved at step {progress.step}, the same command continues"
            self.ranks.fail(StoppedError(number, f"stopped by {number.name}: {kept}"))

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.train.eval_every
        due = step == self.progress.total_steps or (every and step and step % every == 0)
        return bool(len(self.setup.held_out) and due)

    def _evaluate(self) -> bool:
        """Measure the draft on the held-out samples. Returns whether it is the best so far."""
        progress, ranks = self.progress, self.ranks
        figures = validate(
            self.module,
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
        self._log({"step": progress.step, "held_out": result})
        self.display.say(f"step {progress.step}: held-out tau {result['tau']:.3f}, loss {result['loss']:.4f}")
        if math.isfinite(result["tau"]) and (progress.best is None or result["tau"] > progress.best.tau):
            progress.best = Best(progress.step, result["tau"])
            progress.evaluations_without_gain = 0
            return True
        progress.evaluations_without_gain += 1
        return False

    def _load_window(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            self.window.load(state)
        except (ValueError, TypeError, KeyError) as error:
            raise damaged(folder, error) from None

    def _log_window(self) -> None:
        """Log what was added up since the last line, if a step was taken."""
        progress = self.progress
        if not self.window.empty:
            lr = learning_rate(progress.step - 1, progress.total_steps, self.config.train)
            line = self.window.line(progress.step, progress.epoch, lr)
            self._log(line)
            self.display.figures(line)

    def _log(self, line: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl, and its figures to whatever else the run reports to."""
        with self.ranks.together():
            if self.metrics is not None:
                self.metrics.append(line)
                self.trackers.log(self.progress.step, line)

    def _save(self) -> None:
        progress = self.progress
        with self.ranks.together():
            if self.metrics is not None:
                progress.metrics_bytes = self.metrics.sync()
        progress.window = self.window.state()
        keep = self.config.train.keep_checkpoints
        save_checkpoint(
            self.path, self.model, self.optimizers, progress, self.ranks, self._about(), keep=keep
        )
        self.saved = time.monotonic()

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says beside the progress."""
        return {
            "config": dataclasses.asdict(self.config),
            "cache": dataclasses.asdict(self.reader.manifest.identity),
            "version": self.version,
            "machine": self.machine,
        }
