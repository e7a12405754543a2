"""Several processes train one draft: the same run as one alone, whatever happens to one of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.cache import CacheReader
from pipeline.process import WorkerPlace
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.train.runs import figures_of, progress_of, train_arguments, weights_of
from train.data.packing import epoch_packs
from train.data.split import split
from train.eval.validate import validate
from train.runs.directory import load_run_config
from train.runs.open import open_draft
from train.runtime.distributed import Ranks, SpreadModule
from train.trainer import parts

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
# Seven micro-batches a step, which neither two nor three ranks can share evenly.
SHARED = {
    "draft__num_layers": 2,
    "train__micro_batches_per_step": 7,
    "train__max_steps": 6,
    "train__log_every": 2,
    "train__eval_every": 3,
    "train__checkpoint_every": 2,
    "train__keep_checkpoints": 100,
    "train__weight_decay": 0.1,
}


def assert_near(run: Path, wanted: Path, tolerance: float = 5e-5) -> None:
    """The same run within what fp32 sums in another order differ by."""
    weights = weights_of(run)
    for name, weight in weights_of(wanted).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=tolerance, msg=f"{name} differs")
    ours, theirs = figures_of(run), figures_of(wanted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert _flat(a) == pytest.approx(_flat(b), rel=2e-4)


def _flat(line: dict) -> dict[str, float]:
    numbers = line.get("held_out", line)
    positions = numbers.get("accept_by_position", [])
    return {k: v for k, v in numbers.items() if k != "accept_by_position"} | dict(enumerate(positions))


@pytest.fixture(scope="module", params=["vanilla", "rnn"])
def alone(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, request) -> Path:
    run = tmp_path_factory.mktemp("runs") / request.param
    run_ok(*train_arguments(cache_dir, run, **SHARED, draft__markov_head=request.param))
    return run


def together(folder: Path, count: int, cache: Path, run: Path, **settings) -> None:
    for process in start_ranks(folder, count, *train_arguments(cache, run, **settings)):
        assert process.wait() == 0, process.err


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_do_what_one_does(
    tmp_path: Path, cache_dir: Path, alone: Path, count: int, parallelism: str
) -> None:
    run = tmp_path / "run"
    settings = {"draft__markov_head": alone.name, "train__parallelism": parallelism}
    ranks = start_ranks(tmp_path / "out", count, *train_arguments(cache_dir, run, **SHARED, **settings))
    for process in ranks:
        assert process.wait() == 0, process.err
    assert_near(run, alone)
    assert progress_of(run)["tokens"] == progress_of(alone)["tokens"]
    assert progress_of(run)["parameters"] == progress_of(alone)["parameters"]
    # The first one speaks, and says what all of them measured.
    assert f"held-out tau {progress_of(alone)['evaluation']['tau']:.3f}" in ranks[0].out
    assert "[draft]" in ranks[0].out
    for process in ranks[1:]:
        assert process.out == ""
        assert "step" not in process.err


@pytest.mark.parametrize(
    ("parallelism", "ranks", "optimizer"), [("ddp", 1, "adamw"), ("fsdp", 3, "adamw"), ("fsdp", 3, "muon")]
)
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_three(
    tmp_path: Path, cache_dir: Path, parallelism: str, ranks: int, optimizer: str
) -> None:
    settings = {**SHARED, "train__parallelism": parallelism, "train__optimizer": optimizer}
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ok(*train_arguments(cache_dir, whole, **settings))
    together(tmp_path / "first", 2, cache_dir, run, **settings)
    for step in (4, 6):  # as if it had been killed after the checkpoint at 2
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    together(tmp_path / "second", ranks, cache_dir, run, **settings)
    assert "continuing from step" in (tmp_path / "second" / "0" / "err").read_text()
    assert_near(run, whole, 5e-5 if optimizer == "adamw" else 5e-3)  # Muon computes in bf16


def test_asked_to_stop_all_save_and_end(tmp_path: Path, cache_dir: Path) -> None:
    """The signal reaches one of them only."""
    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, **{**SHARED, "train__max_steps": 10_000})
    ranks = start_ranks(tmp_path / "out", 2, *arguments)
    assert ranks[1].wait_until(lambda: (run / "latest").exists())
    ranks[1].send(signal.SIGTERM)
    assert [process.wait() for process in ranks] == [143, 143]
    (line,) = ranks[0].errors
    assert f"stopped by SIGTERM: {run} is saved at step {progress_of(run)['step']}" in line
    assert ranks[1].errors == []


def test_one_mistake_is_one_line(tmp_path: Path, cache_dir: Path) -> None:
    settings = {"draft__target_layer_ids": "[0,3]"}
    ranks = start_ranks(
        tmp_path / "out", 2, *train_arguments(cache_dir, tmp_path / "r", **SHARED, **settings)
    )
    assert [process.wait() for process in ranks] == [1, 1]
    assert len(ranks[0].errors) == 1
    assert "asks for 3" in ranks[0].errors[0]
    assert ranks[1].errors == []
    idle = train_arguments(cache_dir, tmp_path / "r", **{**SHARED, "train__micro_batches_per_step": 1})
    ranks = start_ranks(tmp_path / "out", 2, *idle)
    assert [process.wait() for process in ranks] == [2, 2]
    assert "micro_batches_per_step = 1" in ranks[0].errors[0]
    assert not (tmp_path / "r").exists()


def test_what_one_rank_cannot_do_ends_all_with_its_message(tmp_path: Path, cache_dir: Path) -> None:
    """A machine that lacks the cache, say."""
    (tmp_path / "cache0").symlink_to(cache_dir)
    arguments = train_arguments(tmp_path / "cache{rank}", tmp_path / "run", **SHARED)
    ranks = start_ranks(tmp_path / "out", 2, *arguments)
    assert [process.wait() for process in ranks] == [1, 1]
    assert ranks[0].errors[0].startswith("error: rank 1: no cache at ")
    assert "/cache1: expected" in ranks[0].errors[0]
    assert ranks[1].errors == []
    assert not (tmp_path / "run").exists()


@contextmanager
def under_torchrun(command: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command as two processes of the real torchrun."""
    words = ["--run-dir" if argument == "--run" else str(argument) for argument in arguments]
    launcher = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", "-m", command, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until there is something in a file, or a folder."""
    deadline = time.monotonic() + 100
    while not (path.is_dir() or (path.exists() and path.stat().st_size)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_dies_ends_the_job(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    """Under the real torchrun: an error within a minute, the run as good as its last checkpoint."""
    run = tmp_path / "run"
    settings = {**SHARED, "train__max_steps": 100_000, "train__keep_checkpoints": 2}
    with under_torchrun(*train_arguments(cache_dir, run, **settings)) as launcher:
        wait_for(run / "latest", launcher)
        os.kill(_child_of(launcher.pid, RANK="1"), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) <= 1
    if said:  # unless torchrun was quicker
        assert "rank 0 lost the other ranks" in said[0]
    # And the same command continues it: one process here, stopped at once.
    real = parts.machine_facts

    def stopped(*given):
        signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(parts, "machine_facts", stopped)
    step = progress_of(run)["step"]
    again = run_cli(*train_arguments(cache_dir, run, **settings))
    assert_refused(again, 143, f"saved at step {step + 1}")
    assert f"continuing from step {step} of 100000" in again.stderr


def test_every_process_and_torchrun_asked_to_stop(tmp_path: Path, cache_dir: Path) -> None:
    """As a scheduler does it: each worker then has the signal twice, the second one from torchrun."""
    run = tmp_path / "run"
    settings = {**SHARED, "train__max_steps": 100_000, "train__checkpoint_every": 0, "train__eval_every": 0}
    # Steps that take longer than torchrun's passing on.
    settings |= {"train__micro_batches_per_step": 30, "train__log_every": 1}
    with under_torchrun(*train_arguments(cache_dir, run, **settings)) as launcher:
        wait_for(run / "metrics.jsonl", launcher)
        for process in (*(_child_of(launcher.pid, RANK=str(rank)) for rank in (0, 1)), launcher.pid):
            os.kill(process, signal.SIGTERM)
        _, errors = launcher.communicate(timeout=60)
    assert f"stopped by SIGTERM: {run} is saved at step {progress_of(run)['step']}" in errors


def _child_of(parent: int, **variables: str) -> int:
    for path in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        found = Path(f"/proc/{path}/environ").read_text().split("\0")
        if all(f"{name}={value}" in found for name, value in variables.items()):
            return int(path)
    raise AssertionError("no such child")


def test_an_evaluation_is_shared(cache_dir: Path, alone: Path) -> None:
    """Each of five ranks measures its part, more than there are packs; together they are one's figures."""
    config, reader = load_run_config(alone), CacheReader(cache_dir)
    draft, (_, samples) = open_draft(alone), split(reader, config.train.held_out)
    module = draft.kind.on(draft.model(reader), config, torch.device("cpu"))

    class Pretended(Ranks):
        """One of five; sums are noted, not exchanged."""

        def total(self, tensors):
            noted.append([tensor.clone() for tensor in tensors])
            return list(tensors)

    noted: list[list[torch.Tensor]] = []
    wanted = validate(module, reader, samples, config, Pretended(WorkerPlace(), torch.device("cpu")))
    for rank in range(5):
        validate(module, reader, samples, config, Pretended(WorkerPlace(rank, 5), torch.device("cpu")))
    whole, *parts = noted
    for of_one, *of_each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(of_each), of_one, rtol=1e-5, atol=1e-5)
    assert wanted["blocks"] == int(whole[-1])


def test_the_step_and_the_tokens_are_of_all_ranks(cache_dir: Path, alone: Path) -> None:
    """What the other tests compare with is itself right: every micro-batch's tokens, of every step."""
    reader = CacheReader(cache_dir)
    samples, _ = split(reader, 0.2)
    packs = epoch_packs(reader.lengths[samples], 256, 0, 0)
    begun = [pack for epoch in range(9) for pack in epoch_packs(reader.lengths[samples], 256, 0, epoch)]
    assert len(packs) % 7  # so that an epoch's last step has fewer
    steps, size = [], len(packs)
    while begun:
        epoch, begun = begun[:size], begun[size:]
        steps += [epoch[i : i + 7] for i in range(0, len(epoch), 7)]
    tokens = sum(int(reader.lengths[samples][pack].sum()) for step in steps[:6] for pack in step)
    assert progress_of(alone)["tokens"] == tokens


def test_gradients_are_exchanged_once_a_step(tmp_path: Path) -> None:
    """However many micro-batches a step has."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        ranks = Ranks(WorkerPlace(0, 2), torch.device("cpu"))  # of which the other one never comes
        model = torch.nn.Linear(3, 2)
        spread = SpreadModule(model, ranks, [], "ddp", "fp32")
        exchanged: list[Tensor] = []

        def note(_state, bucket):
            exchanged.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        spread._module.register_comm_hook(None, note)
        for number in range(1, 5):
            with spread.micro_batch(last=number == 4):
                spread(torch.full((1, 3), float(number))).sum().backward()
            assert len(exchanged) == (number == 4)
        assert exchanged[0].tolist()[-6:] == [10.0] * 6 or exchanged[0].tolist()[:6] == [10.0] * 6
    finally:
        dist.destroy_process_group()


def test_ranks_go_on_from_one_checkpoint(tmp_path: Path, cache_dir: Path) -> None:
    """Machines that share no file system can begin a run and can't continue it."""
    settings = {**SHARED, "train__eval_every": 0}
    arguments = train_arguments(cache_dir, tmp_path / "run{rank}", **settings)
    together_arguments = [str(argument) for argument in arguments]
    for process in start_ranks(tmp_path / "first", 2, *together_arguments):
        assert process.wait() == 0, process.err
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(tmp_path / "run0" / "checkpoints" / name)
    ranks = start_ranks(tmp_path / "second", 2, *together_arguments)
    assert [process.wait() for process in ranks] == [1, 1]
    assert "the ranks disagree on newest checkpoint (step-000002, none)" in ranks[0].errors[0]
    assert ranks[1].errors == []


def test_ranks_without_torchrun_are_one_line(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    result = run_cli(*train_arguments(cache_dir, tmp_path / "r", **SHARED))
    assert_refused(result, 1, "rank 0 of 2 can't join the others", "torchrun")
