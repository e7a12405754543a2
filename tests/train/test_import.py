"""`dspark import`: a released draft becomes a run, and comes out again as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_target
from tests.train.exports import change_json, contents
from tests.train.runs import progress_of, train_arguments, weights_of

# As the run that was exported is measured.
SETTINGS = {"train.held_out": 0.2, "train.precision": "fp32", "train.batch_tokens": 256}
AS_THAT_RUN = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "trained"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=3))
    return run


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """That run's draft in fp32. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("released") / "draft"
    run_ok("export", run_dir, folder, "--to", "hf", "--dtype", "float32")
    return folder


def import_arguments(folder: Path, cache: Path, run: Path, *more: str | Path) -> list[str | Path]:
    return ["import", folder, "--cache", cache, "--run", run, *AS_THAT_RUN, *more]


def figures(cache: Path, run: Path) -> dict:
    result = json.loads(run_ok("evaluate", "--cache", cache, "--run", run, "--json", "--device", "cpu"))
    return {name: value for name, value in result.items() if name != "step"}


def test_there_and_back(tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path) -> None:
    """The same weights bit for bit, the same figures, and the same export."""
    run = tmp_path / "run"
    assert str(run) in run_ok(*import_arguments(released, cache_dir, run))
    assert {path.name for path in run.iterdir()} == {"config.toml", "run.json", "checkpoints", "latest"}
    got, wanted = weights_of(run), weights_of(run_dir)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert figures(cache_dir, run) == figures(cache_dir, run_dir)
    run_ok("export", run, tmp_path / "again", "--to", "hf", "--dtype", "float32")
    assert contents(tmp_path / "again") == contents(released)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "imported from `draft`" in card
    assert "An imported draft may have learned from these samples." in card


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_every_head_comes_back(tmp_path: Path, cache_dir: Path, head: str) -> None:
    """In bf16, rounded once: what is exported of the import is the first export."""
    settings = {"draft__markov_head": head, "draft__num_layers": 2, "draft__target_layer_ids": "[0,4]"}
    if head == "none":
        settings["draft__confidence_with_markov"] = "false"
    trained, run = tmp_path / "trained", tmp_path / "run"
    run_ok(*train_arguments(cache_dir, trained, train__max_steps=3, **settings))
    run_ok("export", trained, tmp_path / "first", "--to", "hf")
    run_ok(*import_arguments(tmp_path / "first", cache_dir, run))
    got = weights_of(run)
    for name, weight in weights_of(trained).items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], weight.bfloat16().float()), name
    run_ok("export", run, tmp_path / "second", "--to", "hf")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    run_ok("evaluate", "--cache", cache_dir, "--run", run)


def test_the_settings_say_what_the_draft_is(tmp_path: Path, cache_dir: Path, run_dir: Path, released) -> None:
    run_ok(*import_arguments(released, cache_dir, tmp_path / "run"))

    def table(run: Path) -> str:
        return (run / "config.toml").read_text().split("[loss]")[0]

    assert table(tmp_path / "run") == table(run_dir)
    assert "anchors_per_batch = 64\n" in (tmp_path / "run" / "config.toml").read_text()
    page = json.loads((tmp_path / "run" / "latest" / "training.json").read_text())
    assert page["imported"] == {"name": "draft"}
    assert page["cache"] == json.loads((run_dir / "latest" / "training.json").read_text())["cache"]


def test_training_an_imported_run_changes_nothing(tmp_path: Path, cache_dir: Path, released: Path) -> None:
    run = tmp_path / "run"
    run_ok(*import_arguments(released, cache_dir, run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = ["train", "--cache", cache_dir, "--run", run, "--device", "cpu"]
    assert "nothing is left to train" in run_ok(*arguments, "--config", run / "config.toml")
    other = run_cli(*train_arguments(cache_dir, run))
    assert_refused(other, 1, "is a run of other settings", "--fresh")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert progress_of(run)["complete"]


def test_other_commands_take_it(tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path) -> None:
    run = tmp_path / "run"
    run_ok(*import_arguments(released, cache_dir, run))
    assert "run" in run_ok("compare", run, run_dir)
    still = {"train__max_steps": 1, "train__lr": 1e-30}
    run_ok(*train_arguments(cache_dir, tmp_path / "next", **still, draft__init_from=run))
    got, wanted = weights_of(tmp_path / "next"), weights_of(run)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    run_ok("export", run, tmp_path / "out", "--to", "vllm")


def test_several_files_with_an_index(tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path) -> None:
    weights, folder, index = load_file(released / "model.safetensors"), tmp_path / "parts", {}
    folder.mkdir()
    shutil.copy(released / "config.json", folder)
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        names = sorted(weights)[number::3]
        save_file({name: weights[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run_ok(*import_arguments(folder, cache_dir, tmp_path / "run"))
    got = weights_of(tmp_path / "run")
    assert all(torch.equal(got[name], weight) for name, weight in weights_of(run_dir).items())


def copied(released: Path, folder: Path, **fields) -> Path:
    """A released draft whose config says something else; None takes a field away."""
    shutil.copytree(released, folder)
    change_json(folder / "config.json", **fields)
    return folder


def test_what_a_config_leaves_out_is_what_engines_take(
    tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path
) -> None:
    """Rotary settings of transformers 4; the confidence head by its weights, where engines differ."""
    absent = ["rope_parameters", "num_anchors", "markov_head_type", "enable_confidence_head", "dtype"]
    absent += ["confidence_head_with_markov", "layer_types", "sample_from_anchor", "dspark_bonus_anchor"]
    absent += ["num_target_layers", "architectures", "block_size"]
    folder = copied(released, tmp_path / "draft", **dict.fromkeys(absent))
    run_ok(*import_arguments(folder, cache_dir, tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    theirs = json.loads((run_dir / "latest" / "config.json").read_text())
    assert config == {**theirs, "block_size": 7, "num_anchors": 512}
    got = weights_of(tmp_path / "run")
    assert all(torch.equal(got[name], weight) for name, weight in weights_of(run_dir).items())


@pytest.mark.parametrize("kind", ["same", "rounded", "other"])
def test_embedding_and_head_are_the_caches(
    tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path, kind: str
) -> None:
    folder = tmp_path / "draft"
    dtype = "bfloat16" if kind == "rounded" else "float32"
    embeddings = ["--with-embeddings", "--cache", cache_dir, "--dtype", dtype]
    run_ok("export", run_dir, folder, "--to", "hf", *embeddings)
    if kind == "other":
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][0, 0] += 1
        save_file(weights, folder / "model.safetensors")
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == (kind == "other")
    assert all("lm_head.weight" in line and "the run uses the cache's" in line for line in said)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(weights_of(tmp_path / "run"))


def test_a_target_that_scales_its_embeddings(tmp_path: Path, data_file: Path) -> None:
    """vLLM gets them scaled; back here, that copy is nothing to warn of."""
    cache, run, out = tmp_path / "cache", tmp_path / "run", tmp_path / "out"
    run_ok(*capture_arguments(make_target(tmp_path / "target", "gemma"), data_file, cache))
    run_ok(*train_arguments(cache, run, train__max_steps=3))
    assert_refused(run_cli("export", run, out, "--to", "vllm"), 2, "embedding_scale is 5.65")
    run_ok("export", run, out, "--to", "vllm", "--with-embeddings", "--cache", cache)
    run_ok("export", run, tmp_path / "hf", "--to", "hf")
    for folder in (out, tmp_path / "hf"):
        back = tmp_path / f"back-{folder.name}"
        assert "warning" not in run_cli(*import_arguments(folder, cache, back)).output
        config = json.loads((back / "latest" / "config.json").read_text())
        assert config["embedding_scale"] == pytest.approx(32**0.5, rel=1e-2)
        assert all(
            torch.equal(weights_of(back)[name], weight.bfloat16().float())
            for name, weight in weights_of(run).items()
        )


@pytest.mark.parametrize(
    ("fields", "code", "parts"),
    [
        ({"target_layer_ids": None}, 1, ["is no DSpark draft", "target_layer_ids"]),
        ({"mask_token_id": None}, 1, ["is no DSpark draft", "mask_token_id"]),
        ({"target_layer_ids": [0, 2, 3]}, 1, ["holds layers [0, 2, 4]", "asks for 3"]),
        ({"target_layer_ids": [4, 2, 0]}, 2, ["target_layer_ids must be strictly increasing"]),
        ({"target_layer_ids": "all"}, 2, ["config.json.draft.target_layer_ids"]),
        ({"target_layer_ids": []}, 2, ["at least one layer"]),
        ({"target_layer_ids": [0, 2]}, 1, ["fc.weight", "is of shape [32, 96], here of [32, 64]"]),
        ({"mask_token_id": 325}, 2, ["mask_token_id 325 is outside the vocabulary"]),
        ({"mask_token_id": "320"}, 2, ["config.json.draft.mask_token_id"]),
        (
            {"vocab_size": 999},
            1,
            ["another target than tiny-llama", "vocab_size: 999 there, 325 in the cache"],
        ),
        ({"hidden_size": 64}, 1, ["hidden_size: 64 there, 32 in the cache", "--cache of its own target"]),
        ({"num_target_layers": 7}, 1, ["num_target_layers: 7 there, 6 in the cache"]),
        ({"block_size": 0}, 2, ["block_size must be at least 1"]),
        ({"markov_head_type": "other"}, 2, ["markov_head"]),
        ({"markov_rank": 4}, 1, ["markov_head.markov_w1.weight", "is of shape"]),
        ({"markov_rank": "many"}, 1, ["can't be read"]),
        ({"markov_rank": None}, 1, ["has markov_head.markov_w1.weight", "another kind of draft"]),
        ({"enable_confidence_head": False}, 1, ["has confidence_head.proj.bias", "another kind of draft"]),
        ({"num_hidden_layers": 2, "layer_types": None}, 1, ["lacks layers.1", "another kind of draft"]),
        ({"num_hidden_layers": "one"}, 1, ["can't be read"]),
        ({"layer_types": ["sliding_attention"]}, 1, ["layer_types"]),
        ({"rms_norm_eps": 1e-5}, 1, ["rms_norm_eps: 1e-05 there, 1e-06 here", "from the target"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            1,
            ["rope_parameters", "500000.0"],
        ),
        ({"logit_scale": 0.5}, 1, ["logit_scale: 0.5 there, 1.0 here"]),
        ({"draft_vocab_size": 100}, 1, ["draft_vocab_size: 100 there, 325 here"]),
        ({"model_type": "gemma4"}, 1, ["model_type = 'gemma4'", "another kind of draft"]),
        ({"sample_from_anchor": False}, 1, ["sample_from_anchor = False", "another kind of draft"]),
        ({"dspark_bonus_anchor": True}, 1, ["dspark_bonus_anchor = True"]),
    ],
    ids=str,
)
def test_a_draft_that_no_run_can_have_is_one_line(
    tmp_path: Path, cache_dir: Path, released: Path, fields: dict, code: int, parts: list[str]
) -> None:
    folder = copied(released, tmp_path / "draft", **fields)
    assert_refused(run_cli(*import_arguments(folder, cache_dir, tmp_path / "run")), code, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


@pytest.mark.parametrize(
    ("breakage", "parts"),
    [
        ("missing", ["no draft at"]),
        ("json", ["config.json can't be read"]),
        ("list", ["config.json can't be read", "no object"]),
        ("gone", ["can't be read"]),
        ("cut", ["can't be read"]),
        ("lacks", ["lacks fc.weight"]),
        ("extra", ["has surprise"]),
        ("shape", ["fc.weight", "is of shape [3]"]),
        ("index", ["'../model.safetensors'"]),
    ],
)
def test_a_broken_directory_is_one_line(
    tmp_path: Path, cache_dir: Path, released: Path, breakage: str, parts: list[str]
) -> None:
    folder = copied(released, tmp_path / "draft")
    file, config = folder / "model.safetensors", folder / "config.json"
    weights = load_file(file)
    if breakage == "missing":
        shutil.rmtree(folder)
    elif breakage in ("json", "list"):
        config.write_text("{" if breakage == "json" else "[]")
    elif breakage == "gone":
        file.unlink()
    elif breakage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif breakage == "lacks":
        save_file({k: v for k, v in weights.items() if k != "fc.weight"}, file)
    elif breakage == "extra":
        save_file({**weights, "surprise": torch.zeros(1)}, file)
    elif breakage == "shape":
        save_file({**weights, "fc.weight": torch.zeros(3)}, file)
    else:
        index = {"weight_map": {"fc.weight": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert_refused(result, 1, "dspark import: ", *parts)
    assert not (tmp_path / "run").exists()


def test_the_wrong_cache(tmp_path: Path, data_file: Path, released: Path) -> None:
    assert_refused(run_cli(*import_arguments(released, tmp_path / "no", tmp_path / "run")), 1, "no cache at")
    target = make_target(tmp_path / "wide", hidden_size=64)
    run_ok(*capture_arguments(target, data_file, tmp_path / "cache"))
    result = run_cli(*import_arguments(released, tmp_path / "cache", tmp_path / "run"))
    assert_refused(
        result, 1, "is a draft for another target than wide", "hidden_size: 32 there, 64 in the cache"
    )
    assert not (tmp_path / "run").exists()


def test_settings(tmp_path: Path, cache_dir: Path, released: Path) -> None:
    run = tmp_path / "run"
    draft = run_cli(*import_arguments(released, cache_dir, run, "--set", "draft.block_size=4"))
    assert_refused(draft, 2, "set only [loss] and [train]")
    typo = run_cli(*import_arguments(released, cache_dir, run, "--set", "train.held_uot=0.1"))
    assert_refused(typo, 2, "held_out")
    assert not run.exists()


def test_a_directory_that_is_taken_and_a_disk_that_is_full(
    tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path, monkeypatch
) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    taken = run_cli(*import_arguments(released, cache_dir, run_dir))
    assert_refused(taken, 2, "is not empty", "choose another")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.save_file", full)
        result = run_cli(*import_arguments(released, cache_dir, tmp_path / "run"))
    assert_refused(result, 1, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    run_ok(*import_arguments(released, cache_dir, tmp_path / "run"))
