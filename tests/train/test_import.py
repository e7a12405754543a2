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
from train.draft.dspark.markov import MARKOV_HEADS

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


@pytest.mark.parametrize("head", [*MARKOV_HEADS, "none"])
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
    assert_refused(other, 1, "is a run with other settings", f"another --run and set draft.init_from = {run}")
    assert "--fresh" not in other.output
    fresh = run_cli(*train_arguments(cache_dir, run), "--fresh")
    assert_refused(fresh, 1, "holds an imported draft", f"another --run and set draft.init_from = {run}")
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


WINDOW = {
    "layer_types": ["sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
    "is_causal": False,
}


def test_a_released_window_is_the_runs(tmp_path: Path, cache_dir: Path, released: Path) -> None:
    run_ok(*import_arguments(copied(released, tmp_path / "draft", **WINDOW), cache_dir, tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    assert (config["layer_types"], config["sliding_window"]) == (["sliding_attention"], 9)
    run_ok("export", tmp_path / "run", tmp_path / "out", "--to", "vllm")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: exported[name] for name in WINDOW} == WINDOW


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
    """No engine does it for a draft; our own class does, there and back."""
    cache, run, out = tmp_path / "cache", tmp_path / "run", tmp_path / "out"
    run_ok(*capture_arguments(make_target(tmp_path / "target", "gemma"), data_file, cache))
    run_ok(*train_arguments(cache, run, train__max_steps=3))
    embeddings = ["--with-embeddings", "--cache", cache]
    for engine in ("vllm", "sglang"):
        refused = run_cli("export", run, out, "--to", engine, *embeddings)
        assert_refused(refused, 2, "embedding_scale is 5.65", "export --to hf")
    run_ok("export", run, out, "--to", "hf", *embeddings)
    assert "warning" not in run_cli(*import_arguments(out, cache, tmp_path / "back")).output
    config = json.loads((tmp_path / "back" / "latest" / "config.json").read_text())
    assert config["embedding_scale"] == pytest.approx(32**0.5, rel=1e-2)
    got = weights_of(tmp_path / "back")
    assert all(torch.equal(got[name], w.bfloat16().float()) for name, w in weights_of(run).items())


def test_rotary_positions_that_a_config_does_not_name(
    tmp_path: Path, cache_dir: Path, released: Path
) -> None:
    absent = dict.fromkeys(("rope_parameters", "rope_theta", "rope_scaling"))
    folder = copied(released, tmp_path / "draft", **absent)
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "has no rope_parameters or rope_theta or rope_scaling: the run takes the target's" in line
    assert "10000.0" in line
    named = copied(released, tmp_path / "named", rope_parameters=None)
    assert "warning" not in run_cli(*import_arguments(named, cache_dir, tmp_path / "other")).output


def test_a_run_that_nothing_can_measure(tmp_path: Path, cache_dir: Path, released: Path) -> None:
    arguments = ["import", released, "--cache", cache_dir, "--run", tmp_path / "run"]
    result = run_cli(*arguments, "--set", "train.held_out=0.0001")
    assert_refused(
        result, 2, "leaves no sample held out of the cache's 40", "set the share with --set train.held_out="
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("anchors", "expected"), [(255, 255), (256, 512), (10**12, 512), (0, 512)])
def test_anchors_that_no_batch_has_room_for(
    tmp_path: Path, cache_dir: Path, released: Path, anchors: int, expected: int
) -> None:
    folder = copied(released, tmp_path / "draft", num_anchors=anchors)
    run_ok(*import_arguments(folder, cache_dir, tmp_path / "run"))
    config = (tmp_path / "run" / "config.toml").read_text()
    assert f"anchors_per_batch = {expected}\n" in config
    own = ["--set", "train.anchors_per_batch=9"]
    run_ok(*import_arguments(folder, cache_dir, tmp_path / "own", *own))
    assert "anchors_per_batch = 9\n" in (tmp_path / "own" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("spoilt", "part"),
    [
        (lambda weight: weight.fill_(float("nan")), "is not finite"),
        (lambda weight: weight.fill_(float("inf")), "is not finite"),
        (lambda weight: weight.double().fill_(1e300), "is not finite in float32"),
        (lambda weight: weight.to(torch.int8), "is int8, expected one of float64, float32, float16"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn, expected one of"),
    ],
    ids=["nan", "inf", "too large", "integers", "fp8"],
)
def test_weights_that_no_run_can_go_on_with(
    tmp_path: Path, cache_dir: Path, released: Path, spoilt, part: str
) -> None:
    folder = copied(released, tmp_path / "draft")
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"] = spoilt(weights["fc.weight"])
    save_file(weights, folder / "model.safetensors")
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert_refused(result, 1, "dspark import: fc.weight of", part)
    assert not (tmp_path / "run").exists()


def test_an_empty_directory_is_filled(tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o700)
    run_ok(*import_arguments(released, cache_dir, run))
    assert {path.name for path in run.iterdir()} == {"config.toml", "run.json", "checkpoints", "latest"}
    assert run.stat().st_mode & 0o777 == 0o700
    assert figures(cache_dir, run) == figures(cache_dir, run_dir)


@pytest.mark.parametrize("name", ["Qwen3DSparkModel", "DSparkDraftModel"])
def test_both_names_of_its_class(tmp_path: Path, cache_dir: Path, released: Path, name: str) -> None:
    folder = copied(released, tmp_path / "draft", architectures=[name])
    run_ok(*import_arguments(folder, cache_dir, tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "code", "parts"),
    [
        ({"target_layer_ids": None}, 1, ["is not a DSpark draft", "target_layer_ids"]),
        ({"mask_token_id": None}, 1, ["is not a DSpark draft", "mask_token_id"]),
        ({"target_layer_ids": [0, 2, 3]}, 1, ["holds layers [0, 2, 4]", "asks for 3"]),
        ({"target_layer_ids": [4, 2, 0]}, 2, ["target_layer_ids must be strictly increasing"]),
        ({"target_layer_ids": "all"}, 2, ["config.json.draft.target_layer_ids"]),
        ({"target_layer_ids": []}, 2, ["at least one layer"]),
        ({"target_layer_ids": [0, 2]}, 1, ["fc.weight", "is of shape [32, 96], expected [32, 64]"]),
        ({"mask_token_id": 325}, 2, ["mask_token_id must be in [0, 325), the vocabulary, got 325"]),
        ({"mask_token_id": "320"}, 2, ["config.json.draft.mask_token_id"]),
        (
            {"vocab_size": 999},
            1,
            ["another target than tiny-llama", "vocab_size: 999 there, 325 in the cache"],
        ),
        ({"hidden_size": 64}, 1, ["hidden_size: 64 there, 32 in the cache", "--cache of the draft's target"]),
        ({"num_target_layers": 7}, 1, ["num_target_layers: 7 there, 6 in the cache"]),
        ({"block_size": 0}, 2, ["block_size must be at least 1"]),
        ({"markov_head_type": "other"}, 2, ["markov_head"]),
        ({"markov_rank": 4}, 1, ["markov_head.markov_w1.weight", "is of shape"]),
        ({"markov_rank": "many"}, 1, ["can't be read"]),
        ({"markov_rank": None}, 1, ["has markov_head.markov_w1.weight", "another kind of draft"]),
        ({"enable_confidence_head": False}, 1, ["has confidence_head.proj.bias", "another kind of draft"]),
        ({"num_hidden_layers": 2, "layer_types": None}, 1, ["lacks layers.1", "another kind of draft"]),
        ({"num_hidden_layers": "one"}, 1, ["can't be read"]),
        ({"layer_types": ["sliding_attention"]}, 1, ["layer_types", "without is_causal = false"]),
        ({"layer_types": ["sliding_attention"], "is_causal": False}, 2, ["sliding_window is not set"]),
        ({**WINDOW, "sliding_window": 2}, 2, ["sliding_window must be at least block_size = 3, "]),
        ({"rms_norm_eps": 1e-5}, 1, ["rms_norm_eps: 1e-05 there, 1e-06 here", "from the target"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            1,
            ["rope_parameters", "500000.0"],
        ),
        (
            {
                "rope_parameters": None,
                "rope_theta": None,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            1,
            ["rope_parameters", "linear"],
        ),
        ({"dspark_block_size": 3}, 1, ["has dspark_block_size, which engines read instead of"]),
        ({"dspark_config": {}}, 1, ["has dspark_config, which engines"]),
        ({"dspark_target_layer_ids": [0, 2, 4]}, 1, ["has dspark_target_layer_ids"]),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, 1, ["has eagle_aux_hidden_state_layer_ids"]),
        ({"quantization_config": {"quant_method": "fp8"}}, 1, ["quantization_config", "unquantized weights"]),
        ({"architectures": ["Gemma4DSparkModel"]}, 1, ["'Gemma4DSparkModel'", "Qwen3DSparkModel or DSpark"]),
        ({"architectures": []}, 1, ["architectures = []", "another kind of draft"]),
        ({"logit_scale": 0.5}, 1, ["logit_scale: 0.5 there, 1.0 here"]),
        ({"draft_vocab_size": 100}, 1, ["lacks d2t"]),
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
        ("list", ["config.json can't be read", "expected a JSON object"]),
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
        patch.setattr("train.runs.checkpoint.save_file", full)
        result = run_cli(*import_arguments(released, cache_dir, tmp_path / "run"))
    assert_refused(result, 1, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    run_ok(*import_arguments(released, cache_dir, tmp_path / "run"))
