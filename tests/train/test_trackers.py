"""Trackers beside metrics.jsonl: what is logged where, over a resume, and when one of them fails."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import ConfigError, RunError
from tests.conftest import run_ok
from tests.train.runs import lines_of, train_arguments
from train.runtime.trackers import TRACKERS, Trackers, check_trackers, flat_scalars

LINE = {"step": 5, "loss": 0.5, "tau": 2, "lr": math.nan, "peak_flops_percent": None, "note": "warm"}
HELD_OUT = {"step": 5, "held_out": {"step": 5, "tau": 2.5, "accept_by_position": [0.75, 0.5]}}
CONFIG = {"train.lr": 6e-4, "draft.mask_token_id": None}


class StandIn(ModuleType):
    """A module in place of wandb or trackio: records the calls, and fails where it is told to."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None, origin="stand-in")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken: set[str] = set()
        self.offline, self.url = False, "https://wandb.example/run"

    def _call(self, call: str, **values: Any) -> StandIn:
        self.calls.append((call, values))
        print("chatter")
        if call in self.broken:
            raise OSError(f"{call} failed:\nno network")
        return self

    def init(self, **settings: Any) -> StandIn:
        return self._call("init", **settings)

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._call("log", values=values, step=step)

    def finish(self, **how: Any) -> None:
        self._call("finish", **how)

    def of(self, call: str) -> list[dict[str, Any]]:
        return [values for name, values in self.calls if name == call]


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    module = StandIn("wandb")
    module.Settings = lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture
def trackio(monkeypatch) -> StandIn:
    module = StandIn("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "my-run"
    path.mkdir()
    return path


def opened(run: Path, *names: str, step: int = 0) -> Trackers:
    return Trackers(names, run=run, identity_file=run / "trackers.json", config=CONFIG, step=step)


def events(run: Path) -> Any:
    """What TensorBoard itself would show of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_numbers_of_a_line_and_their_names() -> None:
    found = flat_scalars(LINE)
    assert math.isnan(found.pop("train/lr"))
    assert found == {"train/loss": 0.5, "train/tau": 2}
    assert flat_scalars(HELD_OUT) == {
        "held_out/tau": 2.5,
        "held_out/accept_by_position/1": 0.75,
        "held_out/accept_by_position/2": 0.5,
    }
    assert flat_scalars({"by_position": [1.0, None, 3.0]}) == {
        "train/by_position/1": 1.0,
        "train/by_position/3": 3.0,
    }


def test_tensorboard_shows_what_was_logged(run: Path, capsys) -> None:
    with opened(run, "tensorboard") as trackers:
        trackers.log(5, LINE)
        trackers.log(5, HELD_OUT)
        shown = events(run)  # while the run goes on: nothing waits in a buffer
    names = {"train/loss", "train/tau", "train/lr", "held_out/tau"}
    names |= {"held_out/accept_by_position/1", "held_out/accept_by_position/2"}
    assert set(shown.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [(5, 0.5)]
    assert [(e.step, e.value) for e in shown.Scalars("held_out/accept_by_position/2")] == [(5, 0.5)]
    assert math.isnan(shown.Scalars("train/lr")[0].value)
    (settings,) = shown.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert b"train.lr = 0.0006" in settings
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"tensorboard: {run / 'tensorboard'}\n")


def test_tensorboard_shows_one_line_over_a_crash(run: Path) -> None:
    died = opened(run, "tensorboard")
    for step in range(1, 8):
        died.log(step, {"loss": 1.0})
    with opened(run, "tensorboard", step=4) as resumed:  # its last checkpoint was of step 4
        for step in range(5, 10):
            resumed.log(step, {"loss": 2.0})
    shown = [(event.step, event.value) for event in events(run).Scalars("train/loss")]
    assert shown == [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 10)]
    died.close()


def test_wandb_is_one_run_over_a_resume(run: Path, wandb: StandIn, monkeypatch) -> None:
    with opened(run, "wandb") as trackers:
        trackers.log(5, LINE)
        trackers.log(5, HELD_OUT)
    monkeypatch.setenv("WANDB_PROJECT", "drafts")
    opened(run, "wandb", step=5).close()
    first, second = wandb.of("init")
    expected = {"project": "dspark", "name": "my-run", "dir": run, "config": CONFIG, "resume": "allow"}
    assert {key: first[key] for key in expected} == expected
    assert first["id"] == second["id"] == json.loads((run / "trackers.json").read_text())["id"]
    assert second["project"] == "drafts"
    assert (first["settings"].silent, first["settings"].console) == (True, "off")
    assert [line["step"] for line in wandb.of("log")] == [5, 5]
    assert wandb.of("log")[1]["values"] == flat_scalars(HELD_OUT)
    assert wandb.of("finish") == [{"exit_code": 0}] * 2


def test_wandb_says_where_the_figures_are(run: Path, wandb: StandIn, capsys) -> None:
    opened(run, "wandb").close()
    wandb.offline = True
    opened(run, "wandb").close()
    assert capsys.readouterr().err == f"wandb: https://wandb.example/run\nwandb: {run / 'wandb'}\n"


def test_trackio_is_one_run_over_a_resume(run: Path, trackio: StandIn, monkeypatch, capsys) -> None:
    with opened(run, "trackio") as trackers:
        trackers.log(5, HELD_OUT)
    monkeypatch.setenv("TRACKIO_PROJECT", "drafts")
    opened(run, "trackio", step=5).close()
    first, second = trackio.of("init")
    assert (first["project"], second["project"]) == ("dspark", "drafts")
    assert first["name"] == second["name"]
    assert first["name"].startswith("my-run-")
    assert (first["config"], first["resume"]) == (CONFIG, "allow")
    assert trackio.of("log") == [{"values": flat_scalars(HELD_OUT), "step": 5}]
    assert len(trackio.of("finish")) == 2
    said = capsys.readouterr()
    assert said.out == "chatter\n"  # of log alone, which the real one does silently
    assert "trackio show --project dspark" in said.err


def test_runs_of_one_name_are_not_mixed_up(tmp_path: Path, wandb: StandIn, trackio: StandIn) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        opened(tmp_path / place / "run", "wandb", "trackio").close()
    assert len({settings["id"] for settings in wandb.of("init")}) == 2
    assert len({settings["name"] for settings in trackio.of("init")}) == 2


def test_no_tracker_writes_nothing(run: Path) -> None:
    with opened(run) as trackers:
        trackers.log(5, LINE)
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line(name: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    message = rf"train\.report_to names \"{name}\", .*: pip install 'dspark-pipeline\[{name}\]'"
    with pytest.raises(ConfigError, match=message):
        check_trackers([name])
    (tmp_path / name).mkdir()  # such as wandb leaves where it was once run: a folder is no package
    sys.path_importer_cache.pop(str(tmp_path), None)
    with pytest.raises(ConfigError, match=message):
        check_trackers([name])
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    sys.path_importer_cache.pop(str(tmp_path), None)
    check_trackers([name])


def test_one_that_can_not_be_opened_ends_the_run_in_one_line(run: Path, wandb, trackio) -> None:
    wandb.broken = {"init"}
    with pytest.raises(RunError) as caught:
        opened(run, "trackio", "wandb")
    assert str(caught.value) == (
        "train.report_to: wandb can't be opened (init failed: no network): fix that, "
        "or remove wandb from train.report_to"
    )
    assert len(trackio.of("finish")) == 1  # the one that was open already


def test_one_that_fails_is_dropped_and_the_others_go_on(run: Path, wandb, trackio, capsys) -> None:
    with opened(run, "wandb", "trackio") as trackers:
        trackers.log(1, {"loss": 3.0})
        wandb.broken = {"log", "finish"}
        trackers.log(2, {"loss": 2.0})
        trackers.log(3, {"loss": 1.0})
    assert [line["step"] for line in wandb.of("log")] == [1, 2]
    assert [line["step"] for line in trackio.of("log")] == [1, 2, 3]
    assert wandb.of("finish") == [{"exit_code": 1}]
    assert len(trackio.of("finish")) == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: wandb failed at step 2 (log failed: no network) and gets no more figures; "
        "metrics.jsonl has all of them"
    ]


def test_a_disk_that_fails_drops_tensorboard(run: Path, capsys, monkeypatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with opened(run, "tensorboard") as trackers:
        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
        trackers.log(1, {"loss": 3.0})
        trackers.log(2, {"loss": 3.0})
    assert capsys.readouterr().err.count("warning: tensorboard failed at step 1") == 1


def test_close_fails_with_a_warning_only(run: Path, wandb: StandIn, trackio: StandIn, capsys) -> None:
    trackio.broken = {"finish"}
    trackers = opened(run, "wandb", "trackio")
    trackers.close()
    trackers.close()
    assert len(wandb.of("finish")) == len(trackio.of("finish")) == 1
    assert "warning: trackio failed on closing (finish failed: no network)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_closes_them_as_failed(run: Path, wandb, trackio, error) -> None:
    with pytest.raises(error), opened(run, "wandb", "trackio"):
        raise error
    assert wandb.of("finish") == [{"exit_code": 1}]
    assert len(trackio.of("finish")) == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"id": 3}', '{"id": "../x"}'])
def test_a_damaged_identity_is_one_line(run: Path, wandb: StandIn, content: str) -> None:
    (run / "trackers.json").write_text(content)
    with pytest.raises(RunError, match=r"trackers\.json: expected .*remove it"):
        opened(run, "wandb")
    assert wandb.calls == []


def test_a_run_that_reports_to_tensorboard(tmp_path: Path, cache_dir: Path) -> None:
    """Through the command line: what metrics.jsonl has is what TensorBoard shows."""
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__report_to="['tensorboard']", train__eval_every=10))
    shown = events(run)
    for prefix, lines in (
        ("train", [line for line in lines_of(run) if "loss" in line]),
        ("held_out", [line["held_out"] for line in lines_of(run) if "held_out" in line]),
    ):
        found = {event.step: event.value for event in shown.Scalars(f"{prefix}/tau")}
        assert found == {line["step"]: pytest.approx(line["tau"]) for line in lines}
        assert len(found) >= 2
