"""`dspark export --to llama.cpp --gguf`: what llama.cpp reads, written down by hand and by its converter.

The comparison with the converter needs llama.cpp's source in `.cache/engines/llama.cpp`, or where the
variable DSPARK_LLAMA_CPP says. It is in the sdist of llama-cpp-python 0.3.36, in `vendor/llama.cpp`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.export.converter import SCRIPT, SOURCE, convert
from tests.train.exports import change_json, changed, trained
from tests.train.runs import weights_of
from tests.train.test_every_kind import CASES

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_dir: Path, cache_dir: Path) -> dict[str, Path]:
    """A run of each kind, with the target's vocabulary and with a smaller one."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {"dspark": run_dir}
    for name, settings in CASES.items():
        if name not in ("dspark", "dflash, reduced", "dflash2"):
            made[name] = trained(folder / name, cache_dir, **{"draft__kind": name, **settings})
    return made


@pytest.fixture(scope="module")
def target_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's GGUF file, as far as it is read."""
    path = tmp_path_factory.mktemp("gguf") / "target.gguf"
    write_target(path)
    return path


def write_target(path: Path, width: int = 32, tokens: int = 325) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(width)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token {i} é" for i in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_token_scores([i / 7 for i in range(tokens)])
    writer.add_eos_token_id(2)
    writer.add_mask_token_id(3)  # another one than the draft's
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Types and values of tensors in their order, values as fp32 unless they are whole numbers."""
    found = {}
    for each in gguf.GGUFReader(path).tensors:
        kind, data = each.tensor_type, np.array(each.data)
        data = data if kind.name == "I64" else gguf.quants.dequantize(data, kind)
        found[each.name] = (kind.name, torch.from_numpy(np.ascontiguousarray(data)))
    return found


def exported(run: Path, out: Path, target: Path, kind: str, *more: str | Path) -> Path:
    """Return the GGUF file of an export."""
    run_ok("export", run, out, "--to", "llama.cpp", "--gguf", kind, "--target-gguf", target, *more)
    return out / f"draft-{kind}.gguf"


LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def test_the_file_of_a_draft_of_blocks(tmp_path: Path, run_dir: Path, target_file: Path) -> None:
    path = exported(run_dir, tmp_path / "out", target_file, "f32")
    fields = fields_of(path)
    theirs = {k: v for k, v in fields_of(target_file).items() if k.startswith("tokenizer.")}
    theirs["tokenizer.ggml.mask_token_id"] = 320
    assert {k: v for k, v in fields.items() if k.startswith("tokenizer.")} == theirs
    assert {k.removeprefix("dflash."): v for k, v in fields.items() if k.startswith("dflash.")} == {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "attention.key_length": 8,
        "attention.value_length": 8,
        "block_size": 3,
        "target_layers": [1, 3, 5],  # layers 0, 2 and 4, by the layer that reads their outputs
        "sample_from_anchor": True,
        "has_confidence_head": True,
    }
    assert fields["general.architecture"] == "dflash"
    assert fields["general.base_model.0.name"] == "Tiny Llama"
    assert fields["general.file_type"] == 0
    layer = {**LAYER, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    names = {f"layers.0.{ours}.weight": f"blk.0.{name}.weight" for ours, name in layer.items()}
    names |= {"fc.weight": "fc.weight", "norm.weight": "output_norm.weight"}
    names |= {"hidden_norm.weight": "enc.output_norm.weight"}
    names |= {f"markov_head.markov_w{i}.weight": f"markov_w{i}.weight" for i in (1, 2)}
    names |= {f"confidence_head.proj.{part}": f"conf_proj.{part}" for part in ("weight", "bias")}
    found, weights = tensors_of(path), weights_of(run_dir)
    assert weights.keys() == names.keys()
    assert set(found) == set(names.values())
    for ours, name in names.items():
        assert found[name][0] == "F32"
        assert torch.equal(found[name][1], weights[ours]), ours


def test_the_file_of_an_eagle3_draft(tmp_path: Path, runs: dict[str, Path], target_file: Path) -> None:
    """Pairs that are rotated together are neighbours in the file, where ours are half a head apart."""
    run = runs["eagle3, reduced"]
    path = exported(run, tmp_path / "out", target_file, "f32")
    fields, found, weights = fields_of(path), tensors_of(path), weights_of(run)
    own = {k.removeprefix("eagle3."): v for k, v in fields.items() if k.startswith("eagle3.")}
    for name, value in {
        "target_layers": [1, 3, 5],
        "target_hidden_size": 32,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "vocab_size": 325,
        "rope.dimension_count": 8,
    }.items():
        assert own[name] == value, name
    assert not any("mask" in name for name in fields)
    names = {f"midlayer.{ours}.weight": f"blk.0.{name}.weight" for ours, name in LAYER.items()}
    names |= {"midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight", "fc.weight": "fc.weight"}
    names |= {"norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    assert set(found) == {*names.values(), "d2t"}
    for ours, name in names.items():
        wanted = weights[ours]
        if "q_proj" in ours or "k_proj" in ours:
            rows = [
                start + half + pair
                for start in range(0, len(wanted), 8)
                for pair in range(4)
                for half in (0, 4)
            ]
            wanted = wanted[rows]
        assert torch.equal(found[name][1], wanted), ours
    kind, tokens = found["d2t"]
    assert kind == "I64"
    assert tokens.tolist() == [i + int(offset) for i, offset in enumerate(weights["d2t"])]


@pytest.mark.parametrize(("kind", "bits"), [("f16", 11), ("bf16", 8), ("q8_0", None)])
def test_types_of_matrices(
    tmp_path: Path, run_dir: Path, target_file: Path, kind: str, bits: int | None
) -> None:
    """Norms and biases stay fp32; rows that blocks of 32 don't divide are f16. Weights are rounded once.

    The scale of 32 eight-bit numbers is f16, which adds up to a sixteenth of a step to the half one.
    """
    path = exported(run_dir, tmp_path / "out", target_file, kind)
    found, weights = tensors_of(path), weights_of(run_dir)
    assert fields_of(path)["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    types = {name: each for name, (each, _) in found.items()}
    plain = {"output_norm.weight", "enc.output_norm.weight", "conf_proj.bias", "blk.0.attn_k_norm.weight"}
    assert {types[name] for name in plain} == {"F32"}
    uneven = {"markov_w1.weight", "markov_w2.weight", "conf_proj.weight", "blk.0.ffn_down.weight"}
    assert {types[name] for name in uneven} == {"F16" if kind == "q8_0" else kind.upper()}
    assert types["fc.weight"] == kind.upper()
    got, wanted = found["fc.weight"][1], weights["fc.weight"]
    assert not torch.equal(got, wanted)
    if bits is None:
        blocks, error = wanted.reshape(-1, 32), (got - wanted).reshape(-1, 32).abs()
        assert (error <= blocks.abs().amax(1, keepdim=True) / 127 * 0.57).all()
    else:
        assert torch.equal(got, wanted.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float())


def test_the_card_says_how_the_file_is_served(
    tmp_path: Path, runs: dict[str, Path], target_file: Path
) -> None:
    for name, spec, slots in (("dspark", "dspark", 3), ("dflash", "dflash", 3), ("eagle3", "eagle3", 3)):
        exported(runs[name], tmp_path / name, target_file, "f16")
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
        (line,) = [line.split() for line in card.splitlines() if "llama-server" in line]
        options = f"--spec-type draft-{spec} --spec-draft-n-max {slots}"
        assert " ".join(line) == f"llama-server -m TARGET.gguf -md DRAFT_DIR/draft-f16.gguf {options}"
        assert "convert_hf_to_gguf" not in card
    run_ok("export", runs["dspark"], tmp_path / "plain", "--to", "llama.cpp")
    card = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    assert "python convert_hf_to_gguf.py DRAFT_DIR --target-model-dir TARGET_DIR " in card
    assert "llama-server -m TARGET.gguf -md DRAFT.gguf" in card
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_a_kind_that_llama_cpp_does_not_know_has_no_file(
    tmp_path: Path, cache_dir: Path, target_file: Path
) -> None:
    run = trained(tmp_path / "run", cache_dir, draft__kind="dflash2", **CASES["dflash2"])
    asked = ("export", run, tmp_path / "out", "--to", "llama.cpp")
    for more in ((), ("--gguf", "f16", "--target-gguf", target_file)):
        refused = run_cli(*asked, *more)
        assert_refused(
            refused, 2, "llama.cpp can't serve this draft", "neither the convolutions nor the selector"
        )
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(
    tmp_path: Path, run_dir: Path, target_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("export", run_dir, tmp_path / "out", "--to")
    file = ("--gguf", "f16", "--target-gguf", target_file)
    assert_refused(run_cli(*asked, "vllm", *file), 2, "--gguf is of llama.cpp, --to is vllm")
    assert_refused(run_cli(*asked, "llama.cpp", *file[:2]), 2, "--gguf and --target-gguf go together")
    assert_refused(run_cli(*asked, "llama.cpp", *file[2:]), 2, "--gguf and --target-gguf go together")
    (tmp_path / "junk.gguf").write_bytes(b"no such thing" * 9)
    for name in ("absent.gguf", "junk.gguf", "."):
        refused = run_cli(*asked, "llama.cpp", "--gguf", "f16", "--target-gguf", tmp_path / name)
        assert_refused(
            refused, 2, f"--target-gguf {tmp_path / name} can't be read as a GGUF file with a token"
        )
    for width, tokens in ((31, 325), (32, 320)):
        write_target(tmp_path / "other.gguf", width, tokens)
        refused = run_cli(*asked, "llama.cpp", "--gguf", "f16", "--target-gguf", tmp_path / "other.gguf")
        said = f"is of another target: width {width} and {tokens} tokens there, 32 and 325 in the draft's"
        assert_refused(refused, 2, said)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    refused = run_cli(*asked, "llama.cpp", *file)
    assert_refused(refused, 2, "--gguf needs the package gguf: pip install 'dspark-pipeline[gguf]'")
    assert not (tmp_path / "out").exists()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 5e5,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"]}
# Run, type of the file, and fields of the draft's config that are changed.
CONVERTED: list[tuple[str, str, dict[str, Any]]] = [
    ("dspark", "f32", {}),
    ("dspark", "f16", {}),
    ("dspark", "bf16", {}),
    ("dspark", "q8_0", {}),
    ("dspark", "f16", WINDOW | {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}),
    ("dspark", "f16", {"rope_parameters": MROPE}),
    ("dspark, deep", "q8_0", {}),
    ("dspark, reduced", "q8_0", {}),
    ("dflash", "bf16", {}),
    ("dflash", "f16", WINDOW | {"rope_parameters": LINEAR}),
    ("eagle3", "q8_0", {}),
    ("eagle3", "f32", {"rope_parameters": LLAMA3}),
    ("eagle3", "f16", {"rope_parameters": YARN}),
    ("eagle3, reduced", "bf16", {}),
]


@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3"])
def test_llama_3s_frequencies(tmp_path: Path, runs: dict[str, Path], target_file: Path, name: str) -> None:
    """The file has what transformers' frequencies are divided by. The converter knows it for EAGLE-3 only."""
    run = changed(runs[name], tmp_path / "run", rope_parameters=LLAMA3)
    found = tensors_of(exported(run, tmp_path / "out", target_file, "q8_0"))
    config = AutoConfig.for_model("llama", head_dim=8, rope_parameters=LLAMA3)
    wanted, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 8, 2) / 8)
    assert factor == 1
    assert found["rope_freqs.weight"][0] == "F32"
    torch.testing.assert_close(plain / found["rope_freqs.weight"][1], wanted)
    assert len(set(found["rope_freqs.weight"][1].tolist())) == 3  # kept, between, and divided
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "llama-server -m TARGET.gguf -md DRAFT_DIR/draft-q8_0.gguf" in card


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, runs: dict[str, Path], target_dir: Path, cache_dir: Path
) -> list[tuple[Path, Path]]:
    """Our file and the converter's, for each of `CONVERTED`."""
    if not (SOURCE / SCRIPT).is_file():
        pytest.skip(f"no {SCRIPT} in {SOURCE}: unpack llama.cpp there, or set DSPARK_LLAMA_CPP")
    folder = tmp_path_factory.mktemp("converted")
    target, rotated = folder / "target.gguf", folder / "tiny-rotated"
    convert([target_dir, "--outtype", "f32", "--outfile", target])
    shutil.copytree(target_dir, rotated)
    change_json(rotated / "config.json", rope_parameters=MROPE)
    types = ["sliding_attention", "full_attention"] * 6
    deep = {"draft__num_layers": 12, "draft__sliding_window": 9, "draft__layer_types": json.dumps(types)}
    runs = runs | {
        "dspark, deep": trained(folder / "deep", cache_dir, **deep, draft__confidence_head="false")
    }
    found, lines = [], []
    for number, (name, kind, fields) in enumerate(CONVERTED):
        run = changed(runs[name], folder / f"run-{number}", **fields)
        out, theirs = folder / f"draft-{number}", folder / f"theirs-{number}.gguf"
        more = ("--with-embeddings", "--cache", cache_dir) if name == "dspark, reduced" else ()
        found.append((exported(run, out, target, kind, "--dtype", "float32", *more), theirs))
        of = rotated if fields.get("rope_parameters") == MROPE else target_dir
        lines.append([out, "--target-model-dir", of, "--outtype", kind, "--outfile", theirs])
    convert(*lines)
    return found


@pytest.mark.parametrize("number", range(len(CONVERTED)), ids=[f"{n}-{k}" for n, k, _ in CONVERTED])
def test_the_file_is_the_converters(pairs: list[tuple[Path, Path]], number: int) -> None:
    ours, theirs = pairs[number]
    assert fields_of(ours) == fields_of(theirs)
    found, wanted = tensors_of(ours), tensors_of(theirs)
    assert list(found) == list(wanted)
    for name, (kind, values) in wanted.items():
        assert found[name][0] == kind, name
        assert torch.equal(found[name][1], values), name
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("name", "fields", "parts"),
    [
        ("dspark", {"target_layer_ids": [0, 2, 5]}, ["of the last layer nothing", "within [-1, 4]"]),
        ("dspark", {"mask_token_id": 325}, ["row of the embedding"]),
        (
            "dspark",
            {"rope_parameters": LLAMA3},
            ["rope_parameters is {'rope_type': 'llama3'", "linear or yarn ones", "by --gguf llama3 as well"],
        ),
        ("dspark", {"rope_parameters": YARN | {"attention_factor": 1.2}}, ["attention_factor"]),
        ("dspark", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, ["dynamic"]),
        ("dspark", {"embedding_scale": 5.5}, ["embeds the draft's tokens unscaled"]),
        ("dspark", {"logit_scale": 0.5}, ["leaves a draft's logits unscaled"]),
        ("dspark", {"final_logit_softcapping": 30.0}, ["uncapped"]),
        ("dflash", {"rope_parameters": LLAMA3}, ["linear or yarn"]),
        ("dflash", {"embedding_scale": 5.5}, ["unscaled"]),
        ("dflash", {"target_layer_ids": [0, 2, 5]}, ["of the last layer nothing"]),
        ("dflash", {"mask_token_id": 325}, ["row of the embedding"]),
        ("eagle3", {"norm_output": True}, ["before the final norm", "draft.norm_output = false"]),
        ("eagle3", {"target_layer_ids": [0, 2, 5]}, ["of the last layer nothing"]),
        ("eagle3", {"final_logit_softcapping": 30.0}, ["uncapped"]),
        ("eagle3", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, ["linear or yarn or llama3"]),
    ],
    ids=str,
)
def test_what_llama_cpp_cant_serve_is_refused_by_name(
    tmp_path: Path, runs: dict[str, Path], name: str, fields: dict, parts: list[str]
) -> None:
    run = changed(runs[name], tmp_path / "run", **fields)
    refused = run_cli("export", run, tmp_path / "out", "--to", "llama.cpp")
    assert_refused(refused, 2, f"llama.cpp can't serve this draft: {next(iter(fields))} is", *parts)
    assert not (tmp_path / "out").exists()
    run_ok("export", run, tmp_path / "hf", "--to", "hf")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert f"llama.cpp can't serve it: {next(iter(fields))} is" in card
    assert "llama-server" not in card


def test_shapes_that_llama_cpp_does_not_have(
    tmp_path: Path, runs: dict[str, Path], cache_dir: Path, bare_dir: Path, rnn_dir: Path
) -> None:
    eagle3 = {"draft__kind": "eagle3", **CASES["eagle3"]}
    normed = trained(tmp_path / "normed", cache_dir, **eagle3, draft__fc_norm="true")
    two = trained(tmp_path / "two", cache_dir, **eagle3, draft__target_layer_ids="[0, 4]")
    fewer = {"draft__kind": "dflash", **CASES["dflash, reduced"]}
    reduced = trained(tmp_path / "reduced", cache_dir, **fewer)
    blind = trained(tmp_path / "blind", cache_dir, draft__confidence_with_markov="false")
    for run, said in (
        (blind, "confidence_head_with_markov is False, and its confidence head reads the Markov embedding"),
        (bare_dir, "markov_rank is 0, and it always builds a Markov head"),
        (rnn_dir, "markov_head_type is rnn, and it has only the vanilla head"),
        (normed, "fc_norm is True, and it has no norm for each captured layer"),
        (two, "target_layer_ids is [0, 4], and it takes exactly three layers"),
        (reduced, "draft_vocab_size is 40, and its drafts of blocks draft all"),
    ):
        refused = run_cli("export", run, tmp_path / "out", "--to", "llama.cpp")
        assert_refused(refused, 2, "llama.cpp can't serve this draft", said)
    assert not (tmp_path / "out").exists()


def test_a_head_beside_a_draft_of_all_tokens_would_be_misread(
    tmp_path: Path, runs: dict[str, Path], cache_dir: Path
) -> None:
    """The converter drops the head of such a DSpark draft, and the server takes the embedding for it."""
    embeddings = ("--with-embeddings", "--cache", cache_dir)
    refused = run_cli("export", runs["dspark"], tmp_path / "out", "--to", "llama.cpp", *embeddings)
    assert_refused(refused, 2, "llama.cpp can't serve this draft with the target's embedding and head")
    assert_refused(refused, 2, "leave out --with-embeddings")
    assert not (tmp_path / "out").exists()
    run_ok("export", runs["dspark"], tmp_path / "hf", "--to", "hf", *embeddings)
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert "llama.cpp can't serve it: the target's head comes along" in card
