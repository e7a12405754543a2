"""`dspark compare`: handmade runs, and the tables that one would write down for them."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.cache import DataIdentity, FeatureIdentity, Identity, TargetIdentity, TokenizerIdentity
from tests.conftest import assert_refused, run_cli, run_ok
from train.experiments.compare import parameter_count
from train.runs.state import Progress

NF4 = Identity(
    target=TargetIdentity(
        name="tiny",
        weights="ab" * 32,
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden_size=32,
        num_layers=6,
        vocab_size=325,
        dtype="float32",
        tied_embeddings=False,
        embedding_scale=1.0,
        logit_scale=1.0,
        final_logit_softcapping=None,
    ),
    tokenizer=TokenizerIdentity(
        sha256="cd" * 32,
        chat_template_sha256="ef" * 32,
        length=320,
        mask_token_id=None,
        unk_token_id=0,
        pad_token_id=None,
    ),
    data=DataIdentity(sources=("chats.jsonl",), sha256="01" * 32, settings={"max_length": "512"}),
    features=FeatureIdentity(layer_ids=(0, 2, 4), context_codec="nf4", last_codec="int8"),
    shard_tokens=512,
    batch_tokens=256,
)
INT8 = dataclasses.replace(NF4, features=dataclasses.replace(NF4.features, context_codec="int8"))


def evaluation(step: int, tau: float, *accept: float) -> dict:
    return {
        "step": step,
        "samples": 10,
        "blocks": 100,
        "loss": 0.75,
        "ce_loss": 2.5,
        "l1_loss": 0.5,
        "confidence_loss": 0.0625,
        "accept_rate": 0.25,
        "accept_by_position": list(accept),
        "tau": tau,
    }


def make_run(run: Path, config: str, cache: Identity | None = NF4, **progress) -> Path:
    """A run's directory; without `progress` it has no checkpoint yet."""
    run.mkdir(parents=True)
    (run / "config.toml").write_text(config)
    if cache is not None:
        (run / "run.json").write_text(json.dumps({"version": {}, "cache": dataclasses.asdict(cache)}))
    if progress:
        folder = run / "checkpoints" / f"step-{progress['step']:06d}"
        folder.mkdir(parents=True)
        values = {"total_steps": 700, "parameters": 1_234_567, "complete": True, **progress}
        identity = dataclasses.asdict(cache or NF4)
        about = {"config": {}, "cache": identity, "version": {}, "machine": {}}
        page = {"progress": dataclasses.asdict(Progress(**values)), **about}
        (folder / "training.json").write_text(json.dumps(page))
        (run / "latest").symlink_to(folder.relative_to(run))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three: done, done with an evaluation before that was better, and at work."""
    make_run(
        tmp_path / "a",
        '[draft]\nnum_layers = 1\nmarkov_head = "vanilla"\ntarget_layer_ids = [0, 2]\n',
        step=700,
        evaluation=evaluation(700, 1.5, 0.5, 0.25),
        best={"step": 700, "tau": 1.5},
        seconds=130.0,
        tokens=650_000,
    )
    make_run(
        tmp_path / "b",
        '[draft]\nnum_layers = 2\nmarkov_head = "rnn"\ntarget_layer_ids = [0, 2]\n'
        '[loss]\ndecay_gamma = "none"\n',
        step=700,
        evaluation=evaluation(700, 1.625, 0.625, 0.375, 0.125),
        best={"step": 350, "tau": 1.75},
        parameters=45_600,
        seconds=7500.0,
        tokens=75_000,
    )
    make_run(tmp_path / "c", "[draft]\nnum_layers = 3\ntarget_layer_ids = [0, 2]\n", step=35, complete=False)
    return tmp_path


# Written by hand. Every line ends where its last column does, hence no trailing spaces.
TEXT = """\
run  draft.num_layers  draft.markov_head  loss.decay_gamma  K    step    tau       best tau  acceptance by position    loss      ce      l1  confidence  parameters        time  tokens/s
a                   1  vanilla            4.0               2     700  1.500                 0.50 0.25               0.7500  2.5000  0.5000      0.0625       1.23M  2 min 10 s     5,000
b                   2  rnn                none              3     700  1.625*  1.750 at 350  0.62 0.38 0.12          0.7500  2.5000  0.5000      0.0625       45.6k  2 h 05 min        10
c                   3  vanilla            4.0                  35/700                                                                                         1.23M         0 s
* the best held-out tau
"""  # noqa: E501


def test_text(runs: Path) -> None:
    assert run_ok("compare", runs / "a", runs / "b", runs / "c") == TEXT


def test_csv(runs: Path) -> None:
    text = run_ok("compare", runs / "b", runs / "c", "--format", "csv")
    assert text == (
        "run,draft.num_layers,draft.markov_head,loss.decay_gamma,step,total_steps,complete,slots,tau,accept_1,accept_2,"
        "accept_3,loss,ce_loss,l1_loss,confidence_loss,best_tau,best_step,parameters,seconds,tokens_per_s\n"
        "b,2,rnn,none,700,700,true,3,1.625,0.625,0.375,0.125,0.75,2.5,0.5,0.0625,1.75,350,45600,7500.0,10.0\n"
        "c,3,vanilla,4.0,35,700,false,,,,,,,,,,,,1234567,0.0,\n"
    )
    assert [len(line) for line in csv.reader(text.splitlines())] == [21, 21, 21]


def test_json(runs: Path) -> None:
    b, a = json.loads(run_ok("compare", runs / "b", runs / "a", "--format", "json"))  # as they are given
    assert b == {
        "run": "b",
        "draft.num_layers": 2,
        "draft.markov_head": "rnn",
        "loss.decay_gamma": "none",
        "step": 700,
        "total_steps": 700,
        "complete": True,
        "slots": 3,
        "tau": 1.625,
        "accept_by_position": [0.625, 0.375, 0.125],
        "loss": 0.75,
        "ce_loss": 2.5,
        "l1_loss": 0.5,
        "confidence_loss": 0.0625,
        "best_tau": 1.75,
        "best_step": 350,
        "parameters": 45_600,
        "seconds": 7500.0,
        "tokens_per_s": 10.0,
    }
    assert (a["best_tau"], a["best_step"], a["tokens_per_s"]) == (None, None, 5000.0)


def test_a_run_that_has_only_begun_has_blanks(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "")
    (row,) = json.loads(run_ok("compare", tmp_path / "a", "--format", "json"))
    assert row.pop("run") == "a"
    assert row.pop("complete") is False
    assert set(row.values()) == {None}
    header, line = run_ok("compare", tmp_path / "a").splitlines()
    assert line == "a"
    assert header.split()[:3] == ["run", "step", "tau"]  # no setting can differ, no best evaluation
    assert run_ok("compare", tmp_path / "a", "--format", "csv").splitlines()[1].replace(",", "") == "afalse"


def test_a_folder_stands_for_its_runs_by_name(tmp_path: Path) -> None:
    for name in ("x/b", "x/a", "y"):
        make_run(tmp_path / name, "")
    (tmp_path / "x" / "a.log").write_text("")
    (tmp_path / "x" / "notes").mkdir()
    rows = json.loads(run_ok("compare", tmp_path / "y", tmp_path / "x", "--format", "json"))
    assert [row["run"] for row in rows] == ["y", "a", "b"]
    (tmp_path / "link").symlink_to("x/b")
    again = json.loads(run_ok("compare", tmp_path / "link", tmp_path / "x", "--format", "json"))
    assert [row["run"] for row in again] == ["link", "a"]  # each once


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    names = ("one/x/a", "one/y/a", "two/x/a", "two/b")
    for name in names:
        make_run(tmp_path / name, "")
    rows = json.loads(run_ok("compare", *(tmp_path / name for name in names), "--format", "json"))
    assert [row["run"] for row in rows] == ["one/x/a", "y/a", "two/x/a", "b"]


def test_what_differs_between_caches_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "", NF4)
    make_run(tmp_path / "b", "", INT8)
    make_run(tmp_path / "old", "", None)  # which has no opinion about its cache
    rows = json.loads(run_ok("compare", tmp_path, "--format", "json"))
    differing = [{k: v for k, v in row.items() if "." in k} for row in rows]
    key = "cache.features.context_codec"
    assert differing == [{key: "nf4"}, {key: "int8"}, {key: None}]
    assert "cache" not in run_ok("compare", tmp_path / "a", tmp_path / "old")
    other = dataclasses.replace(NF4.target, weights="12" * 32)
    make_run(tmp_path / "c", "", dataclasses.replace(NF4, target=other))
    lines = run_ok("compare", tmp_path / "a", tmp_path / "c").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["run", "cache.target.weights"],
        ["a", "abababababab"],
        ["c", "121212121212"],
    ]


def test_ties_share_the_star_and_a_run_alone_has_none(tmp_path: Path) -> None:
    for name, tau in (("a", float("nan")), ("b", 1.25), ("c", 1.5), ("d", 1.5)):
        make_run(tmp_path / name, "", step=700, evaluation=evaluation(700, tau, 0.5))
    taus = [line.split()[2] for line in run_ok("compare", tmp_path).splitlines()[1:5]]
    assert taus == ["nan", "1.250", "1.500*", "1.500*"]
    assert "*" not in run_ok("compare", tmp_path / "c")
    (row,) = json.loads(run_ok("compare", tmp_path / "a", "--format", "json"), parse_constant=pytest.fail)
    assert row["tau"] is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1k"), (45_600, "45.6k"), (999_499, "999k"), (999_500, "1M"), (1_234_567, "1.23M")],
)
def test_counts_for_people(count: int, text: str) -> None:
    assert parameter_count(count) == text


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "runs" / "a", "", step=700)
    for path in (tmp_path / "no", tmp_path / "empty", run / "config.toml"):
        assert_refused(run_cli("compare", run, path), 1, f"no run at {path}", "dspark train")
    assert_refused(run_cli("compare"), 2, "RUN")
    assert_refused(run_cli("compare", run, "--format", "xml"), 2, "xml")
    (run / "latest" / "training.json").write_text("{")
    assert_refused(run_cli("compare", run), 1, "damaged")
    (run / "run.json").write_text("[]")
    assert_refused(run_cli("compare", run), 1, "run.json")


FLASH = """\
[draft]
kind = "dflash"
num_layers = 1
block_size = 4
target_layer_ids = [0, 2]
"""


def test_kinds_of_draft_have_other_settings_and_terms(tmp_path: Path) -> None:
    """A setting or term that one kind lacks is a dash, a term that none has is no column."""
    spark, flash = evaluation(700, 1.5, 0.5, 0.25), evaluation(700, 1.25, 0.25, 0.125, 0.0625)
    del flash["confidence_loss"]
    flash["soft_ce_loss"] = 3.5
    make_run(
        tmp_path / "a", "[draft]\nnum_layers = 1\ntarget_layer_ids = [0, 2]\n", step=700, evaluation=spark
    )
    make_run(tmp_path / "b", FLASH, step=700, evaluation=flash)
    make_run(tmp_path / "c", FLASH, step=7, complete=False)
    rows = json.loads(run_ok("compare", tmp_path, "--format", "json"))
    assert [row["draft.kind"] for row in rows] == ["dspark", "dflash", "dflash"]
    assert [row["slots"] for row in rows] == [2, 3, None]
    assert [row["draft.markov_head"] for row in rows] == ["vanilla", None, None]
    assert [row["loss.slot_weights"] for row in rows] == [None, "decay", "decay"]
    assert [row["confidence_loss"] for row in rows] == [0.0625, None, None]
    assert [row["soft_ce_loss"] for row in rows] == [None, 3.5, None]
    head, *lines = (line.split("  ") for line in run_ok("compare", tmp_path).splitlines()[:4])
    cells = [dict(zip(filter(None, head), filter(None, line), strict=False)) for line in lines]
    shown = [{key.strip(): value.strip() for key, value in row.items()} for row in cells]
    assert [row["draft.markov_head"] for row in shown] == ["vanilla", "-", "-"]
    assert [row["loss.slot_weights"] for row in shown] == ["-", "decay", "decay"]
    a, b = shown[:2]
    assert (a["K"], a["confidence"], a["soft_ce"]) == ("2", "0.0625", "-")
    assert (b["K"], b["confidence"], b["soft_ce"]) == ("3", "-", "3.5000")
    one = run_ok("compare", tmp_path / "b", tmp_path / "c")
    assert "confidence" not in one  # neither has that term
    assert "  K  " not in one
    first, second, _ = csv.reader(
        run_ok("compare", tmp_path / "a", tmp_path / "b", "--format", "csv").splitlines()
    )
    assert dict(zip(first, second, strict=True))["accept_3"] == ""
