"""`dspark export --to speculators` and back: the library's config.json, the same weights and settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.exports import KINDS, change_json, contents, trained
from tests.train.runs import weights_of
from train.draft import DRAFTS
from train.runs.open import open_draft

AS_THAT_RUN = ("--set", "train.held_out=0.2", "--set", "train.precision=fp32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Path]:
    """A run of each kind. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("kinds")
    return {name: trained(folder / name, cache_dir, **settings) for name, settings in KINDS.items()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path]) -> dict[str, Path]:
    """The drafts of `runs` in fp32, in speculators' form. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("speculators")
    for name, run in runs.items():
        run_ok("export", run, folder / name, "--to", "speculators", "--dtype", "float32")
    return {name: folder / name for name in runs}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def copied(released: Path, folder: Path, layers: dict | None = None, **fields: Any) -> Path:
    """An export whose config says something else, `layers` in its nested config; None takes away."""
    folder.mkdir()
    shutil.copy(released / "model.safetensors", folder)
    shutil.copy(released / "config.json", folder)
    own = config_of(folder)["transformer_layer_config"] | (layers or {})
    nested = {name: value for name, value in own.items() if value is not None}
    change_json(folder / "config.json", **{"transformer_layer_config": nested, **fields})
    return folder


def import_arguments(folder: Path, cache: Path, run: Path) -> list[str | Path]:
    return ["import", folder, "--cache", cache, "--run", run, *AS_THAT_RUN]


LAYERS = {
    "vocab_size": 325,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_target_layers": 6,
    "dtype": "float32",
    "torch_dtype": "float32",
}
QWEN3 = {
    **LAYERS,
    "model_type": "qwen3",
    "use_sliding_window": False,
    "layer_types": ["full_attention"],
}
OWN: dict[str, dict[str, Any]] = {
    "dspark": {
        "architectures": ["DSparkDraftModel"],
        "transformer_layer_config": QWEN3,
        "aux_hidden_state_layer_ids": [1, 3, 5],
        "mask_token_id": 320,
        "block_size": 3,
        "sliding_window_non_causal": True,
        "sample_from_anchor": True,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
    "dflash": {
        "architectures": ["DFlashDraftModel"],
        "transformer_layer_config": QWEN3,
        "aux_hidden_state_layer_ids": [1, 3, 5],
        "mask_token_id": 320,
        "block_size": 4,
        "sliding_window_non_causal": True,
        "sample_from_anchor": False,
    },
    "eagle3": {
        "architectures": ["Eagle3DraftModel"],
        "transformer_layer_config": {**LAYERS, "model_type": "llama", "num_aux_hidden_states": 3},
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": True,
        "embed_requires_grad": False,
    },
}
CONVOLUTIONS, SELECTOR = (
    {"conv_kernel_size": 2, "conv_group_size": 16},
    {"selector_rank": 8, "selector_top_k": 5},
)
OWN["dflash2"] = OWN["dflash"] | {"architectures": ["DFlash2DraftModel"]} | CONVOLUTIONS | SELECTOR


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_is_the_librarys(exports: dict[str, Path], kind: str) -> None:
    """Layers from 1; a block drafts all of its slots with the anchor drafting, one less without."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    assert config_of(exports[kind]) == {
        **OWN[kind],
        "dtype": "float32",
        "torch_dtype": "float32",
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": "tiny-llama", "architectures": ["LlamaForCausalLM"]},
        },
        "draft_vocab_size": 325,
        "target_hidden_size": 32,
    }
    card = (exports[kind] / "README.md").read_text(encoding="utf-8")
    assert "vllm serve tiny-llama" in card
    for other in ("SGLang", "TensorRT-LLM"):
        assert f"{other} can't serve it: the export is in speculators' form" in card


def test_the_weights_are_named_as_the_library_names_them(
    exports: dict[str, Path], runs: dict[str, Path]
) -> None:
    for kind in ("dspark", "dflash", "dflash2"):
        got, wanted = load_file(exports[kind] / "model.safetensors"), weights_of(runs[kind])
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    got, wanted = load_file(exports["eagle3"] / "model.safetensors"), weights_of(runs["eagle3"])
    layer = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    layer += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    layer += ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    others = ["fc.weight", "lm_head.weight", "norm.weight"]
    assert set(got) == {f"layers.0.{part}.weight" for part in layer} | set(others)
    assert all(torch.equal(got[f"layers.0.{n}.weight"], wanted[f"midlayer.{n}.weight"]) for n in layer)
    assert all(torch.equal(got[name], wanted[name]) for name in others)


def settings_of(run: Path) -> str:
    """A run's `[draft]` table."""
    return (run / "config.toml").read_text().split("[loss]")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(
    tmp_path: Path, cache_dir: Path, runs: dict[str, Path], exports: dict[str, Path], kind: str
) -> None:
    """The same settings, the same weights bit for bit, and the same export, in either form."""
    run = tmp_path / "run"
    result = run_cli(*import_arguments(exports[kind], cache_dir, run))
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    got, wanted = weights_of(run), weights_of(runs[kind])
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert settings_of(run) == settings_of(runs[kind])
    ours, theirs = (config_of(each / "latest") | {"num_anchors": None} for each in (run, runs[kind]))
    assert ours == theirs
    for to in ("speculators", "vllm"):
        for number, source in enumerate((runs[kind], run)):
            run_ok("export", source, tmp_path / f"{to}{number}", "--to", to, "--dtype", "float32")
            change_json(tmp_path / f"{to}{number}" / "config.json", num_anchors=None)
        assert contents(tmp_path / f"{to}0") == contents(tmp_path / f"{to}1")


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"dflash2"}))
def test_a_smaller_vocabulary_comes_back(tmp_path: Path, cache_dir: Path, kind: str) -> None:
    """With d2t, the distance from the draft's ids to the target's, and t2d."""
    settings = {"train__max_steps": 1, "draft__draft_vocab_size": 40, **KINDS[kind]}
    source, out, run = tmp_path / "source", tmp_path / "out", tmp_path / "run"
    trained(source, cache_dir, **{name: v for name, v in settings.items() if name != "train__max_steps"})
    head = ("--with-embeddings", "--cache", cache_dir, "--dtype", "float32")
    run_ok("export", source, out, "--to", "speculators", *head)
    config, weights = config_of(out), load_file(out / "model.safetensors")
    assert config["draft_vocab_size"] == 40
    assert config["transformer_layer_config"]["vocab_size"] == 325
    assert "draft_vocab_size" not in config["transformer_layer_config"]
    tokens = torch.arange(40) + weights["d2t"]
    assert (weights["d2t"].dtype, weights["t2d"].dtype) == (torch.int64, torch.bool)
    assert torch.equal(weights["t2d"].nonzero().squeeze(1), tokens)
    assert weights["lm_head.weight"].shape == (40, 32)
    verifier = {"verifier_lm_head.weight": torch.zeros(40, 32), "verifier_norm.weight": torch.ones(32)}
    save_file(weights | verifier, out / "model.safetensors")  # as older versions of the library left them
    run_ok(*import_arguments(out, cache_dir, run))
    got, wanted = weights_of(run), weights_of(source)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert settings_of(run) == settings_of(source)


def test_fields_that_a_file_leaves_out_are_the_librarys_defaults(
    tmp_path: Path, cache_dir: Path, exports: dict[str, Path], runs: dict[str, Path]
) -> None:
    """The library leaves out what equals its classes' defaults, such as a rope_theta of 10,000."""
    absent = ("rope_parameters", "rope_theta", "hidden_act", "attention_bias", "rms_norm_eps", "layer_types")
    layers = dict.fromkeys((*absent, "use_sliding_window", "num_target_layers", "dtype", "torch_dtype"))
    fields = dict.fromkeys(("architectures", "markov_head_type", "confidence_head_with_markov"))
    fields |= dict.fromkeys(("sliding_window_non_causal", "target_hidden_size", "dtype"))
    folder = copied(exports["dspark"], tmp_path / "draft", layers, **fields)
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert settings_of(tmp_path / "run") == settings_of(runs["dspark"])


def test_a_window_comes_back(tmp_path: Path, cache_dir: Path) -> None:
    run = trained(tmp_path / "source", cache_dir, draft__sliding_window=9)
    run_ok("export", run, tmp_path / "out", "--to", "speculators", "--dtype", "float32")
    layers = config_of(tmp_path / "out")["transformer_layer_config"]
    names = ("use_sliding_window", "sliding_window", "layer_types", "is_causal")
    assert [layers[name] for name in names] == [True, 9, ["sliding_attention"], False]
    theirs = copied(
        tmp_path / "out", tmp_path / "theirs", {"is_causal": None}
    )  # the library has no such field
    for folder in (tmp_path / "out", theirs):
        run_ok(*import_arguments(folder, cache_dir, tmp_path / f"{folder.name}-run"))
        found = config_of(tmp_path / f"{folder.name}-run" / "latest")
        assert found | {"num_anchors": 64} == config_of(run / "latest")
    change_json(tmp_path / "out" / "config.json", sliding_window_non_causal=False)
    refused = run_cli(*import_arguments(tmp_path / "out", cache_dir, tmp_path / "no"))
    assert_refused(refused, 1, "without sliding_window_non_causal = true", "hide a block's later slots")


def test_both_layouts_of_a_block_are_told_apart(
    tmp_path: Path, cache_dir: Path, exports: dict[str, Path], bare_dir: Path
) -> None:
    """Blocks without heads are of the kind that their anchor says, whatever the library calls them."""
    run_ok("export", bare_dir, tmp_path / "bare", "--to", "speculators", "--dtype", "float32")
    bare = config_of(tmp_path / "bare")
    heads = {"markov_rank": 0, "enable_confidence_head": False}
    assert {name: bare[name] for name in (*heads, "markov_head_type")} == {
        **heads,
        "markov_head_type": "vanilla",
    }
    absent = dict.fromkeys((*heads, "markov_head_type", "confidence_head_with_markov"))
    anchored = copied(tmp_path / "bare", tmp_path / "anchored", speculators_model_type="dflash", **absent)
    filled = copied(exports["dflash"], tmp_path / "filled", speculators_model_type="dspark", **heads)
    for folder, kind, slots in (
        (tmp_path / "bare", "dspark", 3),
        (anchored, "dspark", 3),
        (filled, "dflash", 3),
    ):
        run = tmp_path / f"{folder.name}-run"
        run_ok(*import_arguments(folder, cache_dir, run))
        draft = open_draft(run)
        assert (draft.kind, draft.kind.slots(draft.shape)) == (DRAFTS[kind], slots)
        assert draft.shape.block_size == (3 if kind == "dspark" else 4)


@pytest.mark.parametrize(
    ("kind", "layers", "fields", "parts"),
    [
        ("dspark", {}, {"sample_from_anchor": False, "markov_rank": 0}, ["whose anchor drafts nothing"]),
        (
            "dspark",
            {},
            {"sample_from_anchor": False, "enable_confidence_head": False},
            ["whose anchor drafts"],
        ),
        ("dspark", {}, {"sample_from_anchor": False}, ["sample_from_anchor = False", "whose anchor drafts"]),
        (
            "dspark",
            {},
            {"sample_from_anchor": None},
            ["no sample_from_anchor", "true to speculators and false"],
        ),
        ("dspark", {}, {"block_size": None}, ["has no block_size", "add the value"]),
        ("dspark", {}, {"mask_token_id": None}, ["has no mask_token_id"]),
        ("dspark", {}, {"aux_hidden_state_layer_ids": None}, ["aux_hidden_state_layer_ids = None", "from 1"]),
        (
            "dspark",
            {},
            {"aux_hidden_state_layer_ids": [1, "3"]},
            ["expected the layers that the draft reads"],
        ),
        ("dspark", {}, {"aux_hidden_state_layer_ids": [1, 3, 4]}, ["holds layers [0, 2, 4]", "asks for 3"]),
        (
            "dspark",
            {},
            {"speculators_model_type": "xpress"},
            ["'xpress', expected dspark or dflash or dflash2 or eagle3"],
        ),
        ("dspark", {}, {"speculators_model_type": "peagle"}, ["'peagle'", "another kind of draft"]),
        ("dspark", {}, {"speculators_model_type": None}, ["speculators_model_type = None"]),
        ("dspark", {}, {"transformer_layer_config": None}, ["no transformer_layer_config"]),
        ("dspark", {}, {"transformer_layer_config": [1]}, ["no transformer_layer_config"]),
        ("dspark", {}, {"target_hidden_size": 64}, ["target_hidden_size = 64", "hidden_size = 32"]),
        ("dspark", {}, {"quantization_config": {"quant_method": "fp8"}}, ["has a quantization_config"]),
        ("dspark", {"quantization_config": {"a": 1}}, {}, ["has a quantization_config"]),
        ("dspark", {"model_type": "llama"}, {}, ["transformer_layer_config.model_type = 'llama'"]),
        ("dspark", {"num_attention_heads": "many"}, {}, ["transformer_layer_config can't be read"]),
        (
            "dspark",
            {"vocab_size": 999},
            {"draft_vocab_size": 999},
            ["vocab_size: 999 there, 325 in the cache"],
        ),
        ("dspark", {"rms_norm_eps": 1e-5}, {}, ["rms_norm_eps: 1e-05 there, 1e-06 here"]),
        ("dspark", {}, {"markov_rank": 4}, ["markov_head.markov_w1.weight", "is of shape"]),
        ("dflash", {}, {"aux_hidden_state_layer_ids": []}, ["aux_hidden_state_layer_ids = []"]),
        ("dflash2", {}, {"sample_from_anchor": True}, ["sample_from_anchor = True, expected False"]),
        ("dflash2", {}, {"selector_rank": None}, ["has no selector_rank", "add the value"]),
        ("dflash2", {}, {"selector_rank": 4}, ["candidate_selector.", "is of shape"]),
        ("dflash2", {}, {"conv_kernel_size": 3}, ["_conv.", "is of shape"]),
        ("eagle3", {}, {"norm_before_residual": True}, ["norm_before_residual = True, expected False"]),
        ("eagle3", {}, {"norm_before_residual": None}, ["no norm_before_residual", "true to vLLM"]),
        ("eagle3", {}, {"norm_before_fc": True}, ["norm_before_fc = True, expected False"]),
        ("eagle3", {}, {"embed_requires_grad": True}, ["embed_requires_grad = True, expected False"]),
        ("eagle3", {"model_type": "qwen3"}, {}, ["model_type = 'qwen3', expected 'llama'"]),
        ("eagle3", {"num_hidden_layers": 2}, {}, ["num_hidden_layers = 2, expected 1"]),
        ("eagle3", {"num_hidden_layers": None}, {}, ["num_hidden_layers = 32, expected 1"]),
        ("eagle3", {"layer_types": ["sliding_attention"]}, {}, ["sliding_attention in layer_types"]),
        (
            "eagle3",
            {},
            {"eagle_aux_hidden_state_layer_ids": None},
            ["eagle_aux_hidden_state_layer_ids = None"],
        ),
        ("eagle3", {}, {"speculators_config": {"proposal_methods": []}}, ["with speculative_tokens"]),
    ],
    ids=str,
)
def test_a_draft_that_no_run_can_have_is_one_line(
    tmp_path: Path,
    cache_dir: Path,
    exports: dict[str, Path],
    kind: str,
    layers: dict,
    fields: dict,
    parts: list[str],
) -> None:
    folder = copied(exports[kind], tmp_path / "draft", layers, **fields)
    result = run_cli(*import_arguments(folder, cache_dir, tmp_path / "run"))
    assert_refused(result, 1, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


@pytest.mark.parametrize(
    "fields", [{"embedding_scale": 5.5}, {"logit_scale": 0.5}, {"final_logit_softcapping": 30.0}], ids=str
)
def test_what_the_library_has_no_field_for_is_refused(
    tmp_path: Path, runs: dict[str, Path], fields: dict
) -> None:
    for kind, run in runs.items():
        copy = tmp_path / kind
        shutil.copytree(run, copy, symlinks=True)
        change_json(copy / "latest" / "config.json", **fields)
        refused = run_cli("export", copy, tmp_path / "out", "--to", "speculators")
        (name,) = fields
        assert_refused(refused, 2, "speculators can't serve this draft", f"{name} is {fields[name]}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_librarys_own_classes_read_the_config(exports: dict[str, Path], kind: str) -> None:
    """Asked of the library, if it is installed."""
    speculators = pytest.importorskip("speculators")
    config = speculators.SpeculatorModelConfig.from_pretrained(exports[kind])
    assert config.speculators_model_type == kind
    read = config.to_dict()
    for name, value in OWN[kind].items():
        if name != "transformer_layer_config":
            assert read[name] == value, name
    layers = config.transformer_layer_config
    wanted = OWN[kind]["transformer_layer_config"]
    assert {name: getattr(layers, name) for name in ("head_dim", "rope_parameters", "model_type")} == {
        name: wanted[name] for name in ("head_dim", "rope_parameters", "model_type")
    }
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 3
