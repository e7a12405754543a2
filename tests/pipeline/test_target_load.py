"""Targets are found, described and loaded as the options say, or refused in one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from capture.dflash import HFDFlashTargetModel
from capture.target import HFDSparkTargetModel
from pipeline.errors import DSparkError, TargetError, UsageError
from pipeline.target_model.find import resolve_directory, weights_hash
from pipeline.target_model.gguf import gguf_options
from pipeline.target_model.load import Target, open_target, resolve_dtype
from pipeline.target_model.options import TargetOptions
from tests import machine
from tests.tiny import make_target, make_tokenizer

IDS = torch.arange(3, 27).reshape(2, 12)
MASK = torch.ones_like(IDS)


def options(target: Path | str, **values: Any) -> TargetOptions:
    return TargetOptions(target=str(target), **{"dtype": "float32", "device": "cpu", **values})


def states(target: Target) -> dict[int | str, torch.Tensor]:
    return HFDSparkTargetModel(target.model(), [0, 2, 4]).states(IDS, MASK)


def assert_line(caught: pytest.ExceptionInfo[DSparkError], *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for part in parts:
        assert part in message, message


# Finding


@pytest.mark.capability
def test_a_directory(target_dir):
    target = open_target(options(target_dir, dtype="auto"))
    assert target.name == target_dir.name
    assert target.directory == target_dir
    identity = target.identity()
    assert (identity.num_layers, identity.hidden_size, identity.model_type) == (6, 32, "llama")
    assert identity.weights == weights_hash(target_dir)
    assert target.tokenizer().is_fast
    model = target.model()
    assert model.dtype == target.dtype
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_shell_takes_no_memory_and_is_built_once(target_dir):
    target = open_target(options(target_dir))
    assert {parameter.device.type for parameter in target.shell.parameters()} == {"meta"}
    assert target.shell is target.shell


def test_a_revision_of_a_directory_is_a_usage_error(target_dir):
    with pytest.raises(UsageError) as caught:
        open_target(options(target_dir, revision="main"))
    assert_line(caught, "--revision main", str(target_dir), "drop --revision")


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_hub_id_that_can_not_be_fetched_is_one_line(revision):
    with pytest.raises(TargetError) as caught:
        open_target(options("nobody/no-such-model", revision=revision))
    assert_line(caught, "nobody/no-such-model", "neither a directory nor a Hub model", revision or "")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/models"])
def test_a_path_that_is_not_there_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(TargetError) as caught:
        open_target(options(name))
    assert_line(caught, "no such target directory", name)


@pytest.mark.parametrize("trust", [False, True])
def test_what_the_hub_is_asked_for(target_dir, monkeypatch, trust):
    asked = {}

    def snapshot_download(name, **arguments):
        asked.update(arguments, name=name)
        return str(target_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    target = open_target(options("some/model", revision="abc123", trust_remote_code=trust))
    assert target.name == "some/model"
    assert (asked["name"], asked["revision"]) == ("some/model", "abc123")
    assert ("*.py" in asked["allow_patterns"]) == trust
    assert "*.safetensors" in asked["allow_patterns"]


def test_a_directory_without_a_config_names_what_it_misses(tmp_path):
    with pytest.raises(TargetError) as caught:
        resolve_directory(str(tmp_path))
    assert_line(caught, "no config.json")
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(TargetError) as caught:
        resolve_directory(str(tmp_path))
    assert_line(caught, "--gguf-file tiny.gguf")
    with pytest.raises(TargetError) as caught:
        resolve_directory(str(tmp_path / "tiny.gguf"))
    assert_line(caught, "is a file", f"--target {tmp_path}", "--gguf-file tiny.gguf")


def test_a_directory_without_weights_is_refused(target_dir, tmp_path):
    shutil.copytree(target_dir, tmp_path / "t", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(TargetError, match="has no weights"):
        open_target(options(tmp_path / "t")).identity()


def test_broken_files_are_one_line(target_dir, tmp_path):
    shutil.copytree(target_dir, tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(TargetError) as caught:
        open_target(options(tmp_path / "t")).model()
    assert_line(caught, "can't be loaded")
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(TargetError) as caught:
        open_target(options(tmp_path / "t")).tokenizer()
    assert_line(caught, "tokenizer can't be loaded")
    (tmp_path / "t" / "config.json").write_text("{")
    with pytest.raises(TargetError) as caught:
        open_target(options(tmp_path / "t"))
    assert_line(caught, "config.json can't be read")


# What can't be a target


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
STRANGERS = {
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "an encoder-decoder"),
    "bart": ({"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}, "an encoder-decoder"),
    "whisper": ({"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}, "an encoder-decoder"),
    "vit": (TINY, "not a causal LM"),
    "clip": ({}, "not a causal LM"),
    "openai-gpt": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "no final norm"),
    "opt": ({**TINY, "ffn_dim": 16, "word_embed_proj_dim": 8}, "one width"),
    "phi": (TINY, "without a bias"),
    "bert": ({**TINY, "is_decoder": True}, "no decoder layers"),
}


@pytest.mark.parametrize("family", STRANGERS)
def test_strangers_are_refused_by_name(tmp_path, family):
    values, why = STRANGERS[family]
    config = AutoConfig.for_model(family, **values)
    config.save_pretrained(tmp_path)
    with pytest.raises(TargetError) as caught:
        _ = open_target(options(tmp_path)).shell
    assert_line(caught, why)
    assert re.search(family.replace("-", ""), str(caught.value).replace("-", ""), re.IGNORECASE)
    assert re.search("(use|name|pass) ", str(caught.value))  # what to do


def test_the_text_stack_of_a_multimodal_model_is_a_target(tmp_path):
    text = {**TINY, "model_type": "llama", "num_hidden_layers": 3, "vocab_size": 40}
    vision = {**TINY, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    target = open_target(options(tmp_path))
    identity = target.identity()
    assert identity.architecture == "LlavaForConditionalGeneration"
    assert (identity.model_type, identity.num_layers, identity.vocab_size) == ("llama", 3, 40)
    got = HFDSparkTargetModel(target.model(), [0]).generate_batch(IDS, MASK, MASK)
    assert got.target_hidden_states.shape == (2, 12, 16)


# Options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(target_dir, dtype):
    target = open_target(options(target_dir, dtype=dtype))
    assert target.identity().dtype == dtype
    assert target.model().dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("stored", "bf16", "computed"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float16),
        (torch.float16, False, torch.float16),
        (torch.float32, True, torch.float32),
        (torch.float32, False, torch.float32),
    ],
)
def test_auto_is_the_checkpoints_dtype_unless_bf16_is_emulated(
    target_dir, monkeypatch, stored, bf16, computed
):
    machine.pretend(monkeypatch, bf16)
    config = AutoConfig.from_pretrained(target_dir)
    config.dtype = stored
    assert resolve_dtype("auto", config, torch.device("cpu")) == computed
    assert resolve_dtype("bfloat16", config, torch.device("cpu")) == torch.bfloat16


def test_a_config_that_names_no_dtype_means_float32(target_dir):
    config = AutoConfig.from_pretrained(target_dir)
    config.dtype = None
    assert resolve_dtype("auto", config, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_attention_implementations_give_the_same_states(tmp_path, family):
    folder = make_target(tmp_path / family, family, dtype=torch.float32)
    loaded = {}
    for name in ("eager", "sdpa"):
        target = open_target(options(folder, attn_implementation=name))
        assert target.model().config._attn_implementation == name
        loaded[name] = states(target)
    for key, state in loaded["eager"].items():
        torch.testing.assert_close(state, loaded["sdpa"][key], rtol=1e-5, atol=2e-5)


def test_an_unknown_attention_implementation_is_one_line(target_dir):
    with pytest.raises(TargetError) as caught:
        _ = open_target(options(target_dir, attn_implementation="quick")).shell
    assert_line(caught, "--attn-implementation quick", "eager", "sdpa")


def test_device_map_gives_the_same_states(target_dir):
    pytest.importorskip("accelerate")
    spread = open_target(options(target_dir, device="auto", device_map="auto"))
    model = spread.model()
    plain = states(open_target(options(target_dir)))
    for key, state in HFDSparkTargetModel(model, [0, 2, 4]).states(IDS, MASK).items():
        torch.testing.assert_close(state.cpu(), plain[key], rtol=1e-5, atol=2e-5)


def test_device_map_and_device_exclude_each_other(target_dir):
    with pytest.raises(UsageError) as caught:
        open_target(options(target_dir, device="cpu", device_map="auto"))
    assert_line(caught, "--device-map auto", "drop --device cpu")


@pytest.mark.parametrize(("place", "device"), [("disk", "cpu"), ("cpu", "cuda")])
def test_a_target_that_the_gpus_do_not_hold_is_refused(target_dir, monkeypatch, place, device):
    pytest.importorskip("accelerate")
    model = open_target(options(target_dir)).model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": place}
    report = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, report))
    target = open_target(options(target_dir, device="auto", device_map="auto"))
    with pytest.raises(TargetError) as caught:
        dataclasses.replace(target, device=torch.device(device)).model()
    assert_line(caught, "does not fit the GPUs", "1 of its 2 parts", place, "more GPUs")


def test_packages_that_are_missing_are_named(target_dir, monkeypatch):
    target = open_target(options(target_dir, device="auto", device_map="auto"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(TargetError) as caught:
        target.model()
    assert_line(caught, "--device-map needs accelerate", "pip install accelerate")
    with pytest.raises(TargetError) as caught:
        gguf_options("some.gguf")
    assert_line(caught, "--gguf-file needs gguf, accelerate", "pip install gguf accelerate")


class Elsewhere:
    """Stands for a state on another device."""

    def __init__(self, state: torch.Tensor):
        self.state = state

    def to(self, device: torch.device) -> torch.Tensor:
        return self.state.to(device)


def test_states_of_several_devices_are_concatenated_where_the_inputs_are(target_dir, monkeypatch):
    target = HFDSparkTargetModel(open_target(options(target_dir)).model(), [0, 2])
    whole = target.generate_batch(IDS, MASK, MASK)
    apart = {key: Elsewhere(state) for key, state in target.states(IDS, MASK).items()}
    monkeypatch.setattr(target, "states", lambda *_: apart)
    batch = target.generate_batch(IDS, MASK, MASK)
    assert torch.equal(batch.target_hidden_states, whole.target_hidden_states)
    assert torch.equal(batch.target_last_hidden_states, whole.target_last_hidden_states)
    assert batch.target_hidden_states.device == IDS.device


@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_a_layer_that_did_not_run_is_named(target_dir, kind):
    model = open_target(options(target_dir)).model()
    target = kind(model, [0, 2])
    model.model.layers[2].forward, model.model.layers[1].forward = None, None
    model.model.config.num_hidden_layers = 1  # as a model that exits early
    with pytest.raises(TargetError, match=r"LlamaForCausalLM did not run layer 2: "):
        target.generate_batch(IDS, MASK, MASK)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_end(tmp_path, family):
    extra = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    target = open_target(options(make_target(tmp_path / family, family, max_position_embeddings=16, **extra)))
    target.check_length(16)
    with pytest.raises(UsageError) as caught:
        target.check_length(1700)
    assert_line(caught, "1,700 tokens", "16 learned positions", "--max-length 16")
    ids = torch.full((1, 16), 3)
    HFDSparkTargetModel(target.model(), [0]).states(ids, torch.ones_like(ids))  # sixteen do fit


def test_rotary_positions_do_not_end(target_dir):
    open_target(options(target_dir)).check_length(10**6)


# Custom code


CODE = """
    from transformers import LlamaConfig, LlamaForCausalLM


    class OwnConfig(LlamaConfig):
        model_type = "own_llama"


    class OwnForCausalLM(LlamaForCausalLM):
        config_class = OwnConfig
"""


@pytest.fixture
def own_code(target_dir, tmp_path, monkeypatch) -> Path:
    """A target whose config names Python files beside it."""
    folder = tmp_path / "own-code"
    shutil.copytree(target_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config.update(model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(textwrap.dedent(CODE))
    modules = str(tmp_path / "modules")  # transformers copies the code there
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


def test_own_code_needs_the_flag(own_code):
    with pytest.raises(TargetError) as caught:
        open_target(options(own_code))
    assert_line(caught, str(own_code), "--trust-remote-code", "Python files of its own")
    assert "transformers_modules.own" not in " ".join(sys.modules)


def test_own_code_runs_with_the_flag(own_code, target_dir):
    target = open_target(options(own_code, trust_remote_code=True))
    identity = target.identity()
    assert identity.architecture == "OwnForCausalLM"
    assert identity.num_layers == 6
    plain = states(open_target(options(target_dir)))
    for key, state in states(target).items():
        assert torch.equal(state, plain[key])
    (own_code / "own.py").write_text(textwrap.dedent(CODE) + "\n# changed\n")
    assert weights_hash(own_code, target.options) != identity.weights


# GGUF


@pytest.fixture(scope="module")
def gguf_dir(tmp_path_factory, target_dir) -> Path:
    """The tiny Llama as a GGUF file of float32 weights, with its tokenizer, and nothing beside it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32), make_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"[PAD{i}]" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps the two halves of rotary interleaved
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_config_tokenizer_and_weights_come_from_a_gguf_file(gguf_dir, target_dir, tmp_path):
    target = open_target(options(gguf_dir, gguf_file="tiny.gguf"))
    identity, plain = target.identity(), open_target(options(target_dir))
    assert identity.num_layers == 6
    assert identity.dtype == "float32"
    assert len(identity.weights) == 64
    text = "why is the sky blue"
    assert target.tokenizer()(text).input_ids == plain.tokenizer()(text).input_ids
    expected = states(plain)
    for key, state in states(target).items():
        torch.testing.assert_close(state, expected[key], rtol=1e-4, atol=1e-4)


def test_a_gguf_targets_files_load_without_it(gguf_dir, tmp_path):
    target = open_target(options(gguf_dir, gguf_file="tiny.gguf"))
    contents = target.files()
    assert "config.json" in contents
    assert "tokenizer.json" in contents
    assert not any(name.endswith((".gguf", ".safetensors")) for name in contents)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("the cat").input_ids == target.tokenizer()("the cat").input_ids


def test_a_directorys_files_load_without_its_weights(target_dir, tmp_path):
    contents = open_target(options(target_dir)).files()
    assert not any(name.endswith(".safetensors") for name in contents)
    for name, content in contents.items():
        assert (target_dir / name).read_bytes() == content
        (tmp_path / name).write_bytes(content)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32
    transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bf16", [True, False])
def test_gguf_weights_are_computed_in_bf16_unless_told(gguf_dir, monkeypatch, bf16):
    machine.pretend(monkeypatch, bf16)
    target = open_target(options(gguf_dir, gguf_file="tiny.gguf", dtype="auto"))
    assert target.config.get_text_config().dtype == torch.bfloat16
    assert target.dtype == (torch.bfloat16 if bf16 else torch.float32)  # where bf16 is emulated


def test_a_gguf_file_that_is_not_there_names_those_that_are(gguf_dir):
    with pytest.raises(TargetError) as caught:
        open_target(options(gguf_dir, gguf_file="other.gguf"))
    assert_line(caught, "other.gguf", "tiny.gguf")


def test_a_broken_gguf_file_is_one_line(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing more")
    with pytest.raises(TargetError) as caught:
        open_target(options(tmp_path, gguf_file="bad.gguf"))
    assert_line(caught, "bad.gguf can't be read")
