"""`dspark tune`, with runs by a stand-in for `dspark train` in this process, and a clock of its own."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy
import torch

from pipeline.errors import DSparkError, UsageError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.test_sweep import CONFIG
from tests.train.tunes import save, step_of, tau_of, wanted
from train.draft import TABLES
from train.draft.settings import run_config
from train.experiments.grid import Point
from train.experiments.processes import Child
from train.experiments.tune import budget, run, search
from train.experiments.tune.budget import Clock, parse_budget
from train.experiments.tune.search import ladder
from train.experiments.tune.space import default_space, parse_search, trial_config
from train.experiments.tune.study import Study
from train.runs.changes import flat_settings
from train.runs.directory import locked
from train.trainer.setup import count_run_steps, set_up

LR = "train.lr=1e-4..1e-1"
START = 3.0  # seconds that every run takes besides a second per step


class Ended(Child):
    """A run of the stand-in."""

    seconds = 0.0


class World:
    """The processes of a tune as `Processes` has them, without any, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started: list[tuple[str, int]] = []
        """Name of each run and the step that it began at."""
        self.fails: Callable[[Point], str | None] = lambda _point: None
        self.late: dict[str, float] = {}
        """Seconds that the next run of a name takes besides."""
        self.most_at_once = 0

    def sleep(self, _seconds: float) -> None:
        self.now += 1.0

    def processes(self, *, cache: Path, runs: Path, jobs: int, **_: object) -> Fake:
        return Fake(self, cache, runs, jobs)


class Fake:
    """Stands in for `Processes`."""

    def __init__(self, world: World, cache: Path, runs: Path, jobs: int):
        self.world, self.cache, self.runs, self.jobs = world, cache, runs, jobs
        self.at_work: list[Child] = []

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.at_work = []

    def start(self, point: Point, label: str) -> Child:
        folder, world = self.runs / point.name, self.world
        begun = step_of(folder)
        world.started.append((point.name, begun))
        child = Ended(point, label, "", 0, folder, folder, 0, SimpleNamespace(returncode=None), world.now)
        child.config = wanted(point.file, point.settings)
        folder.mkdir(exist_ok=True)
        child.due = world.now + START + child.config.train.max_steps - begun + world.late.pop(point.name, 0)
        child.problem = lambda: world.fails(point)
        self.at_work.append(child)
        world.most_at_once = max(world.most_at_once, len(self.at_work))
        return child

    def _finish(self, child: Child, step: int, code: int) -> None:
        save(child.run, child.config, self.cache, step)
        child.seconds, child.process.returncode = self.world.now - child.started, code

    def ended(self) -> list[Child]:
        for child in self.at_work:
            if child.process.returncode is None and child.due <= self.world.now:
                self._finish(child, child.config.train.max_steps, 0)
        ended = [child for child in self.at_work if child.process.returncode is not None]
        self.at_work = [child for child in self.at_work if child not in ended]
        return ended

    def pass_on(self, number: int) -> None:
        for child in self.at_work:
            if not child.signalled:
                child.signalled = True
                child.problem = lambda: "it was stopped"
                left = max(0, int(child.due - self.world.now))
                self._finish(child, max(0, child.config.train.max_steps - left), 128 + number)


@pytest.fixture(autouse=True)
def no_waits_for_the_disk():
    """SQLite need not survive a power cut here."""

    def hurry(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", hurry)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", hurry)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(run, "Processes", made.processes)
    monkeypatch.setattr(run, "Clock", partial(Clock, now=lambda: made.now))
    monkeypatch.setattr(search.time, "sleep", made.sleep)
    monkeypatch.setattr(budget, "NOTE_SECONDS", 100.0)  # an hour passes in a moment
    return made


class Bench:
    """A base config of 540 steps, a folder and a cache."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache, self.runs = folder, cache, folder / "runs"
        self.config = folder / "base.toml"
        self.config.write_text(CONFIG.replace("max_steps = 4", "max_steps = 540"))

    def arguments(self, *more: str, budget: str = "1h", search: tuple[str, ...] = (LR,)) -> list[str | Path]:
        where = ["tune", "--cache", self.cache, "--config", self.config, "--runs", self.runs]
        given = [part for each in search for part in ("--search", each)]
        return [*where, "--device", "cpu", "--budget", budget, *given, *more]

    def found(self) -> dict:
        return json.loads((self.runs / "tune.json").read_text())


@pytest.fixture
def bench(tmp_path: Path, cache_dir: Path) -> Bench:
    return Bench(tmp_path, cache_dir)


def test_the_best_settings_are_found_and_written(bench: Bench, world: World) -> None:
    out = run_ok(*bench.arguments("--set", "train.weight_decay=0.25", "--trials", "10", budget="2h"))
    assert world.now <= 120 * 60
    found = bench.found()
    assert found["rungs"] == [20, 60, 180, 540]
    trials = {trial["trial"]: trial for trial in found["trials"]}
    assert trials[0]["settings"] == []
    assert [r["steps"] for r in trials[0]["runs"]] == found["rungs"]
    best = trials[found["best"]["trial"]]
    assert best["state"] == "complete"
    assert found["best"]["trial"] != 0  # the base config's rate is not the best one
    # the figures are those of the runs, and none of the other trials that climbed as high is better
    config = run_config(tomllib.loads((bench.runs / "best.toml").read_text()))
    assert config.train.weight_decay == 0.25
    assert config.train.max_steps == 540
    assert config.train.early_stopping_patience == config.train.eval_every == 0
    for each in best["runs"]:
        assert each["tau"] == pytest.approx(tau_of(config, each["steps"]))
    complete = [t["runs"][-1]["tau"] for t in trials.values() if t["state"] == "complete"]
    assert best["runs"][-1]["tau"] == max(complete)
    (repeat,) = found["best"]["repeats"]
    again = replace(config, train=replace(config.train, seed=1))
    assert repeat["seed"] == 1
    assert repeat["tau"] == pytest.approx(tau_of(again, 540))
    expected = found["expected"]
    assert expected["tau"] == pytest.approx((best["runs"][-1]["tau"] + repeat["tau"]) / 2)
    assert expected["low"] < expected["tau"] < expected["high"]
    assert f"{found['best']['trial']}*" in out
    assert f"Expected held-out tau after 540 steps: {expected['tau']:.3f} (95% interval" in out


def test_the_expected_figure_is_of_the_best_configs_own_run(bench: Bench, world: World) -> None:
    """Its steps and slots, which here differ from those of the base config."""
    search = ("train.micro_batches_per_step=2,4", "draft.block_size=5,7", "draft.markov_rank=32,64")
    length = ("--set", "train.max_steps=none", "--set", "train.epochs=12", "--longest", "60")
    run_ok(*bench.arguments(*length, budget="10h", search=search))
    config = run_config(tomllib.loads((bench.runs / "best.toml").read_text()))
    assert (config.draft.markov_rank, config.train.max_steps) == (64, None)
    setup = set_up(bench.cache, config, torch.device("cpu"))
    base = replace(config, train=replace(config.train, micro_batches_per_step=1))
    steps = bench.found()["full_steps"]
    assert steps == count_run_steps(setup) < count_run_steps(set_up(bench.cache, base, torch.device("cpu")))
    assert f" {steps} steps" in (bench.runs / "best.toml").read_text()


def test_a_tune_killed_before_its_base_config_was_written_continues(bench: Bench, world: World) -> None:
    run_ok(*bench.arguments("--trials", "1"))
    (bench.runs / "base.toml").unlink()
    run_ok(*bench.arguments("--trials", "2"))
    assert [trial["state"] for trial in bench.found()["trials"]].count("failed") == 0


def test_a_tune_whose_only_trial_failed_says_so(bench: Bench, world: World) -> None:
    world.fails = lambda _point: "no space left"
    result = run_cli(*bench.arguments("--trials", "1", budget="10h"))
    assert_refused(result, 1, "no trial succeeded, 1 failed", "no space left")


def test_the_worse_are_pruned(bench: Bench, world: World) -> None:
    """Each climber is in the best third of those that were measured at its rung until then."""
    run_ok(*bench.arguments("--trials", "9", budget="10h"))
    trials = bench.found()["trials"]
    assert len(trials) == 9
    for rung, steps in enumerate(bench.found()["rungs"][:-1]):
        taus: list[float] = []
        for trial in trials:  # one at a time, so in the order of their numbers
            own = [r["tau"] for r in trial["runs"] if r["steps"] == steps]
            if own:
                taus = sorted([*taus, *own], reverse=True)
                climbs = len(trial["runs"]) > rung + 1
                assert climbs == (own[0] >= taus[max(0, len(taus) // 3 - 1)])
                assert climbs or trial["state"] == "pruned"
    assert {trial["state"] for trial in trials} == {"pruned", "complete"}


def test_the_weights_of_the_best_run_alone_are_kept(bench: Bench, world: World) -> None:
    run_ok(*bench.arguments("--trials", "5", budget="10h"))
    found = bench.found()
    best = found["trials"][found["best"]["trial"]]
    kept = [path.parents[2].name for path in bench.runs.glob("*/checkpoints/*/model.safetensors")]
    assert kept == [best["runs"][-1]["name"]]
    rows = json.loads(run_ok("compare", bench.runs, "--format", "json"))
    assert {row["run"]: row["tau"] for row in rows}.items() >= {
        (r["name"], r["tau"]) for trial in found["trials"] for r in trial["runs"]
    }


def settings_of(bench: Bench) -> list[list[str]]:
    return [trial["settings"] for trial in bench.found()["trials"]]


def test_a_spent_budget_stops_in_a_run_and_a_larger_one_continues_there(bench: Bench, world: World) -> None:
    more = ("--longest", "540", "--repeats", "0")
    world.late["trial-000-60"] = 50
    out = run_ok(*bench.arguments(*more, budget="100s"))
    assert world.started == [("trial-000-20", 0), ("trial-000-60", 0)]
    assert world.now <= 101
    assert "trial 0: the budget is spent, stopped; its checkpoint is kept" in out
    assert "Not at their end: trials 0." in out
    world.now += 1000  # between sessions
    run_ok(*bench.arguments(*more, budget="160s"))
    assert world.now <= 1162  # with what the first session took
    (name, step), *others = world.started[2:]
    assert (name, 0 < step < 60) == ("trial-000-60", True)
    assert all(each.startswith("trial-001-20") for each, _ in others)  # 180 steps did not fit, 60 of that one
    (base, *_) = bench.found()["trials"]
    assert [(r["steps"], r["whole"] is None) for r in base["runs"]] == [(20, False), (60, True)]


def test_a_trial_ahead_of_the_best_that_has_no_time_is_named(bench: Bench, world: World) -> None:
    """Trial 0 needs 23 + 63 s and a poor rate. Trial 1 is ahead at 20 steps, and 60 do not fit."""
    more = ("--longest", "60", "--repeats", "0", "--set", "train.lr=1e-4")
    out = run_ok(*bench.arguments(*more, budget="125s"))
    trials = bench.found()["trials"]
    assert trials[bench.found()["best"]["trial"]]["trial"] == 0
    (ahead,) = [trial for trial in trials if trial["state"] == "waiting"]
    taus = [trial["runs"][0]["tau"] for trial in (ahead, trials[0])]
    line = f"Trial {ahead['trial']} was ahead of it at 20 steps ({taus[0]:.3f} against {taus[1]:.3f})"
    assert line in out
    assert line in (bench.runs / "best.toml").read_text()


def test_same_seed_same_trials_however_often_it_is_stopped(bench: Bench, world: World, tmp_path) -> None:
    more = ("--longest", "180", "--repeats", "0", "--trials", "6")
    run_ok(*bench.arguments(*more, budget="10h"))
    whole, names = settings_of(bench), [name for name, _ in world.started]
    assert len({*map(tuple, whole)}) == len(whole) == 6
    assert len(set(names)) == len(names)
    bench.runs, world.started = tmp_path / "often", []

    signalled = [0]

    def now_and_then(seconds: float) -> None:
        World.sleep(world, seconds)
        signalled[0] += 1
        if signalled[0] % 149 == 0:
            signal.raise_signal(signal.SIGTERM)

    search.time.sleep = now_and_then
    codes = [143]
    while codes[-1] == 143:
        codes.append(run_cli(*bench.arguments(*more, budget="10h")).exit_code)
        assert len(codes) < 30
    assert codes[-1] == 0
    assert len(codes) > 3
    assert settings_of(bench) == whole
    continued = [(name, step) for name, step in world.started if step]
    assert continued  # runs went on from their checkpoints
    assert {name for name, _ in world.started} == set(names)
    bench.runs = tmp_path / "other"
    search.time.sleep = world.sleep
    run_ok(*bench.arguments(*more, "--seed", "1", budget="10h"))
    assert settings_of(bench)[1:] != whole[1:]


def test_a_failure_ends_its_trial_only(bench: Bench, world: World) -> None:
    world.fails = lambda point: "step 7: nan" if point.name.startswith("trial-002-") else None
    out = run_ok(*bench.arguments("--trials", "5", budget="10h"))
    trials = bench.found()["trials"]
    assert [t["trial"] for t in trials if t["state"] == "failed"] == [2]
    assert trials[2]["problem"] == "step 7: nan"
    assert len(trials) == 5
    assert "trial 2: failed: step 7: nan; log: " in out
    run_ok(*bench.arguments("--trials", "5", budget="10h"))
    assert sum(name.startswith("trial-002-") for name, _ in world.started) == 1  # not tried again


def test_failures_one_after_the_other_end_the_tune(bench: Bench, world: World) -> None:
    world.fails = lambda _point: "no space left"
    result = run_cli(*bench.arguments(budget="10h"))
    assert_refused(result, 1, "3 trials in a row failed", "no space left", "the same command")
    assert len(world.started) == 3
    assert not (bench.runs / "best.toml").exists()


def test_a_study_that_can_not_be_written_is_one_line(bench: Bench, world: World, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise sqlalchemy.exc.OperationalError("UPDATE", {}, Exception("database or disk is full"))

    monkeypatch.setattr(Study, "add_run", full)
    assert_refused(run_cli(*bench.arguments()), 1, "tune.db", "database or disk is full", "fix that")


def test_choices_are_tried_once_each(bench: Bench, world: World) -> None:
    choices = ("draft.markov_rank=8,16", "draft.markov_head=vanilla,none")
    out = run_ok(*bench.arguments(budget="10h", search=choices))
    assert "all settings were tried" in out
    trials = bench.found()["trials"]
    assert trials[0]["settings"] == []  # 8, vanilla
    tried = {tuple(trial["settings"][:2]) for trial in trials[1:]}
    ranks = ("draft.markov_rank=8", "draft.markov_rank=16")
    heads = [(rank, f"draft.markov_head={head}") for rank in ranks for head in ("vanilla", "none")]
    assert tried == set(heads) - {heads[0]}
    assert len(trials) == 4


def test_runs_at_once(bench: Bench, world: World) -> None:
    run_ok(*bench.arguments("--jobs", "3", "--trials", "7", "--longest", "60", budget="10h"))
    assert world.most_at_once == 3
    assert len(bench.found()["trials"]) == 7


def test_a_short_budget_says_what_it_can_not(bench: Bench, world: World) -> None:
    out = run_ok(*bench.arguments(budget="2m"))
    assert "longer runs would take over a 6th of the budget each" in out
    assert "Nothing can be said of 540 steps: a curve needs runs of 3 lengths" in out
    assert bench.found()["expected"] is None
    bench.runs = bench.folder / "late"
    world.late["trial-000-20"] = 80  # so that nothing else fits
    out = run_ok(*bench.arguments(budget="2m"))
    assert "trial 0, seed 1: not trained, there is no time left for it" in out
    bench.runs = bench.folder / "shorter"
    result = run_cli(*bench.arguments(budget="10s"))
    assert_refused(result, 1, "no run of 20 steps ended within the budget of 10 s", "--budget")


def test_another_tune_or_other_things_in_the_folder_are_refused(bench: Bench, world: World) -> None:
    run_ok(*bench.arguments("--trials", "1"))
    for more in (["--seed", "3"], ["--set", "train.lr=0.5"], ["--shortest", "30"]):
        assert_refused(run_cli(*bench.arguments(*more)), 1, "holds another tune", "choose another --runs")
    result = run_cli(*bench.arguments(search=("train.lr=1e-4..1",)))
    assert_refused(result, 1, "another tune", "--search", "1e-4..1")
    (bench.runs / "tune.db").write_bytes(b"junk" * 1000)
    assert_refused(run_cli(*bench.arguments()), 1, "tune.db", "can't be used", "--runs")
    (bench.runs / "tune.db").unlink()
    assert_refused(run_cli(*bench.arguments()), 1, "holds runs of a tune but not its tune.db")
    with locked(bench.runs):
        assert_refused(run_cli(*bench.arguments()), 1, "another process is tuning in", "--runs")


@pytest.mark.parametrize(
    ("search", "parts"),
    [
        ("nonsense", ["TABLE.KEY=LOW..HIGH", "'nonsense'"]),
        ("train.lr=", ["TABLE.KEY=LOW..HIGH"]),
        ("train.lrs=1..2", ["train.lrs", "did you mean lr?"]),
        ("nothing=1..2", ["nothing", "known keys"]),
        ("train.lr=2..1", ["from low to high"]),
        ("train.lr=1..2..3", ["two numbers"]),
        ("train.lr=1..inf", ["two numbers"]),
        ("train.lr=1..many", ["two numbers"]),
        ("train.optimizer=1..2", ["not a number", "list its values"]),
        ("draft.confidence_head=0..1", ["not a number"]),
        ("draft.markov_rank=1..2.5", ["a whole number"]),
        ("draft.markov_rank=8", ["two or more", "--set"]),
        ("draft.markov_rank=8,8", ["different values"]),
        ("draft.markov_rank=8,[16", ["not closed"]),
        ("train.max_steps=10,20", ["the same in all trials", "--set"]),
        ("train.held_out=0.1,0.2", ["the same in all trials"]),
        ("draft.markov_rank=0,8", ["markov_rank=0", "at least 1"]),
        ("train.lr=-1..1", ["train.lr=-1.0", "must be positive"]),
        ("draft.mask_token_id=320,999", ["mask_token_id=999"]),
        ("draft.block_size=2,some", ["block_size=some", "expected int"]),
    ],
)
def test_a_bad_search_is_one_line_before_anything_is_written(
    bench: Bench, world: World, search: str, parts: list[str]
) -> None:
    assert_refused(run_cli(*bench.arguments(search=(search,))), 2, *parts)
    assert not bench.runs.exists()
    assert world.started == []


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--budget", "15"], ["15m", "'15'"]),
        (["--budget", "0h"], ["expected --budget"]),
        (["--budget", "h2"], ["expected --budget"]),
        (["--longest", "541"], ["--longest 541", "540 optimiser steps"]),
        (["--shortest", "600"], ["--shortest 600"]),
        (["--set", "train.held_out=0"], ["held_out above 0"]),
        (["--set", "train.lr=fast"], ["train.lr"]),
        (["--search", LR], ["given twice"]),
    ],
)
def test_a_bad_request_is_one_line(bench: Bench, world: World, more: list[str], parts: list[str]) -> None:
    assert_refused(run_cli(*bench.arguments(*more)), 2, *parts)
    assert not bench.runs.exists()


def test_a_cache_without_last_hidden_states_is_refused(bench: Bench, world: World) -> None:
    without, more = bench.folder / "without", ["--set", "draft.kind=dflash"]
    run_ok("convert", bench.cache, without, "--last-hidden", "none")
    bench.cache = without
    bench.config.write_text(bench.config.read_text().replace("markov_rank = 8\n", ""))
    assert_refused(run_cli(*bench.arguments(*more)), 2, "without last hidden states")


def test_without_optuna_it_says_what_to_install(bench: Bench, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *more: None if n == "optuna" else real(n, *more)
    )
    line = "dspark tune needs optuna: pip install 'dspark-pipeline[tune]'"
    assert_refused(run_cli(*bench.arguments()), 1, line)
    assert not bench.runs.exists()


@pytest.mark.parametrize(
    ("total", "shortest", "longest", "rungs"),
    [
        (700, None, None, [26, 78, 234, 700]),
        (540, None, None, [20, 60, 180, 540]),
        (270, None, None, [20, 60, 270]),
        (700, 100, None, [100, 300, 700]),
        (700, None, 90, [20, 90]),
        (700, 500, None, [700]),
        (10, None, None, [10]),
        (2700, None, 2700, [100, 300, 900, 2700]),
        (700, 7, 700, [7, 21, 63, 189, 700]),
    ],
)
def test_the_ladder(total: int, shortest: int | None, longest: int | None, rungs: list[int]) -> None:
    assert ladder(total, shortest, longest) == rungs


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("1.5d", 129600)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
    with pytest.raises(UsageError):
        parse_budget(text + "x")


def test_what_is_switched_off_is_not_searched() -> None:
    keys = {each.key for each in default_space(run_config({"draft": {"kind": "dspark"}}))}
    assert {"loss.ce_alpha", "train.weight_decay"} <= keys
    assert "loss.soft_ce_alpha" not in keys
    loss = {"ce_alpha": 0.0, "soft_ce_alpha": 0.1, "decay_gamma": "none"}
    keys = {each.key for each in default_space(run_config({"draft": {"kind": "dspark"}, "loss": loss}))}
    assert "loss.soft_ce_alpha" in keys
    assert not {"loss.ce_alpha", "loss.decay_gamma"} & keys


@pytest.mark.parametrize("kind", TABLES)
def test_what_each_kind_searches_are_settings_that_it_takes(kind: str) -> None:
    soft = {"soft_ce_alpha": 0.1} if kind == "dspark" else {}
    base = run_config({"draft": {"kind": kind}, "loss": soft})
    space = default_space(base)
    assert "train.lr" in {each.key for each in space}
    assert [f"{each.key}={each.text}" for each in space] == list(TABLES[kind].searched)
    for each in space:
        for setting in each.ends():
            key, _, value = setting.partition("=")
            assert flat_settings(trial_config(base, [setting])[0])[key] == float(value)


def test_a_default_range_holds_the_configs_own_number() -> None:
    base = run_config({"train": {"lr": 0.5}, "loss": {"decay_gamma": "none"}})
    space = {each.key: each for each in default_space(base)}
    assert (space["train.lr"].low, space["train.lr"].high) == (1e-4, 0.5)
    assert space["train.lr"].text == "0.0001..0.5"
    assert "loss.decay_gamma" not in space
    assert parse_search(LR, base).place(0.5) is None  # not in the user's


def test_numbers_stay_in_their_range() -> None:
    searched = parse_search("train.beta2=0.9..0.99995", run_config({}))
    drawer = SimpleNamespace(suggest_float=lambda *_, **__: 0.99991)
    assert searched.draw(drawer) == "train.beta2=0.99995"  # 1 would be refused
    drawer = SimpleNamespace(suggest_float=lambda *_, **__: 0.912345)
    assert searched.draw(drawer) == "train.beta2=0.912"


def test_what_a_cache_has_no_use_for_is_not_searched(bench: Bench, world: World, monkeypatch) -> None:
    real = run._set_up

    def picky(cache, config):
        if config.train.weight_decay:
            raise DSparkError("no")
        return real(cache, config)

    monkeypatch.setattr(run, "_set_up", picky)
    out = run_ok(*bench.arguments("--trials", "1", search=()))
    assert "not searched: train.weight_decay=0.3: no" in out
    assert "train.lr=1e-4..1e-2" in out
