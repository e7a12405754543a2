"""A checkpoint gives a target every weight, or is refused by name: from its headers and when it is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import TargetError
from pipeline.quiet import quiet_transformers
from pipeline.target_model.load import Target, open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments
from tests.capture.test_families import make_model
from tests.conftest import FP32, assert_refused, run_cli
from tests.tiny import make_target

Edit = Callable[[dict[str, Tensor]], object]
KEY = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Silence transformers as every command does, whichever test runs first."""
    quiet_transformers()


def opened(folder: Path) -> Target:
    return open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu"))


def edited(target: Path, folder: Path, edit: Edit, **config: object) -> Path:
    """Copy a target, and change its tensors and its config.json."""
    shutil.copytree(target, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, **config)
    return folder


def write_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_both_refuse(folder: Path, *parts: str) -> None:
    """The headers alone and the load say the same, each in one line."""
    target = opened(folder)
    for check in (target.check_weights, target.model):
        with pytest.raises(TargetError) as caught:
            check()
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 700
        for part in (str(folder), *parts):
            assert part in message, message


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.down.weight"] = tensors.pop(KEY)


def quantise(tensors: dict[str, Tensor]) -> None:
    """Store a weight as float8 with its scale, as vLLM's and modelopt's checkpoints do."""
    scale = tensors[KEY].float().abs().max() / 448
    tensors[KEY] = (tensors[KEY].float() / scale).to(torch.float8_e4m3fn)
    tensors[KEY.replace("weight", "weight_scale")] = scale


def leave(name: str) -> Edit:
    """Add an unused tensor."""
    return lambda tensors: tensors.update({name: torch.ones(2)})


# Missing, misnamed, of another shape


@pytest.mark.parametrize(
    ("edit", "config", "parts"),
    [
        (lambda t: t.pop(KEY), {}, ["1 weights of LlamaForCausalLM are missing", KEY]),
        (rename, {}, [KEY, "it has 1 others", "model.layers.2.mlp.down.weight"]),
        (lambda t: t.pop("lm_head.weight"), {}, ["lm_head.weight"]),
        (lambda t: t.pop("model.norm.weight"), {}, ["model.norm.weight"]),
        (lambda t: t.pop("model.embed_tokens.weight"), {"tie_word_embeddings": True}, []),
        (lambda t: t.update({KEY: torch.ones(32, 47)}), {}, [KEY, "[32, 47]", "[32, 48]"]),
        (lambda t: None, {"num_hidden_layers": 7}, ["9 weights", "model.layers.6."]),
    ],
)
def test_a_weight_that_the_checkpoint_does_not_give_is_named(tmp_path, target_dir, edit, config, parts):
    if config.get("tie_word_embeddings"):  # then the head is there, and is not this model's embedding
        whole = edit

        def edit(tensors: dict[str, Tensor]) -> None:
            whole(tensors)
            del tensors["lm_head.weight"]

        parts = ["model.embed_tokens.weight"]
    assert_both_refuse(edited(target_dir, tmp_path / "t", edit, **config), *parts)


@pytest.mark.parametrize("command", ["plan", "capture"])
def test_commands_refuse_it_in_one_line_and_write_nothing(tmp_path, target_dir, data_file, command):
    folder = edited(target_dir, tmp_path / "t", rename)
    result = run_cli(command, *arguments(folder, data_file, tmp_path / "cache")[1:])
    assert_refused(result, 1, KEY, "are missing in the checkpoint")
    assert not (tmp_path / "cache").exists()


def test_regenerate_refuses_it_before_it_answers(tmp_path, target_dir, data_file):
    folder = edited(target_dir, tmp_path / "t", rename)
    out = tmp_path / "out.jsonl"
    result = run_cli("regenerate", "--target", folder, "--data", data_file, "--out", out, *FP32)
    assert_refused(result, 1, KEY, "are missing in the checkpoint")


def sharded(target: Path, folder: Path) -> Path:
    """Copy a target, with its tensors in two files and an index."""
    shutil.copytree(target, folder)
    tensors, names = load_file(folder / "model.safetensors"), ("a.safetensors", "b.safetensors")
    (folder / "model.safetensors").unlink()
    place = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: t for k, t in tensors.items() if place[k] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_read_together(tmp_path, target_dir):
    target = opened(sharded(target_dir, tmp_path / "t"))
    target.check_weights()
    whole = opened(target_dir).model().state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in target.model().state_dict().items())


def test_a_file_that_the_index_names_is_missing(tmp_path, target_dir):
    folder = sharded(target_dir, tmp_path / "t")
    (folder / "b.safetensors").unlink()
    with pytest.raises(TargetError, match=r"1 of the 2 files .* missing \(b\.safetensors\)"):
        opened(folder).check_weights()


def test_a_shard_that_lacks_a_tensor_of_the_index(tmp_path, target_dir):
    folder = sharded(target_dir, tmp_path / "t")
    place = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][KEY]
    tensors = load_file(folder / place)
    del tensors[KEY]
    save_file(tensors, folder / place, {"format": "pt"})
    assert_both_refuse(folder, KEY)


@pytest.mark.parametrize("missing", [False, True])
def test_a_bin_file_has_a_header_too(tmp_path, target_dir, missing):
    folder = tmp_path / "t"
    shutil.copytree(target_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if missing:
        del tensors[KEY]
    torch.save(tensors, folder / "pytorch_model.bin")
    if missing:
        assert_both_refuse(folder, KEY)
    else:
        opened(folder).check_weights()


# Tied heads


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", None])
def test_a_tied_head_may_be_stored_once_or_twice(tmp_path, kept):
    folder = make_target(tmp_path / "tied", tie_word_embeddings=True, dtype=torch.float32)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    matrix = tensors.pop("model.embed_tokens.weight")
    for name in [kept] if kept else ["model.embed_tokens.weight", "lm_head.weight"]:
        tensors[name] = matrix.clone()
    save_file(tensors, path, {"format": "pt"})
    target = opened(folder)
    target.check_weights()
    model = target.model()
    assert torch.equal(model.get_input_embeddings().weight, matrix)
    assert torch.equal(model.get_output_embeddings().weight, matrix)


def test_a_head_that_config_json_ties_wrongly_is_refused(tmp_path, target_dir):
    folder = edited(target_dir, tmp_path / "t", lambda tensors: None, tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"config\.json ties the head") as caught:
        opened(folder).model()
    assert '"tie_word_embeddings": false' in str(caught.value)


# Tensors that nothing uses


@pytest.mark.parametrize(
    "name", ["model.layers.9.self_attn.q_proj.weight_scale", "mtp.fc.weight", "vision.zero"]
)
def test_unused_tensors_are_named_once_and_do_no_harm(tmp_path, target_dir, capfd, name):
    target = opened(edited(target_dir, tmp_path / "t", leave(name)))
    target.check_weights()
    model = target.model()
    said = warnings_in(capfd.readouterr().err)
    assert said == [f"warning: {tmp_path / 't'}: LlamaForCausalLM leaves out 1 tensors ({name})"]
    plain = opened(target_dir).model().state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())
    assert warnings_in(capfd.readouterr().err) == []


@pytest.mark.parametrize(
    "suffix",
    [
        "weight_scale",
        "weight_scale_inv",
        "input_scale",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "weight_packed",
        "weight_zero_point",
        "weight.absmax",
        "weight.quant_map",
        "weight_quantizer._amax",
    ],
)
def test_leftovers_of_a_quantisation_are_refused(tmp_path, target_dir, suffix):
    key = KEY.removesuffix("weight") + suffix
    assert_both_refuse(edited(target_dir, tmp_path / "t", leave(key)), key, "unquantised checkpoint")


def test_leftovers_of_a_checkpoint_that_names_begin_at_the_base_model(tmp_path, target_dir):
    def strip(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("model.")]:
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    whole = opened(edited(target_dir, tmp_path / "whole", strip))
    whole.check_weights()
    whole.model()
    key = KEY.removeprefix("model.").replace("weight", "weight_scale")

    def strip_and_leave(tensors: dict[str, Tensor]) -> None:
        strip(tensors)
        leave(key)(tensors)

    folder = edited(target_dir, tmp_path / "t", strip_and_leave)
    assert_both_refuse(folder, key, "unquantised checkpoint")


@pytest.mark.parametrize("name", ["self_attn.k_scale", "self_attn.v_proj.v_scale", "self_attn.attn.kv_scale"])
def test_scales_of_a_servers_key_value_cache_are_named_and_change_no_weight(
    tmp_path, target_dir, capfd, name
):
    key = f"model.layers.2.{name}"
    target = opened(edited(target_dir, tmp_path / "t", leave(key)))
    target.check_weights()
    assert f"leaves out 1 tensors ({key})" in capfd.readouterr().err
    plain = opened(target_dir).model().state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in target.model().state_dict().items())


# Quantised


def test_float8_weights_that_nothing_explains_are_refused(tmp_path, target_dir):
    folder = edited(target_dir, tmp_path / "t", quantise)
    with pytest.raises(TargetError, match="stored in float8_e4m3fn") as caught:
        opened(folder).check_weights()
    assert KEY in str(caught.value)
    with pytest.raises(TargetError, match="quantised in a form that transformers does not undo"):
        opened(folder).model()


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ["does not know", "modelopt"]),
        ({"quant_method": "homemade"}, ["does not know", "homemade"]),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            ["not installed", "compressed-tensors"],
        ),
        ({"quant_method": "gptq", "bits": 4}, ["not installed", "optimum"]),
        ({"bits": 4}, ["quantization_config can't be read", "unquantised"]),
    ],
)
def test_a_quantisation_that_can_not_be_undone_is_named(tmp_path, target_dir, config, parts, monkeypatch):
    no_package = "transformers.quantizers.quantizer_"
    monkeypatch.setattr(f"{no_package}compressed_tensors.is_compressed_tensors_available", lambda: False)
    monkeypatch.setattr(f"{no_package}gptq.is_optimum_available", lambda: False)
    folder = edited(target_dir, tmp_path / "t", lambda tensors: None, quantization_config=config)
    assert_both_refuse(folder, *parts)


def test_a_quantisation_that_only_a_file_beside_config_json_declares(tmp_path, target_dir):
    folder = edited(target_dir, tmp_path / "t", lambda tensors: None)
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(own))
    opened(folder).check_weights()
    own["quantization"]["quant_algo"] = "FP8"
    (folder / "hf_quant_config.json").write_text(json.dumps(own))
    assert_both_refuse(folder, "hf_quant_config.json", "FP8", "unquantised")


def test_a_plan_refuses_a_quantised_checkpoint_from_config_and_headers(tmp_path, target_dir, data_file):
    for name, config in (("a", {}), ("b", {"quantization_config": {"quant_method": "modelopt"}})):
        folder = edited(target_dir, tmp_path / name, quantise, **config)
        result = run_cli("plan", *arguments(folder, data_file, tmp_path / "cache")[1:])
        assert_refused(result, 1, "give the unquantised checkpoint")


def test_float8_that_transformers_undoes_gives_the_weights_times_their_scales(
    tmp_path, target_dir, monkeypatch
):
    pytest.importorskip("accelerate")
    wanted: dict[str, Tensor] = {}

    def quantise_blocks(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "_proj" in key]:
            matrix = tensors[key].float()
            scale = matrix.abs().max() / 448
            tensors[key] = (matrix / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scale.reshape(1, 1)
            wanted[key] = tensors[key].float() * scale

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = edited(target_dir, tmp_path / "t", quantise_blocks, quantization_config=config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # transformers keeps float8 on a GPU
    with pytest.raises(TargetError, match="compute in bfloat16, not float32: give --dtype bfloat16"):
        opened(folder).model()
    target = open_target(TargetOptions(target=str(folder), dtype="bfloat16", device="cpu"))
    target.check_weights()
    loaded = target.model().state_dict()
    assert len(wanted) == 42
    for key, matrix in wanted.items():
        torch.testing.assert_close(loaded[key].float(), matrix, rtol=2**-7, atol=1e-6)  # bf16 in between


# What is whole is never refused


FAMILIES = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
    "gemma3",
    "gpt2",
    "opt",
    "phi3",
    "gpt_oss",
    "mixtral",
]
FAMILIES += ["deepseek_v3", "qwen2_5_vl", "llava", "bloom", "falcon_h1", "qwen3_next"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_saves_is_accepted_and_nothing_is_said(tmp_path, capfd, family):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    target = opened(tmp_path)
    capfd.readouterr()
    target.check_weights()
    loaded = target.model().state_dict()
    assert warnings_in(capfd.readouterr().err) == []
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma3", "gpt_oss"])
def test_a_weight_that_transformers_renames_or_fuses_is_missed_too(tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in sorted(tensors) if re.search(r"layers\.1\..*(q_proj|o_proj)\.weight", key))
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_both_refuse(tmp_path, "layers.1.self_attn")


def warnings_in(said: str) -> list[str]:
    """Return the lines of stderr without those that say what takes so long."""
    return [line for line in said.splitlines() if not line.startswith(("opening ", "loading "))]


# A line for who waits


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (True, "1"), (False, "0")])
def test_a_terminal_and_a_log_file_are_told_what_takes_so_long(
    target_dir, monkeypatch, capsys, terminal, rank
):
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    opened(target_dir).model()
    said = capsys.readouterr().err.splitlines()
    told = [f"opening {target_dir} ...", f"loading {target_dir.name} ..."]
    assert said == (told if rank == "0" else [])
