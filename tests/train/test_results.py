"""The files of a draft's figures: their keys, other versions' files, and damage told by field."""

from __future__ import annotations

import dataclasses
import inspect
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import field_docs
from pipeline.errors import RunError
from train.runs import figures
from train.runs.figures import Calibration, Evaluation, Rounds, Speculation, SpeculationRun
from train.runs.results import (
    as_evaluation,
    read_calibration,
    read_evaluation,
    read_speculation,
    read_temperatures,
    save_figures,
)

ROOT = Path(__file__).parents[2]
BIN = {"low": 0.0, "high": 1.0, "count": 3, "predicted": 0.5, "actual": 0.25}
EMPTY = {"low": 0.5, "high": 1.0, "count": 0, "predicted": None, "actual": None}
RELIABILITY = {
    "ece": 0.25,
    "ece_by_position": [0.25, None],
    "auc": None,
    "auc_by_position": [None, None],
    "bins": [BIN, EMPTY],
}
CONFIDENCE = {"slot": RELIABILITY, "prefix": RELIABILITY}
THRESHOLDS = [
    {"threshold": 0.0, "verified": 2.0, "tokens": 1.5, "acceptance": 0.25},
    {"threshold": 0.95, "verified": 0.0, "tokens": 1.0, "acceptance": None},
]
LOSSES = {"loss": 0.5, "ce_loss": 2.5, "l1_loss": 1.0, "confidence_loss": 0.0}
ACCEPTANCE = {
    "accept_rate": 0.5,
    "accept_by_position": [0.5, None],
    "accept_given_prefix": [0.5, None],
    "tau": 1.5,
    "greedy_accept_by_position": [1.0, None],
    "greedy_accept_given_prefix": [1.0, None],
    "greedy_tau": 2.0,
}
GROUP = {"samples": 1, "blocks": 3, **LOSSES, **ACCEPTANCE, "confidence": CONFIDENCE}
ROUNDS = {"tokens_per_round": 1.25, "accept_given_prefix": [0.25, None]}
CACHE = {
    "target": "tiny",
    "target_weights": "ab" * 32,
    "data_sha256": "cd" * 32,
    "sources": ["a.jsonl"],
    "samples": 10,
    "tokens": 100,
    "bytes": 4096,
    "bytes_per_token": 32.5,
    "layer_ids": [0, 2],
    "context_codec": "bf16",
    "last_codec": "bf16",
    "fidelity": {"proof.teacher_tv_mean": 0.0},
}
# As the commit before this class wrote them, key by key.
EVALUATION = {
    "step": 20,
    "samples": 1,
    "blocks": 3,
    "anchors": "all",
    **LOSSES,
    **ACCEPTANCE,
    "decoding": {"sampling": ROUNDS, "greedy": ROUNDS},
    "confidence": CONFIDENCE,
    "thresholds": THRESHOLDS,
    "by_source": {"a.jsonl": GROUP},
    "by_length": {"128-255": GROUP},
    "by_context": {"64-127": GROUP},
    "untrained": {"tau": 1.0, "accept_by_position": [0.0, 0.0], "blocks": 3},
    "cache": CACHE,
}
CALIBRATION = {
    "temperatures": [1.25, 1.0],
    "dataset": "a.jsonl",
    "num_samples": 3,
    "ece_before": [0.25],
    "ece_after": [0.125],
    "step": 20,
    "fit": {"samples": 1, "blocks": 3},
    "report": {"samples": 1, "blocks": 3, "before": CONFIDENCE, "after": CONFIDENCE},
    "thresholds": {"before": THRESHOLDS, "after": THRESHOLDS},
}
LIVE = {
    "temperature": 0.0,
    "tokens": 12,
    "rounds": 8,
    "tokens_per_round": 1.5,
    "accept_given_prefix": [0.5, None],
    "verified_per_round": 2.0,
    "draft_ms": 0.5,
    "verify_ms": 1.5,
    "plain_ms": 1.0,
    "speculative_ms": 1.25,
    "speedup": 0.75,
    "identical": 1,
    "partings": [{"prompt": 1, "token": 3, "gap": 0.0}],
    "offline": ROUNDS,
}
SPECULATION = {
    "step": 20,
    "target": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "prompts": 2,
    "max_new_tokens": 8,
    "threshold": 0.0,
    "runs": [LIVE],
}
READERS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "evaluation": (read_evaluation, EVALUATION),
    "calibration": (read_calibration, CALIBRATION),
    "speculation": (read_speculation, SPECULATION),
}
ABSENT = object()


def changed(values: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted place, or (`ABSENT`) without it."""
    values = json.loads(json.dumps(values))  # shares no part with itself
    *tables, key = [int(part) if part.isdecimal() else part for part in where.split("/")]
    table: Any = values
    for name in tables:
        table = table[name]
    if value is ABSENT:
        del table[key]
    else:
        table[key] = value
    return values


@pytest.mark.parametrize("name", READERS)
def test_files_are_read_and_written_byte_for_byte(tmp_path: Path, name: str) -> None:
    reader, values = READERS[name]
    path = tmp_path / f"{name}.json"
    assert reader(tmp_path) is None
    text = json.dumps(values, indent=1) + "\n"
    path.write_text(text)
    read = reader(tmp_path)
    assert reader(tmp_path, skip_misfits=True) == read
    path.unlink()
    save_figures(tmp_path, read)
    assert path.read_text() == text


def test_what_is_read_has_its_types(tmp_path: Path) -> None:
    values = changed(EVALUATION, "tau", 2)  # as other writers of JSON leave a whole number
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    read = read_evaluation(tmp_path)
    assert read is not None
    assert type(read.tau) is float
    assert read.decoding is not None
    assert read.decoding.greedy == Rounds(tokens_per_round=1.25, accept_given_prefix=(0.25, None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.tau = 3.0


def test_files_of_the_first_version(tmp_path: Path) -> None:
    """By hand, as d58d50d wrote them: groups had five figures, and no cache its hashes."""
    group = {"samples": 1, "blocks": 3, "accept_rate": 0.5, "tau": 1.5, "greedy_tau": 2.0}
    values = {**EVALUATION, "by_source": {"a.jsonl": group}, "by_length": {"128-255": group}}
    absent = ("decoding", "by_context", "untrained/blocks", "cache/data_sha256", "cache/target_weights")
    for where in absent:
        values = changed(values, where, ABSENT)
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    read = read_evaluation(tmp_path)
    assert read is not None
    assert (read.decoding, read.untrained.blocks, read.cache.data_sha256) == (None, None, None)
    assert read.by_context is None
    assert read.by_source["a.jsonl"].accept_by_position is None
    assert read.by_source["a.jsonl"].tau == 1.5
    (tmp_path / "calibration.json").write_text('{"temperatures": [1, 2]}')  # all that SGLang needs
    assert read_calibration(tmp_path) == Calibration(temperatures=(1.0, 2.0))


def test_trainings_own_evaluation() -> None:
    names = ("step", "samples", "blocks", *LOSSES, "accept_rate", "accept_by_position", "tau")
    own = {name: EVALUATION[name] for name in names}
    read = as_evaluation(own)
    assert read is not None
    assert read.tau == 1.5
    assert (read.greedy_tau, read.accept_given_prefix, read.cache, read.anchors) == (None,) * 4
    assert as_evaluation({**own, "tau": float("nan")}) is None


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("evaluation", "new"),
        ("evaluation", "cache/new"),
        ("evaluation", "by_source/a.jsonl/new"),
        ("evaluation", "confidence/slot/bins/0/new"),
        ("calibration", "report/new"),
        ("speculation", "runs/0/new"),
        ("speculation", "runs/0/partings/0/new"),
    ],
)
def test_keys_of_a_newer_version_are_skipped(tmp_path: Path, name: str, where: str) -> None:
    reader, values = READERS[name]
    (tmp_path / f"{name}.json").write_text(json.dumps(values))
    want = reader(tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(changed(values, where, {"a": 1})))
    assert reader(tmp_path) == want


DAMAGE = [
    ("evaluation", "tau", "high", "evaluation.tau: expected float, got 'high'"),
    ("evaluation", "tau", ABSENT, "evaluation: missing key 'tau'"),
    ("evaluation", "tau", None, "evaluation.tau"),
    ("evaluation", "tau", True, "evaluation.tau"),
    ("evaluation", "tau", float("nan"), "evaluation.tau: expected float, got 'NaN'"),
    ("evaluation", "tau", float("-inf"), "evaluation.tau: expected float, got '-Infinity'"),
    ("evaluation", "tau", 10**400, "evaluation.tau"),
    ("evaluation", "tau", 1e101, "evaluation.tau"),
    ("evaluation", "tau", -1e101, "evaluation.tau"),
    ("evaluation", "blocks", 10**101, "evaluation.blocks"),
    ("evaluation", "blocks", 1.5, "evaluation.blocks"),
    ("evaluation", "anchors", "some", "evaluation.anchors"),
    ("evaluation", "accept_by_position", 3, "evaluation.accept_by_position: expected a list"),
    ("evaluation", "accept_by_position", [0.5, "x"], "evaluation.accept_by_position"),
    ("evaluation", "decoding", [], "evaluation.decoding"),
    ("evaluation", "decoding/greedy", None, "evaluation.decoding.greedy"),
    ("evaluation", "confidence/slot/bins/0/count", "3", "evaluation.confidence.slot.bins.count"),
    ("evaluation", "thresholds/0/tokens", ABSENT, "evaluation.thresholds: missing key 'tokens'"),
    ("evaluation", "by_source/a.jsonl/tau", "x", "evaluation.by_source.a.jsonl.tau"),
    ("evaluation", "cache/fidelity", {"a": "b"}, "evaluation.cache.fidelity.a"),
    ("evaluation", "cache/layer_ids", [0, 0.5], "evaluation.cache.layer_ids"),
    ("calibration", "temperatures", [1, True], "calibration.temperatures"),
    ("calibration", "ece_after", [0.5, None], "calibration.ece_after"),
    ("calibration", "ece_before", 0.5, "calibration.ece_before: expected a list"),
    ("calibration", "report", {"before": 1.0}, "calibration.report"),
    ("speculation", "runs", {}, "speculation.runs: expected a list"),
    ("speculation", "runs/0/speedup", "x", "speculation.runs.speedup"),
    ("speculation", "runs/0/offline/tokens_per_round", None, "speculation.runs.offline.tokens_per_round"),
]


@pytest.mark.parametrize(("name", "where", "value", "said"), DAMAGE)
def test_damage_is_one_line_that_names_file_and_field(
    tmp_path: Path, name: str, where: str, value: Any, said: str
) -> None:
    reader, values = READERS[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(changed(values, where, value)))
    with pytest.raises(RunError) as caught:
        reader(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} can't be read ({said}")
    assert message.endswith("): remove it, and measure again")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    reader(tmp_path, skip_misfits=True)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", ["{", "[]", "3", "\xff", "[" * 100_000, '{"step": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_refused_by_every_reader(tmp_path: Path, name: str, content: str) -> None:
    reader, _ = READERS[name]
    (tmp_path / f"{name}.json").write_bytes(content.encode("latin-1"))
    for skip in (False, True):
        with pytest.raises(RunError, match=rf"{name}\.json can't be read \(.*\): remove it, and measure"):
            reader(tmp_path, skip_misfits=skip)


def test_what_does_not_fit_is_not_measured(tmp_path: Path) -> None:
    """Part by part, as far as the rest can do without."""

    def evaluation(where: str, value: Any) -> Evaluation | None:
        (tmp_path / "evaluation.json").write_text(json.dumps(changed(EVALUATION, where, value)))
        return read_evaluation(tmp_path, skip_misfits=True)

    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    whole = read_evaluation(tmp_path)
    assert whole is not None
    for where, part in (
        ("decoding/greedy", "decoding"),
        ("cache/bytes", "cache"),
        ("untrained/tau", "untrained"),
    ):
        assert evaluation(where, "x") == dataclasses.replace(whole, **{part: None})
    assert evaluation("greedy_tau", float("nan")) == dataclasses.replace(whole, greedy_tau=None)
    assert evaluation("accept_by_position", [0.5, "x"]) == whole  # where the second is None
    assert evaluation("by_source/a.jsonl/tau", "x") == dataclasses.replace(whole, by_source={})
    assert evaluation("thresholds/0/tokens", "x").thresholds == whole.thresholds[1:]
    assert (
        evaluation("confidence/slot/bins/0/low", "x").confidence.slot.bins == whole.confidence.slot.bins[1:]
    )
    assert evaluation("tau", "x") is None  # nothing is left of an evaluation without it
    live = {**SPECULATION, "runs": [{**LIVE, "rounds": "x"}, {**LIVE, "speedup": "x"}, 3]}
    (tmp_path / "speculation.json").write_text(json.dumps(live))
    read = read_speculation(tmp_path, skip_misfits=True)
    assert read is not None
    (row,) = read.runs
    assert (row.rounds, row.speedup) == (8, None)


@pytest.mark.parametrize(
    "temperatures", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, -1.0], [1.0, None], "hot", None, [], [1, True]]
)
def test_temperatures_are_one_positive_number_per_position(tmp_path: Path, temperatures: Any) -> None:
    assert read_temperatures(tmp_path, 2) is None
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**CALIBRATION, "report": "damaged"}))
    assert read_temperatures(tmp_path, 2) == (1.25, 1.0)
    path.write_text(json.dumps({**CALIBRATION, "temperatures": temperatures}))
    with pytest.raises(RunError, match="2 positive temperatures: run `dspark calibrate` again"):
        read_temperatures(tmp_path, 2)


CLASSES = [cls for _, cls in inspect.getmembers(figures, dataclasses.is_dataclass)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_is_frozen_and_every_field_has_its_docstring(cls: type) -> None:
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.__doc__
    assert list(field_docs(cls)) == [field.name for field in dataclasses.fields(cls)]


def test_the_list_of_classes_is_whole() -> None:
    assert {Evaluation, Calibration, Speculation, SpeculationRun} <= set(CLASSES)
    assert len(CLASSES) > 15


def test_templates_are_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in sorted((ROOT / "train").rglob("*.jinja")):
        assert path.name in listed[".".join(path.parent.relative_to(ROOT).parts)]
