"""Drafts that start from another draft: a run's, or a released one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.exports import change_json
from tests.train.runs import lines_of, train_arguments, weights_of
from train.draft import DRAFTS

STILL = {"train__max_steps": 1, "train__lr": 1e-30}  # a run that leaves its first weights as they are


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=30, train__eval_every=10))
    return run


def released(folder: Path, run: Path, cache: Path, *, shards: int = 1, dtype=torch.bfloat16) -> Path:
    """A run's draft as DeepSpec releases one: bf16, embedding and head inside, in one file or several."""
    folder.mkdir()
    shutil.copy(run / "latest" / "config.json", folder)
    frozen = load_file(cache / "target" / "frozen.safetensors")
    weights = {**weights_of(run), "embed_tokens.weight": frozen["embed_tokens.weight"]}
    weights["lm_head.weight"] = frozen.get("lm_head.weight", frozen["embed_tokens.weight"])
    weights = {name: weight.to(dtype).clone() for name, weight in weights.items()}
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name] for name in names[number::shards]}, folder / file)
        index |= dict.fromkeys(names[number::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("source", ["run", "checkpoint", "released", "shards"])
def test_it_begins_with_those_weights(tmp_path: Path, cache_dir: Path, first: Path, source: str) -> None:
    place = {
        "run": lambda: first,
        "checkpoint": lambda: first / "latest",
        "released": lambda: released(tmp_path / "released", first, cache_dir),
        "shards": lambda: released(tmp_path / "released", first, cache_dir, shards=3),
    }[source]()
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, **STILL, draft__init_from=place))
    wanted = weights_of(first, "best" if source == "run" else "latest")
    for name, weight in weights_of(run).items():
        rounded = wanted[name].bfloat16().float() if source in ("released", "shards") else wanted[name]
        assert torch.equal(weight, rounded), name


def test_a_draft_goes_on_with_a_window(tmp_path: Path, cache_dir: Path, first: Path) -> None:
    """A window is no part of what weights mean: a draft for long contexts may begin with one without."""
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, **STILL, draft__init_from=first, draft__sliding_window=5))
    config = json.loads((run / "latest" / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"]) == (["sliding_attention"], 5)
    wanted = weights_of(first, "best")
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights_of(run).items())
    assert lines_of(run)[-1]["held_out"]["tau"] != lines_of(first)[-1]["held_out"]["tau"]
    assert "init_from" in (run / "config.toml").read_text()


def test_embedding_and_head_stay_the_caches(tmp_path: Path, cache_dir: Path, first: Path) -> None:
    """Whatever a released draft brings: another head would be another target's."""
    folder = released(tmp_path / "released", first, cache_dir, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors")
    taus = []
    for source in (folder, first / "latest"):
        run = tmp_path / f"run{len(taus)}"
        run_ok(*train_arguments(cache_dir, run, **STILL, draft__init_from=source))
        taus.append(lines_of(run)[-1]["held_out"]["tau"])
    assert taus[0] == taus[1]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"draft__target_layer_ids": "[0,2]"}, ["target_layer_ids: [0, 2] here, [0, 2, 4] there"]),
        ({"draft__num_layers": 2}, ["num_hidden_layers: 2 here, 1 there"]),
        ({"draft__markov_head": "rnn"}, ["markov_head_type: rnn here, vanilla there"]),
        ({"draft__mask_token_id": 3}, ["mask_token_id: 3 here, 320 there", "set [draft] as there"]),
        ({"draft__init": "ridge"}, ["init_from", "set only one of them"]),
    ],
)
def test_another_kind_of_draft_is_refused(
    tmp_path: Path, cache_dir: Path, first: Path, settings: dict, parts: list[str]
) -> None:
    result = run_cli(*train_arguments(cache_dir, tmp_path / "r", draft__init_from=first, **settings))
    assert_refused(result, 2 if "draft__init" in settings else 1, *parts)
    assert not (tmp_path / "r").exists()


def test_another_block_size_may_start_from_it(tmp_path: Path, cache_dir: Path, first: Path) -> None:
    """No weight's meaning depends on it."""
    run_ok(*train_arguments(cache_dir, tmp_path / "r", **STILL, draft__init_from=first, draft__block_size=5))


@pytest.mark.parametrize(
    ("breakage", "parts"),
    [
        ("config", ["config.json can't be read"]),
        ("other", ["is not a DSpark draft", "target_layer_ids"]),
        ("weights", ["can't be read"]),
        ("gone", ["can't be read"]),
        ("lacks", ["lacks fc.weight", "another kind of draft"]),
        ("extra", ["has surprise", "another kind of draft"]),
        ("shape", ["fc.weight", "is of shape [3]"]),
    ],
)
def test_a_broken_draft_is_one_line(
    tmp_path: Path, cache_dir: Path, first: Path, breakage: str, parts: list[str]
) -> None:
    folder = released(tmp_path / "released", first, cache_dir)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if breakage == "config":
        (folder / "config.json").write_text("{")
    elif breakage == "other":
        (folder / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 32}')
    elif breakage == "weights":
        file.write_bytes(file.read_bytes()[:100])
    elif breakage == "gone":
        file.unlink()
    elif breakage == "lacks":
        save_file({k: v for k, v in weights.items() if k != "fc.weight"}, file)
    elif breakage == "extra":
        save_file({**weights, "surprise": torch.zeros(1)}, file)
    else:
        save_file({**weights, "fc.weight": torch.zeros(3)}, file)
    arguments = train_arguments(cache_dir, tmp_path / "r", **STILL, draft__init_from=folder)
    assert_refused(run_cli(*arguments), 1, *parts)
    assert not (tmp_path / "r" / "checkpoints").exists()


SMALL_KINDS = {
    "dspark": {"draft__markov_rank": None, "draft__markov_head": "none", "draft__confidence_head": "false"},
    "dflash": {"draft__markov_rank": None},
    "eagle3": {
        **dict.fromkeys(("draft__markov_rank", "draft__block_size", "draft__num_layers")),
        "draft__ttt_steps": 2,
    },
}


@pytest.fixture(scope="module")
def of_every_kind(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of each kind with a smaller vocabulary, and its export. DSpark's has the weights of DFlash's."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, own in SMALL_KINDS.items():
        settings = {**own, "draft__kind": kind, "draft__draft_vocab_size": 40}
        run_ok(*train_arguments(cache_dir, folder / kind, train__max_steps=1, **settings))
        export = folder / f"{kind}-export"
        run_ok("export", folder / kind, export, "--to", "hf", "--with-embeddings", "--cache", cache_dir)
    return folder


def start_from(source: Path, run: Path, cache: Path, kind: str):
    settings = {**SMALL_KINDS[kind], "draft__kind": kind, "draft__draft_vocab_size": 40}
    return run_cli(*train_arguments(cache, run, **{**STILL, **settings, "draft__init_from": source}))


def test_a_draft_of_another_kind_is_refused_by_name(
    tmp_path: Path, cache_dir: Path, of_every_kind: Path
) -> None:
    """Also where its weights have the same names and shapes."""
    for theirs in SMALL_KINDS:
        for ours in SMALL_KINDS.keys() - {theirs}:
            for source in (theirs, f"{theirs}-export"):
                result = start_from(of_every_kind / source, tmp_path / "r", cache_dir, ours)
                titles = (DRAFTS[kind].title for kind in (theirs, ours))
                assert_refused(result, 1, "draft.init_from", "a draft of kind {}, not {}".format(*titles))
                assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", list(SMALL_KINDS))
def test_a_released_draft_as_other_trainers_write_it(
    tmp_path: Path, cache_dir: Path, of_every_kind: Path, kind: str
) -> None:
    """Without t2d, which says no more than d2t; EAGLE-3's layer by its other name."""
    folder = tmp_path / "released"
    shutil.copytree(of_every_kind / f"{kind}-export", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["t2d"]
    if kind == "eagle3":
        weights = {name.replace("midlayer.", "model.layers.0."): each for name, each in weights.items()}
    save_file(weights, folder / "model.safetensors")
    result = start_from(folder, tmp_path / "r", cache_dir, kind)
    assert result.exit_code == 0, result.output
    wanted = weights_of(of_every_kind / kind)
    for name, weight in weights_of(tmp_path / "r").items():
        whole = name in ("d2t", "t2d")
        assert torch.equal(weight, wanted[name] if whole else wanted[name].bfloat16().float()), name


@pytest.mark.parametrize("kind", list(SMALL_KINDS))
@pytest.mark.parametrize("change", [1000, -1000, "twice"])
def test_a_vocabulary_that_is_none_is_refused(
    tmp_path: Path, cache_dir: Path, of_every_kind: Path, kind: str, change: int | str
) -> None:
    folder = tmp_path / "released"
    shutil.copytree(of_every_kind / f"{kind}-export", folder)
    weights = load_file(folder / "model.safetensors")
    weights["d2t"] = -torch.arange(40) if change == "twice" else weights["d2t"] + change
    save_file(weights, folder / "model.safetensors")
    result = start_from(folder, tmp_path / "r", cache_dir, kind)
    assert_refused(result, 1, "draft.init_from", "d2t does not name 40 different tokens below 325")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dspark", {"sample_from_anchor": False}),
        ("dflash", {"is_causal": True}),
        ("eagle3", {"norm_before_residual": True}),
    ],
)
def test_a_released_draft_that_means_something_else_is_refused(
    tmp_path: Path, cache_dir: Path, of_every_kind: Path, kind: str, fields: dict
) -> None:
    """As `dspark import` refuses it: the weights alone would fit."""
    folder = tmp_path / "released"
    shutil.copytree(of_every_kind / f"{kind}-export", folder)
    change_json(folder / "config.json", **fields)
    result = start_from(folder, tmp_path / "r", cache_dir, kind)
    assert_refused(result, 1, "draft.init_from", *fields)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("kind", list(SMALL_KINDS))
@pytest.mark.parametrize("size", [None, -1, True, "x", 10**19])
def test_a_vocabulary_that_a_config_does_not_say_is_one_line(
    tmp_path: Path, cache_dir: Path, of_every_kind: Path, kind: str, size: object
) -> None:
    folder = tmp_path / "released"
    shutil.copytree(of_every_kind / f"{kind}-export", folder)
    change_json(folder / "config.json", vocab_size=size)
    run = ("--run", tmp_path / "run", "--set", "train.held_out=0.2")
    result = run_cli("import", folder, "--cache", cache_dir, *run)
    assert_refused(result, 1, "dspark import", "vocab_size")
