"""`dspark sweep`: the grid and its names, then runs, most of them by a stand-in for `dspark train`."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import process
from pipeline.errors import UsageError
from tests.conftest import assert_refused, run_cli, run_ok
from train.experiments import processes, sweep
from train.experiments.grid import parse_settings, plan_grid, run_names, split_values
from train.experiments.processes import last_error, visible_gpus
from train.runs.directory import load_run_config, read_progress

# Nothing is left open that a cache would decide, so that the stand-in need not read one.
CONFIG = """\
[draft]
num_layers = 1
block_size = 3
markov_rank = 8
target_layer_ids = [0, 2, 4]
mask_token_id = 320
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
intermediate_size = 48

[train]
batch_tokens = 256
anchors_per_batch = 64
micro_batches_per_step = 1
max_steps = 4
held_out = 0.2
lr = 3e-3
"""

# What `dspark train` leaves behind, without torch. plan.json beside it says what happens in a run of a name.
STAND_IN = """\
import dataclasses, json, os, signal, sys, time
from pathlib import Path

from pipeline import config
from train.draft.settings import run_config
from train.runs.state import Progress

here, given = Path(__file__).parent, sys.argv[1:]


def options(name):
    return [value for option, value in zip(given, given[1:]) if option == name]


(run,) = map(Path, options("--run"))
(cache,) = map(Path, options("--cache"))
(file,) = options("--config")
wanted = run_config(config.apply_overrides(config.load_toml(file), options("--set")))
plan = json.loads((here / "plan.json").read_text()).get(run.name, "complete")
facts = [run.name, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")]
facts.append(os.getpid() if os.getsid(0) == os.getpid() else "not a session of its own")
with (here / "started").open("a") as lines:
    lines.write(json.dumps(facts) + chr(10))
if plan == "quiet":
    sys.exit(3)
print(f"plan: {plan}", flush=True)


def save(step):
    tau = 1 + wanted.draft.num_layers / 8
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads((cache / "manifest.json").read_text())["identity"]
    (run / "run.json").write_text(json.dumps({"version": {}, "cache": identity}))
    (run / "config.toml").write_text(config.to_toml(wanted))
    names = ("loss", "ce_loss", "l1_loss", "confidence_loss")
    figures = {"step": step, "tau": tau, "accept_by_position": [0.5], **dict.fromkeys(names, 1.0)}
    progress = Progress(total_steps=4, parameters=9, step=step, evaluation=figures, complete=step == 4)
    about = {"config": {}, "cache": identity, "version": {}, "machine": {}}
    (folder / "training.json").write_text(json.dumps({"progress": dataclasses.asdict(progress), **about}))


def meet():
    # Wait for the other one, which comes only if both are at work at once.
    (here / f"met-{run.name}").touch()
    deadline = time.monotonic() + 10
    while len(list(here.glob("met-*"))) < 2:
        if time.monotonic() > deadline:
            sys.exit("error: alone")
        time.sleep(0.01)


def wait():
    # At work until a signal comes; each is noted.
    def stop(number, frame):
        with (here / f"signals-{run.name}").open("a") as lines:
            lines.write(f"{number} ")
        time.sleep(0.2)
        save(2)
        print(f"error: stopped by {number}", file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    (here / f"waiting-{run.name}").touch()
    time.sleep(30)


if plan == "fail":
    print("train:  50%", "train:  75%", sep=chr(13))
    print("error: the data is sour", "bye", sep=chr(10))
    sys.exit(1)
if plan == "half":
    save(2)
    sys.exit(0)
if plan == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if plan == "edit":
    (here / "config.toml").write_text("[draft]")
if plan in ("meet", "wait"):
    globals()[plan]()
save(4)
"""


class Bench:
    """A folder with the stand-in, what it shall do, and a sweep over it."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache, self.runs = folder, cache, folder / "runs"
        (folder / "config.toml").write_text(CONFIG)
        (folder / "stand_in.py").write_text(STAND_IN)
        self.plan()

    def plan(self, **what: str) -> None:
        """What happens in the runs with so many layers, as l1="fail"; all others complete."""
        names = {f"num_layers={key.removeprefix('l')}": value for key, value in what.items()}
        (self.folder / "plan.json").write_text(json.dumps(names))

    def arguments(
        self, *settings: str, device: str = "cpu", configs: tuple[str, ...] = ("config.toml",)
    ) -> list[str | Path]:
        files = [self.folder / name for name in configs]
        arguments = ["sweep", *files, "--cache", self.cache, "--runs", self.runs]
        return [*arguments, "--device", device, *(part for each in settings for part in ("--set", each))]

    def started(self) -> list[list]:
        """Name, GPUs, threads and session of every process since the last time."""
        path = self.folder / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def untimed(output: str) -> list[str]:
    """Its lines, with N for the seconds that a run took."""
    return [re.sub(r", \d+ s$", ", N s", line) for line in output.splitlines()]


@pytest.fixture
def bench(tmp_path: Path, cache_dir: Path, monkeypatch) -> Bench:
    made = Bench(tmp_path, cache_dir)
    real = processes.train_command

    def stand_in(*given) -> list[str]:
        command = real(*given)
        assert command[:4] == [sys.executable, "-P", "-m", "train"]
        return [sys.executable, str(tmp_path / "stand_in.py"), *command[4:]]

    monkeypatch.setattr(processes, "train_command", stand_in)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    return made


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,3", ["1", "2", "3"]),
        (" 1 , 2", ["1", "2"]),
        ("[0,2]", ["[0,2]"]),
        ("[0,2],[0,4]", ["[0,2]", "[0,4]"]),
        ("[[0,1],2],{a=1,b=2}", ["[[0,1],2]", "{a=1,b=2}"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ('\'a,[\',"]\\","', ["'a,['", '"]\\","']),
        ("1,,2,", ["1", "", "2", ""]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["[0,2", "0,2]", "[0]]", "]0[", "'a", 'a,"b', '"\\"', "{a=1"])
def test_what_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not closed"):
        split_values(text)


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ({}, ["run"]),
        ({"draft.num_layers": ["3"]}, ["run"]),
        (
            {"draft.num_layers": ["1", "2"], "train.lr": ["1e-3"], "draft.markov_head": ["rnn", "none"]},
            [
                "num_layers=1,markov_head=rnn",
                "num_layers=1,markov_head=none",
                "num_layers=2,markov_head=rnn",
                "num_layers=2,markov_head=none",
            ],
        ),
        (
            {"a.x": ["1", "2"], "b.x": ["3", "4"], "a.y": ["5"]},
            [f"a.x={a},b.x={b}" for a in "12" for b in "34"],
        ),
        ({"a.x": ["1", "2"], "b.x": ["3"]}, ["x=1", "x=2"]),
        ({"a.ids": ["[0, 2]", "[-1,4]"]}, ["ids=0-2", "ids=-1-4"]),
        ({"a.path": ["'runs/a b'", '"../c"', "5e-4"]}, ["path=runs-a-b", "path=..-c", "path=5e-4"]),
    ],
)
def test_runs_are_named_by_what_varies(grid: dict[str, list[str]], names: list[str]) -> None:
    assert run_names(grid) == names


def test_names_are_unique_and_fit_a_file_system() -> None:
    names = run_names({"a.x": ["[1]", "1", "2"]})
    assert names[2] == "x=2"
    assert names[0] != names[1]
    assert all(name.startswith("x=1~") for name in names[:2])
    assert names[:2] == run_names({"a.x": ["1", "[1]"]})[::-1]  # wherever they stand
    long = run_names({"a.x": ["y" * 300, "y" * 299, "é" * 110]})
    assert len(set(long)) == 3
    assert all(len(f"{name}.log".encode()) < 255 for name in long)


def test_the_grid_of_configs(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[draft]\nnum_layers = 9\n[train]\nlr = 0.5\n")
    settings = ["draft.num_layers=1,2", "loss.decay_gamma=none", "draft.target_layer_ids=[0,2],[0,4]"]
    points = plan_grid([tmp_path / "c.toml"], settings)
    draft = [(p.config.draft.num_layers, p.config.draft.target_layer_ids) for p in points]
    assert draft == [(1, (0, 2)), (1, (0, 4)), (2, (0, 2)), (2, (0, 4))]
    assert {(p.config.loss.decay_gamma, p.config.train.lr) for p in points} == {(None, 0.5)}
    assert points[1].name == "num_layers=1,target_layer_ids=0-4"
    assert points[1].settings == (
        "draft.num_layers=1",
        "loss.decay_gamma=none",
        "draft.target_layer_ids=[0,4]",
    )


@pytest.mark.parametrize(
    ("settings", "code", "parts"),
    [
        (["nonsense"], 2, ["table.key=value", "'nonsense'"]),
        (["=3"], 2, ["table.key=value", "'=3'"]),
        (["draft.num_layers=1,,2"], 2, ["draft.num_layers=1,,2", "an empty one"]),
        (["draft.num_layers="], 2, ["draft.num_layers=", "an empty one"]),
        (["draft.num_layers=1", "draft.num_layers=2"], 2, ["draft.num_layers", "given twice"]),
        (["draft.num_layers=1", " draft.num_layers=2"], 2, ["given twice"]),
        (["draft.num_layers=1,2,1"], 2, ["expected different values, got 1 2 times"]),
        (["train.lr=0.1,0.10"], 2, ["grid points lr=0.1 and lr=0.10 are the same run"]),
        (["draft.target_layer_ids=[0,2"], 2, ["not closed", "'[0,2'"]),
        (["draft.num_layers=1,0"], 2, ["grid point num_layers=0: ", "at least 1, got 0"]),
        (["draft.num_layer=1,2"], 2, ["grid point num_layer=1: ", "did you mean num_layers?"]),
        (
            ["train.lr=1e-3,2e-3", "draft.markov_head=rnn,fancy"],
            2,
            ["grid point lr=1e-3,markov_head=fancy: ", "vanilla, gated, rnn, none"],
        ),
        (["draft.mask_token_id=320,999"], 2, ["grid point mask_token_id=999: ", "325"]),
        (["draft.target_layer_ids=[0,2],[0,3]"], 1, ["grid point target_layer_ids=0-3: ", "asks for 3"]),
    ],
)
def test_a_bad_value_anywhere_is_one_line_before_anything_starts(
    bench: Bench, settings: list[str], code: int, parts: list[str]
) -> None:
    assert_refused(run_cli(*bench.arguments(*settings)), code, *parts)
    assert not bench.runs.exists()
    assert bench.started() == []


def test_what_is_missing_is_one_line(bench: Bench) -> None:
    bench.cache = bench.folder / "no"
    assert_refused(run_cli(*bench.arguments()), 1, "no cache at")
    (bench.folder / "config.toml").unlink()
    assert_refused(run_cli(*bench.arguments()), 2, "no config file at")
    os.mkfifo(bench.folder / "config.toml")
    writer = threading.Thread(target=(bench.folder / "config.toml").write_text, args=[CONFIG])
    writer.start()
    assert_refused(run_cli(*bench.arguments()), 2, "config.toml", "give a plain file")
    writer.join()
    assert not bench.runs.exists()
    assert_refused(run_cli(*bench.arguments(), "--jobs", "0"), 2, "--jobs")
    with pytest.raises(UsageError, match="given twice"):
        parse_settings(["a.b=1", "a.b=1"])


def block_config(bench: Bench, name: str = "flash") -> Path:
    """A config of another kind of draft, with the bench's settings but for those that it lacks."""
    path = bench.folder / f"{name}.toml"
    path.write_text(CONFIG.replace("[draft]", '[draft]\nkind = "dflash"').replace("markov_rank = 8\n", ""))
    return path


def test_several_configs_are_the_first_axis(bench: Bench) -> None:
    block_config(bench)
    configs = ("config.toml", "flash.toml")
    (bench.folder / "plan.json").write_text('{"flash": "edit"}')
    lines = untimed(run_ok(*bench.arguments("train.seed=7", configs=configs)))
    assert [line.split(":")[0] for line in lines[:4:2]] == ["1/2 config", "2/2 flash"]
    assert lines[3] == "2/2 flash: held-out tau 1.125, N s"
    loaded = [load_run_config(bench.runs / name) for name in ("config", "flash")]
    assert [(each.draft.kind, each.train.seed) for each in loaded] == [("dspark", 7), ("dflash", 7)]
    assert [name for name, *_ in bench.started()] == ["config", "flash"]
    (bench.folder / "config.toml").write_text(CONFIG)  # as it was before the run edited it
    run_ok(*bench.arguments("train.seed=7", configs=configs))
    assert bench.started() == []  # complete, both

    run_ok(*bench.arguments("train.lr=0.5,0.25", configs=configs[::-1]))
    names = [f"{name},lr={lr}" for name in ("flash", "config") for lr in ("0.5", "0.25")]
    assert [name for name, *_ in bench.started()] == names
    kinds = [load_run_config(bench.runs / name).draft.kind for name in names]
    assert kinds == ["dflash", "dflash", "dspark", "dspark"]


def test_the_examples_configs_are_of_one_kind_each_and_comparable() -> None:
    """They share what decides the held-out samples and the data order, so that one sweep compares kinds."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("example*.toml"))
    points = plan_grid(files, [])
    kinds = [point.config.draft.kind for point in points]
    assert len(set(kinds)) == len(kinds) >= 2
    trains = [point.config.train for point in points]
    assert len({(each.held_out, each.seed, each.batch_tokens) for each in trains}) == 1


@pytest.mark.parametrize(
    ("configs", "settings", "parts"),
    [
        (("config.toml", "flash.toml"), ["draft.markov_rank=4"], ["grid point flash: ", "markov_rank"]),
        (("config.toml", "flash.toml"), ["draft.markov_rank=4,8"], ["grid point flash,markov_rank=4: "]),
        (("config.toml", "config.toml"), [], ["the same name, config", "config.toml and ", "each once"]),
        (("flash.toml", "other/flash.toml"), [], ["the same name, flash", "different names"]),
        (("config.toml", "twin.toml"), [], ["grid points config and twin are the same run", "the configs"]),
        (("config.toml", "none.toml"), [], ["no config file at", "none.toml"]),
        ((), [], ["CONFIG"]),
    ],
)
def test_configs_that_do_not_go_together_are_one_line(
    bench: Bench, configs: tuple[str, ...], settings: list[str], parts: list[str]
) -> None:
    block_config(bench)
    (bench.folder / "other").mkdir()
    block_config(bench, "other/flash")
    (bench.folder / "twin.toml").write_text(CONFIG)
    assert_refused(run_cli(*bench.arguments(*settings, configs=configs)), 2, *parts)
    assert not bench.runs.exists()


def test_a_failure_stops_no_other_and_the_same_command_tries_again(bench: Bench) -> None:
    bench.plan(l2="fail")
    grid = bench.arguments("draft.num_layers=1,2,3", "train.seed=7")
    result = run_cli(*grid)
    assert_refused(result, 1, "1 of 3 runs failed (num_layers=2)", str(bench.runs), "the same command")
    log = bench.runs / "num_layers=2.log"
    lines = untimed(result.stdout)
    assert lines[:6] == [
        f"1/3 num_layers=1: training, log: {bench.runs / 'num_layers=1.log'}",
        "1/3 num_layers=1: held-out tau 1.125, N s",
        f"2/3 num_layers=2: training, log: {log}",
        f"2/3 num_layers=2: failed: the data is sour; log: {log}",
        f"3/3 num_layers=3: training, log: {bench.runs / 'num_layers=3.log'}",
        "3/3 num_layers=3: held-out tau 1.375, N s",
    ]
    assert [line.split()[:4] for line in lines[7:10]] == [
        ["run", "draft.num_layers", "step", "tau"],
        ["num_layers=1", "1", "4", "1.125"],
        ["num_layers=3", "3", "4", "1.375*"],
    ]
    assert [name for name, *_ in bench.started()] == ["num_layers=1", "num_layers=2", "num_layers=3"]
    assert load_run_config(bench.runs / "num_layers=3").train.seed == 7
    assert "plan: fail" in log.read_text()
    assert "error: the data is sour" in log.read_text()

    bench.plan(l2="quiet")  # the older error is not repeated
    assert f"2/3 num_layers=2: failed: exit code 3; log: {log}" in run_cli(*grid).stdout
    bench.plan(l2="half")  # an exit code of 0 is not enough
    assert "num_layers=2: failed: it ended before its last step" in run_cli(*grid).stdout
    bench.plan()
    bench.started()
    lines = untimed(run_ok(*grid))
    assert lines[:4] == [
        "1/3 num_layers=1: already complete, held-out tau 1.125",
        f"2/3 num_layers=2: training, log: {log}",
        "2/3 num_layers=2: held-out tau 1.250, N s",
        "3/3 num_layers=3: already complete, held-out tau 1.375",
    ]
    assert [name for name, *_ in bench.started()] == ["num_layers=2"]
    assert [plan for plan in ("fail", "half", "complete") if f"plan: {plan}\n" in log.read_text()] == [
        "fail",
        "half",
        "complete",
    ]


def test_a_complete_run_of_something_else_is_left_to_train(bench: Bench) -> None:
    run_ok(*bench.arguments("train.lr=0.5"))
    assert [name for name, *_ in bench.started()] == ["run"]
    assert "already complete" in run_ok(*bench.arguments("train.lr=0.5"))
    assert bench.started() == []
    assert "already complete" not in run_ok(*bench.arguments("train.lr=0.25"))  # another config
    assert [name for name, *_ in bench.started()] == ["run"]
    told = json.loads((bench.runs / "run" / "run.json").read_text())
    told["cache"]["features"]["context_codec"] = "nf4"
    (bench.runs / "run" / "run.json").write_text(json.dumps(told))
    assert "already complete" not in run_ok(*bench.arguments("train.lr=0.25"))  # another cache


def test_what_is_in_the_way_of_one_run_stops_no_other(bench: Bench) -> None:
    bench.runs.mkdir()
    (bench.runs / "num_layers=1.log").mkdir()
    (bench.runs / "num_layers=2").write_text("")
    bench.plan(l2="fail")
    result = run_cli(*bench.arguments("draft.num_layers=1,2,3"))
    assert_refused(result, 1, "2 of 3 runs failed (num_layers=1; num_layers=2)")
    assert "1/3 num_layers=1: failed: " in result.stdout
    assert "3/3 num_layers=3: held-out tau" in result.stdout


def test_a_killed_run_is_said_to_be(bench: Bench) -> None:
    bench.plan(l1="die")
    result = run_cli(*bench.arguments("draft.num_layers=1,2"))
    assert_refused(result, 1, "1 of 2 runs failed (num_layers=1)")
    assert "1/2 num_layers=1: failed: killed by SIGKILL; log: " in result.stdout


def test_the_config_file_may_be_edited_meanwhile(bench: Bench) -> None:
    bench.plan(l1="edit")
    run_ok(*bench.arguments("draft.num_layers=1,2"))
    assert (bench.folder / "config.toml").read_text() == "[draft]"
    assert load_run_config(bench.runs / "num_layers=2").draft.markov_rank == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_the_same_command_continues(
    bench: Bench, number: signal.Signals
) -> None:
    bench.plan(l2="wait", l3="wait")
    grid = [*bench.arguments("draft.num_layers=1,2,3,4"), "--jobs", "2"]

    def send() -> None:
        deadline = time.monotonic() + 10
        while len(list(bench.folder.glob("waiting-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def unhandled(*_) -> None:
        raise AssertionError("the sweep did not expect a signal")

    before = signal.signal(number, unhandled)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        result = run_cli(*grid)
        sender.join()
    finally:
        signal.signal(number, before)
    assert_refused(result, 128 + number, f"stopped by {number.name}", "1 of 4", "the same command continues")
    lines = result.stdout.splitlines()
    assert {"2/4 num_layers=2: stopped", "3/4 num_layers=3: stopped"} <= set(lines)
    assert not any(line.startswith("4/4") for line in lines)
    for layers in (2, 3):
        assert (bench.folder / f"signals-num_layers={layers}").read_text().split() == [str(number.value)]
        assert read_progress(bench.runs / f"num_layers={layers}").step == 2  # it was waited for
    sessions = [session for *_, session in bench.started()]
    assert len(sessions) == 3
    assert not any(process.alive(session) for session in sessions)

    bench.plan()
    lines = run_ok(*grid).splitlines()
    assert "1/4 num_layers=1: already complete, held-out tau 1.125" in lines
    assert sorted(name for name, *_ in bench.started()) == ["num_layers=2", "num_layers=3", "num_layers=4"]


def test_nothing_goes_on_unattended(bench: Bench) -> None:
    """An error of the sweep's own ends the runs at work."""
    bench.plan(l1="wait")

    def full(_line: str) -> None:
        deadline = time.monotonic() + 10
        while not (bench.folder / "waiting-num_layers=1").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        sweep.sweep(
            bench.cache,
            [bench.folder / "config.toml"],
            bench.runs,
            ["draft.num_layers=1,2"],
            device="cpu",
            say=full,
        )
    assert (bench.folder / "signals-num_layers=1").read_text().split() == [str(signal.SIGTERM.value)]
    ((name, *_, session),) = bench.started()
    assert (name, process.alive(session)) == ("num_layers=1", False)


def test_a_run_a_gpu(bench: Bench, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bench.plan(l1="meet", l2="meet")
    lines = run_ok(*bench.arguments("draft.num_layers=1,2,3", device="auto")).splitlines()
    assert lines[0].startswith("1/3 num_layers=1: training on GPU 3, log: ")
    assert lines[1].startswith("2/3 num_layers=2: training on GPU GPU-ab, log: ")
    started = bench.started()
    gpus = {name: gpu for name, gpu, *_ in started}
    assert gpus.pop("num_layers=3") in ("3", "GPU-ab")
    assert gpus == {"num_layers=1": "3", "num_layers=2": "GPU-ab"}
    cores = len(os.sched_getaffinity(0))
    assert {threads for _, _, threads, _ in started} == {str(max(1, cores // 2))}

    bench.plan()
    run_ok(*bench.arguments("train.seed=1,2"), "--jobs", "1")  # the CPU is asked for: the list stays as it is
    assert {(gpu, threads) for _, gpu, threads, _ in bench.started()} == {("3,GPU-ab", None)}


@pytest.mark.parametrize(
    ("listed", "gpus"),
    [
        ("0", ["0"]),
        ("2, 0", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
        ("GPU-a,MIG-b", ["GPU-a", "MIG-b"]),
    ],
)
def test_gpus_that_the_environment_lists(monkeypatch, listed: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == gpus


def test_gpus_that_torch_counts(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]


def test_the_last_error_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"error: of yesterday\n")
    start = log.stat().st_size
    assert last_error(log, start) == ""
    log.write_bytes(b"error: of yesterday\nwarming up\rstep 1\rstep 2")
    assert last_error(log, start) == "step 2"
    log.write_bytes(b"error: of yesterday\nstep 1\rerror: first\nerror: caf\xe9\n\nbar\r  \n")
    assert last_error(log, start) == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "settings", "implied"),
    [
        ("", ["draft.markov_head=vanilla,none"], True),
        ("", ["draft.markov_head='none',rnn"], True),
        ("", ["draft.markov_head=none,rnn", "draft.confidence_with_markov=false"], False),
        ("[draft]\nconfidence_with_markov = false", ["draft.markov_head=none,rnn"], False),
        ("[draft]\nconfidence_head = false", ["draft.markov_head=none,rnn"], False),
    ],
)
def test_a_point_without_a_markov_head_needs_no_second_setting(tmp_path, text, settings, implied) -> None:
    """The confidence head can't see what is not there; what the user has set stays."""
    (tmp_path / "c.toml").write_text(text)
    for point in plan_grid([tmp_path / "c.toml"], settings):
        none = point.config.draft.markov_head == "none"
        own = "draft.confidence_with_markov=false" in point.settings[len(settings) :]
        assert own == (none and implied), point
        if implied:
            assert point.config.draft.confidence_with_markov == (not none)
        assert "confidence" not in point.name


def test_a_users_own_contradiction_stays_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[draft]\nconfidence_with_markov = true")
    with pytest.raises(UsageError, match=r"grid point markov_head=none.*confidence_with_markov"):
        plan_grid([tmp_path / "c.toml"], ["draft.markov_head=vanilla,none"])


def test_a_longer_run_is_not_complete(tmp_path: Path, cache_dir: Path) -> None:
    from pipeline.cache import CacheReader
    from tests.train.runs import train_arguments

    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=2))
    config, identity = load_run_config(run), CacheReader(cache_dir).manifest.identity
    for change, complete in (
        ({}, True),
        ({"log_every": 1}, True),
        ({"max_steps": 3}, False),
        ({"lr": 1.0}, False),
    ):
        wanted = replace(config, train=replace(config.train, **change))
        assert sweep.is_complete(run, wanted, identity) == complete, change


def test_two_drafts_are_trained(tmp_path: Path, cache_dir: Path) -> None:
    """The whole of it with the real command, in processes of their own."""
    open_ones = ("target_layer_ids", "mask_token_id", "num_", "head_dim", "intermediate_size")
    text = "".join(line for line in CONFIG.splitlines(keepends=True) if not line.startswith(open_ones))
    (tmp_path / "c.toml").write_text(text)
    grid = [
        "sweep",
        tmp_path / "c.toml",
        "--cache",
        cache_dir,
        "--runs",
        tmp_path / "runs",
        "--device",
        "cpu",
    ]
    grid += ["--set", "train.precision=fp32"]
    grid += ["--set", "draft.num_layers=1", "--set", "draft.markov_head=vanilla,rnn"]
    run_ok(*grid)
    rows = json.loads(run_ok("compare", tmp_path / "runs", "--format", "json"))
    assert [row["run"] for row in rows] == ["markov_head=rnn", "markov_head=vanilla"]
    assert [row["draft.markov_head"] for row in rows] == ["rnn", "vanilla"]
    assert all(row["step"] == 4 and row["complete"] and row["tau"] > 1 for row in rows)
    assert rows[0]["parameters"] > rows[1]["parameters"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lines = run_ok(*grid).splitlines()  # at once, though cache and config leave things open
    assert [line.split(", ")[0] for line in lines[:2]] == [
        "1/2 markov_head=vanilla: already complete",
        "2/2 markov_head=rnn: already complete",
    ]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
