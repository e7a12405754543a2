"""Files from before `train/` was moved into rooms still open, say and do the same.

`tests/data/before` was written by the command line of an earlier commit (`tests/data/make_before.py`).
Nothing here imports the project: names inside may change, commands and files may not.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import assert_refused, run_cli, run_ok

BEFORE = Path(__file__).parent / "data" / "before"
COMMANDS: dict[str, list[str]] = json.loads((BEFORE / "commands.json").read_text())
CHECKPOINT = Path("run-finished") / "best"
# Sums round otherwise on another CPU; a draft that starts with another weight is much further off.
TAU = 1e-4


@pytest.fixture(autouse=True)
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, for each test its own; relative paths in commands and configs are in it."""
    folder = tmp_path / "before"
    shutil.copytree(BEFORE, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def read(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def hashes(folder: str) -> dict[str, str]:
    """Every file of a folder, by its path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def again(name: str, **other: str) -> list[str]:
    """The command that made something, with other names in it where they are given."""
    return [other.get(part.replace("-", "_"), part) for part in COMMANDS[name]]


def settings(config: dict[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, values in config.items() for key, value in values.items()}


@pytest.mark.parametrize(
    ("cache", "codecs"), [("cache-nf4", ("nf4", "int8")), ("cache-bf16", ("bf16", "bf16"))]
)
def test_a_cache_is_good_and_what_it_was(cache: str, codecs: tuple[str, str]) -> None:
    was, manifest = hashes(cache), read(f"{cache}/manifest.json")
    assert run_ok("verify", cache).rstrip().endswith("all good")
    facts = json.loads(run_ok("inspect", cache, "--sample", "#0", "--json"))
    assert facts["status"] == "complete"
    assert facts["identity"] == manifest["identity"]
    features = facts["identity"]["features"]
    assert (features["context_codec"], features["last_codec"]) == codecs
    assert facts["tokens"] == sum(manifest["plan"]["tokens"]) > 0
    assert facts["shards_missing"] == 0
    assert facts["sample"]["text"].startswith("<|im_start|>user\n")
    assert f"cache {cache}: already complete" in run_ok(*COMMANDS[cache])
    assert hashes(cache) == was


def test_a_damaged_cache_is_told_from_a_good_one() -> None:
    shard = Path("cache-nf4/shards/00001.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert_refused(run_cli("verify", "cache-nf4"), 1, "1 of ")


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("every-key.toml", {}),
        ("from-run.toml", {}),
        ("example.toml", {"train.max_steps": 1, "train.held_out": 0.2}),
        (
            "qwen3-4b.toml",
            {
                "draft.target_layer_ids": [0, 1, 2],
                "draft.mask_token_id": 320,
                "train.max_steps": 1,
                "train.micro_batches_per_step": 2,
                "train.held_out": 0.2,
            },
        ),
    ],
)
def test_a_config_is_taken_as_it_is(config: str, overrides: dict[str, Any]) -> None:
    """Every value of the file is a setting of the run, under the same name."""
    if config == "every-key.toml":
        pytest.importorskip("tensorboard", reason="train.report_to names it")
    overrides = {"train.precision": "fp32", **overrides}  # whatever `auto` is here
    set_ = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    shared = ("train", "--cache", "cache-nf4", "--device", "cpu")
    run_ok(*shared, "--config", config, "--run", "run-new", *set_)
    wanted = settings(tomllib.loads(Path(config).read_text())) | overrides
    found = settings(tomllib.loads(Path("run-new/config.toml").read_text()))
    assert {key: found.get(key) for key in wanted} == wanted
    assert read("run-new/latest/training.json")["progress"]["complete"]


def test_every_setting_is_explained_still() -> None:
    explained = {line.split()[0] for line in run_ok("train", "--explain").splitlines() if line.strip()}
    named = {key for name in ("every-key", "from-run") for key in settings(_config(f"{name}.toml"))}
    assert len(named) == 49
    assert named <= explained


def _config(path: str) -> dict[str, Any]:
    return tomllib.loads(Path(path).read_text())


@pytest.mark.parametrize(("name", "step"), [("killed", 14), ("stopped", 19)])
def test_an_unfinished_run_becomes_what_it_would_have_been(name: str, step: int) -> None:
    """One was killed a step behind its checkpoint and has AdamW, one was asked to stop and has Muon.

    Without any one of the optimiser's states the weights are 25 tolerances off and more; with other vector
    instructions, a fortieth of one.
    """
    run, uninterrupted = f"run-{name}", Path("uninterrupted") / name
    result = run_cli(*COMMANDS[run])
    assert result.exit_code == 0, result.output
    assert f"continuing from step {step} of 24" in result.stderr
    found, wanted = (load_file(f / "model.safetensors") for f in (Path(run) / "latest", uninterrupted))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    metrics, figures = lines(f"{run}/metrics.jsonl"), lines(uninterrupted / "metrics.jsonl")
    assert [(line["step"], "held_out" in line) for line in metrics] == [
        (line["step"], "held_out" in line) for line in figures
    ]
    for line, other in zip(metrics, figures, strict=True):
        ours, theirs = (row.get("held_out", row) for row in (line, other))
        for key in ("loss", "tau", "accept_rate"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (line["step"], key)
        assert ours.get("lr") == theirs.get("lr")
    progress = read(f"{run}/latest/training.json")["progress"]
    assert progress["complete"]
    assert progress["step"] == 24
    assert progress["evaluation"]["tau"] == pytest.approx(figures[-1]["held_out"]["tau"], abs=TAU)
    assert f"run {run}: complete" in run_ok(*COMMANDS[run])


def test_a_finished_run_is_left_as_it_is() -> None:
    was = hashes("run-finished")
    output = run_ok(*COMMANDS["run-finished"])
    assert "run run-finished: complete, nothing is left to train" in output
    tau = read(CHECKPOINT / "training.json")["progress"]["evaluation"]["tau"]
    assert f"held-out tau {tau:.3f}" in output
    assert hashes("run-finished") == was
    assert_refused(run_cli(*COMMANDS["run-finished"], "--set", "train.beta2=0.5"), 1, "train.beta2: 0.95")


def test_a_finished_run_evaluates_and_calibrates_to_the_same_figures() -> None:
    was = {name: read(CHECKPOINT / f"{name}.json") for name in ("evaluation", "calibration")}
    for name in was:
        (CHECKPOINT / f"{name}.json").unlink()
    evaluation = json.loads(run_ok(*COMMANDS["evaluation"]))
    for key in ("tau", "greedy_tau", "loss", "accept_by_position"):
        assert evaluation[key] == pytest.approx(was["evaluation"][key], abs=TAU), key
    assert evaluation["blocks"] == was["evaluation"]["blocks"] > 0
    assert evaluation["untrained"]["tau"] == pytest.approx(was["evaluation"]["untrained"]["tau"], abs=1e-3)
    assert evaluation.keys() >= was["evaluation"].keys()
    calibration = json.loads(run_ok(*COMMANDS["calibration"]))
    assert calibration["ece_before"] == pytest.approx(was["calibration"]["ece_before"], abs=1e-3)
    # Of a grid, so that rounding moves one of them by a whole step or by nothing.
    assert calibration["temperatures"] == pytest.approx(was["calibration"]["temperatures"], rel=0.1)
    assert calibration.keys() >= was["calibration"].keys()
    assert read(CHECKPOINT / "evaluation.json") == evaluation
    assert read(CHECKPOINT / "calibration.json") == calibration


def test_a_finished_run_speculates_to_the_same_text() -> None:
    was = read(CHECKPOINT / "speculation.json")
    result = run_cli(*COMMANDS["speculation"])
    assert result.exit_code == 0, result.output
    _, loading, said = result.stderr.partition("loading tiny-target ...\n")
    assert loading
    assert said == Path("speculated.txt").read_text(encoding="utf-8")
    speculation = json.loads(result.stdout)
    (found,), (wanted,) = speculation["runs"], was["runs"]
    assert found["identical"] == wanted["identical"] == 4
    assert found["partings"] == []
    assert (found["tokens"], found["rounds"]) == (wanted["tokens"], wanted["rounds"])
    assert wanted["rounds"] < 0.8 * wanted["tokens"]  # the draft helps, so these figures are of its tokens
    assert found["accept_given_prefix"] == wanted["accept_given_prefix"]
    assert found["offline"] == read(CHECKPOINT / "evaluation.json")["decoding"]["greedy"]
    assert speculation.keys() >= was.keys()
    assert read(CHECKPOINT / "speculation.json") == speculation


def test_old_temperatures_are_what_a_threshold_goes_by() -> None:
    command = [*COMMANDS["speculation"], "--threshold", "0.5"]
    few = json.loads(run_cli(*command).stdout)["runs"][0]["verified_per_round"]
    calibration = read(CHECKPOINT / "calibration.json")
    calibration["temperatures"] = [1000.0] * 3  # now no token is surer than a half, or hardly one
    (CHECKPOINT / "calibration.json").write_text(json.dumps(calibration))
    other = json.loads(run_cli(*command).stdout)["runs"][0]["verified_per_round"]
    assert 0 < few < 3
    assert few != other


@pytest.mark.parametrize("export", ["export-hf", "export-vllm"])
def test_a_finished_run_exports_to_the_same_files(export: str) -> None:
    run_ok(*again(export, export_hf="new", export_vllm="new"))
    assert (Path("new") / "model.safetensors").read_bytes() == (
        Path(export) / "model.safetensors"
    ).read_bytes()
    for name in ("config.json", "calibration.json"):
        assert read(f"new/{name}") == read(f"{export}/{name}")
    assert {path.name for path in Path("new").iterdir()} == {path.name for path in Path(export).iterdir()}
    card = (Path("new") / "README.md").read_text(encoding="utf-8")
    figures = [read(CHECKPOINT / "evaluation.json")["tau"]]
    figures.append(read(CHECKPOINT / "speculation.json")["runs"][0]["tokens_per_round"])
    for figure in figures:
        assert f"{figure:.3f}" in card


def test_an_old_export_is_imported_to_the_draft_that_it_was_imported_to() -> None:
    run_ok(*again("run-imported", run_imported="run-new"))
    was = {str(Path(name).name): digest for name, digest in hashes("run-imported/latest").items()}
    found = {str(Path(name).name): digest for name, digest in hashes("run-new/latest").items()}
    assert found["model.safetensors"] == was["model.safetensors"]
    assert read("run-new/latest/config.json") == read("run-imported/latest/config.json")
    config = _config("run-new/config.toml")
    for table, values in _config("run-imported/config.toml").items():
        assert config[table].items() >= values.items()  # settings that came later may be beside them
    stored = read("run-imported/latest/evaluation.json")["tau"]
    assert stored > 2
    for run in ("run-new", "run-imported"):
        evaluation = json.loads(run_ok(*again("imported-evaluation", run_imported=run)))
        assert evaluation["tau"] == pytest.approx(stored, abs=TAU)


def test_an_imported_run_is_still_known_as_one() -> None:
    """It may not be cleared, since no training would make it again."""
    was = hashes("run-imported/checkpoints")
    shared = ("--cache", "cache-nf4", "--device", "cpu", "--set", "train.held_out=0.2")
    result = run_cli("train", *shared, "--run", "run-imported", "--fresh")
    assert_refused(result, 1, "holds an imported draft", "draft.init_from = run-imported")
    assert hashes("run-imported/checkpoints") == was


@pytest.mark.parametrize(
    "source",
    ["run-finished", "run-finished/checkpoints/step-000400", "run-imported", "export-hf", "export-vllm"],
)
def test_a_draft_starts_from_an_old_one(source: str) -> None:
    """One step at hardly any rate leaves the weights as they were."""
    shared = ("--cache", "cache-nf4", "--config", "from-run.toml", "--device", "cpu", "--run", "run-new")
    run_ok("train", *shared, "--set", f"draft.init_from={source}")
    folder = Path(source) / "latest" if source in ("run-finished", "run-imported") else Path(source)
    wanted = load_file(folder / "model.safetensors")
    found = load_file("run-new/latest/model.safetensors")
    assert {*wanted} - {*found} <= {"embed_tokens.weight", "lm_head.weight"}
    assert {*found} <= {*wanted}
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name].float(), rtol=0, atol=1e-6, msg=name)


def test_old_runs_are_compared() -> None:
    runs = ["run-finished", "run-imported", "run-killed"]
    rows = json.loads(run_ok("compare", *runs, "--format", "json"))
    assert [row["run"] for row in rows] == runs
    assert [row["step"] for row in rows] == [400, 0, 14]
    assert [row["complete"] for row in rows] == [True, True, False]
    assert [row["train.lr"] for row in rows] == [1e-2, 6e-4, 3e-3]
    for row, run in zip(rows, runs, strict=True):
        evaluation = read(f"{run}/latest/training.json")["progress"]["evaluation"]
        assert row["tau"] == (evaluation and evaluation["tau"])
    assert rows[0]["tau"] > 2


def test_an_old_sweep_is_complete() -> None:
    was = hashes("sweep")
    output = run_ok(*COMMANDS["sweep"])
    assert [line.partition(",")[0] for line in output.splitlines() if "complete" in line] == [
        "1/2 lr=1e-3: already complete",
        "2/2 lr=2e-3: already complete",
    ]
    assert hashes("sweep") == was
    rows = json.loads(run_ok("compare", "sweep", "--format", "json"))
    assert [(row["run"], row["train.lr"]) for row in rows] == [("lr=1e-3", 1e-3), ("lr=2e-3", 2e-3)]


def test_old_runs_are_reported() -> None:
    pytest.importorskip("matplotlib")
    run_ok("report", "run-finished", "--out", "one.html")
    run_ok("report", "run-finished", "run-killed", "sweep", "--out", "all.html")
    page = _text("one.html")
    names = ("evaluation", "calibration", "speculation")
    evaluation, calibration, speculation = (read(CHECKPOINT / f"{name}.json") for name in names)
    assert f"{evaluation['tau']:.3f}" in page
    assert f"{calibration['report']['after']['prefix']['ece']:.3f}" in page
    assert f"{speculation['runs'][0]['tokens_per_round']:.3f}" in page
    for command in (
        "evaluate",
        "calibrate",
        "speculate --target",
    ):  # what is missing is named with the one that makes it
        assert f"dspark {command}" not in page
    assert "dspark speculate --measure --target" in page  # which no version before this one measured
    page = _text("all.html")
    for run in ("run-finished", "run-killed", "lr=1e-3", "lr=2e-3"):
        assert run in page
    for command in ("evaluate", "calibrate", "speculate"):
        assert f"dspark {command}" in page


def _text(page: str) -> str:
    """Return the text of a page, without its drawings and styles."""
    content = Path(page).read_text(encoding="utf-8")
    content = re.sub(r"<(svg|style|script)\b.*?</\1>", " ", content, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", content))
