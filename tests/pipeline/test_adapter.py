"""`--adapter`: states are those of hand-merged weights, and what can't be merged is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from capture.target import HFDSparkTargetModel
from pipeline.cache import CacheReader
from pipeline.errors import TargetError
from pipeline.target_model.find import resolve_directory, weights_hash
from pipeline.target_model.load import Target, open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments, tree
from tests.conftest import FP32, assert_refused, run_cli, run_ok
from tests.tiny import make_target

pytest.importorskip("peft")
IDS = torch.arange(3, 27).reshape(2, 12)
RANK, ALPHA = 3, 5  # a scale that is not 1
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LAYER_KEYS = [f"model.layers.{layer}.{name}" for layer in range(6) for name in MODULES]


def make_adapter(
    folder: Path, base: Path, keys: list[str] = LAYER_KEYS, *, seed: int = 0, **config: Any
) -> Path:
    """Write a LoRA adapter as peft does, without peft."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights, tensors = load_file(base / "model.safetensors"), {}
    for key in keys:
        rows, columns = weights[f"{key}.weight"].shape
        for name, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            full = f"base_model.model.{key}.lora_{name}.weight"
            tensors[full] = torch.randn(shape, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({key.rsplit(".", 1)[-1] for key in keys}),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def merge_by_hand(folder: Path, base: Path, adapter: Path) -> Path:
    """Copy `base` with W + alpha / r * B A, computed here, in fp64."""
    shutil.copytree(base, folder)
    weights, added = load_file(folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in added.items():
        if ".lora_A." in name:
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            b = added[name.replace("lora_A", "lora_B")]
            weights[key] = (weights[key].double() + ALPHA / RANK * (b.double() @ a.double())).float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def opened(base: Path, adapter: Path | None = None) -> Target:
    return open_target(
        TargetOptions(target=str(base), adapter=adapter and str(adapter), dtype="float32", device="cpu")
    )


def states(target: Target) -> dict[int | str, Tensor]:
    return HFDSparkTargetModel(target.model(), [0, 2, 4]).states(IDS, torch.ones_like(IDS))


def assert_both_refuse(target: Target, *parts: str) -> None:
    for check in (target.check_weights, target.model):
        with pytest.raises(TargetError) as caught:
            check()
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_target(tmp_path_factory.mktemp("adapters") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora", base)


def test_states_are_those_of_hand_merged_weights(tmp_path, base, adapter):
    target = opened(base, adapter)
    target.check_weights()
    wanted = states(opened(merge_by_hand(tmp_path / "merged", base, adapter)))
    plain = states(opened(base))
    for key, state in states(target).items():
        torch.testing.assert_close(state, wanted[key], rtol=1e-5, atol=2e-5)
        assert (state - plain[key]).abs().max() > 1e-2
    model = target.model()
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_identity_names_both_and_the_hash_covers_the_adapters_files(tmp_path, base, adapter):
    plain, merged = opened(base).identity(), opened(base, adapter).identity()
    assert (plain.name, merged.name) == ("base", "base+lora")
    assert plain.weights == weights_hash(base)
    other = make_adapter(tmp_path / "other", base, seed=1)
    scaled = make_adapter(tmp_path / "scaled", base, lora_alpha=ALPHA + 1)
    hashes = [merged.weights, *(opened(base, folder).identity().weights for folder in (other, scaled))]
    assert len({plain.weights, *hashes}) == 4


def test_a_capture_resumes_with_the_same_adapter_only(tmp_path, base, adapter, data_file):
    cache, merged = tmp_path / "cache", merge_by_hand(tmp_path / "merged", base, adapter)
    command = arguments(base, data_file, cache)
    run_ok(*command, "--adapter", adapter)
    before = tree(cache)
    run_ok(*arguments(merged, data_file, tmp_path / "by-hand"))
    ours, wanted = CacheReader(cache), CacheReader(tmp_path / "by-hand")
    assert len(ours) == len(wanted) > 0
    for i in range(len(ours)):
        found, hand = ours.read(i), wanted.read(i)
        assert torch.equal(found.input_ids, hand.input_ids)
        for ours_, theirs in ((found.context, hand.context), (found.last_hidden, hand.last_hidden)):
            torch.testing.assert_close(ours_, theirs, rtol=1e-2, atol=2e-2)  # stored in bf16
    run_ok(*command, "--adapter", adapter)
    assert tree(cache) == before
    other = make_adapter(tmp_path / "lora-2", base, seed=1)
    (tmp_path / "same-name").mkdir()
    same_name = other.rename(tmp_path / "same-name" / "lora")
    assert_refused(run_cli(*command, "--adapter", same_name), 1, "target.weights")
    assert_refused(run_cli(*command), 1, "target.weights")
    assert tree(cache) == before


@pytest.mark.parametrize("command", ["plan", "capture", "regenerate"])
def test_commands_say_what_is_no_adapter(tmp_path, base, data_file, command):
    out = ["--out", tmp_path / "o.jsonl"] if command == "regenerate" else ["--cache", tmp_path / "cache"]
    line = [command, "--target", base, "--data", data_file, *out, *FP32, "--adapter", base]
    assert_refused(run_cli(*line), 1, "--adapter expects a directory with adapter_config.json", str(base))


def test_an_adapter_as_the_target_is_told_where_it_belongs(adapter, base, tmp_path):
    with pytest.raises(TargetError, match="give its base with --target and this directory with --adapter"):
        resolve_directory(str(adapter))
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", tmp_path / "both")
    with pytest.raises(TargetError, match=r"adapter_config\.json beside config\.json"):
        resolve_directory(str(tmp_path / "both"))


def test_without_peft_the_extra_is_named(base, adapter, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    assert_both_refuse(
        opened(base, adapter), "--adapter needs peft", "pip install 'dspark-pipeline[adapter]'"
    )


def test_every_key_must_be_there_and_known(tmp_path, base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    for name, change in (
        ("missing in the adapter", lambda t: t.pop(key)),
        ("unknown there", lambda t: t.update({key.replace("3.mlp", "9.mlp"): t[key].clone()})),
    ):
        folder = tmp_path / name.split()[0]
        shutil.copytree(adapter, folder)
        changed = dict(tensors)
        change(changed)
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
        assert_both_refuse(
            opened(base, folder), "does not fit LlamaForCausalLM", f"1 of its tensors are {name}"
        )


def test_an_adapter_of_another_target_is_refused(tmp_path, base, adapter):
    wide = make_target(tmp_path / "wide", hidden_size=64, dtype=torch.float32)
    assert_both_refuse(opened(wide, adapter), "does not fit LlamaForCausalLM", "size mismatch")
    deep = make_target(tmp_path / "deep", num_hidden_layers=7, dtype=torch.float32)
    assert_both_refuse(opened(deep, adapter), "missing in the adapter", "layers.6")
    gpt2 = make_target(tmp_path / "gpt2", "gpt2", dtype=torch.float32)
    assert_both_refuse(opened(gpt2, adapter), "does not fit GPT2LMHeadModel")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA"},
        {"peft_type": "PROMPT_TUNING"},
        {"alora_invocation_tokens": [1]},
        {"layer_replication": [[0, 4], [2, 6]]},
        {"init_lora_weights": "pissa_niter_4"},  # its base is what is left of the target's
    ],
    ids=str,
)
def test_what_is_no_sum_to_the_weights_is_refused(tmp_path, base, config):
    folder = make_adapter(tmp_path / "lora", base, **config)
    assert_both_refuse(opened(base, folder), "expected a LoRA adapter", "merge it yourself")


def test_a_changed_embedding_and_head_are_the_caches(tmp_path, base, data_file):
    """With an untied head, the cache's embedding and head are the merged model's."""
    keys = ["model.embed_tokens", "lm_head"]
    folder = make_adapter(tmp_path / "lora", base, ["lm_head"], modules_to_save=["embed_tokens"])
    tensors = load_file(folder / "adapter_model.safetensors")
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 3
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    target = opened(base, folder)
    target.check_weights()
    cache = tmp_path / "cache"
    run_ok(*arguments(base, data_file, cache), "--adapter", folder)
    frozen = CacheReader(cache).frozen()
    merged = load_file(merge_by_hand(tmp_path / "merged", base, only_lora(folder)) / "model.safetensors")
    assert torch.equal(frozen["embed_tokens.weight"].float(), embedding)
    torch.testing.assert_close(frozen["lm_head.weight"].float(), merged[f"{keys[1]}.weight"])
    del tensors["base_model.model.model.embed_tokens.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    assert_both_refuse(opened(base, folder), "missing in the adapter", "embed_tokens")


def only_lora(folder: Path) -> Path:
    """Copy an adapter without the matrices that it holds whole."""
    copied = Path(shutil.copytree(folder, folder.with_name("only-lora")))
    tensors = load_file(copied / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "lora_" in k}, copied / "adapter_model.safetensors")
    return copied


def test_a_tied_head_may_not_be_changed(tmp_path):
    tied = make_target(tmp_path / "tied", tie_word_embeddings=True, dtype=torch.float32)
    folder = make_adapter(
        tmp_path / "lora", tied, ["model.layers.0.self_attn.q_proj"], target_modules=["0.self_attn.q_proj"]
    )
    opened(tied, folder).check_weights()
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("embed_tokens", "lm_head"):
        key = f"base_model.model.{'model.' * (name != 'lm_head')}{name}.weight"
        save_file({**tensors, key: embedding.clone()}, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": [name]}))
        assert_both_refuse(opened(tied, folder), "one matrix", name, "untied head")


def test_another_vocabulary_is_refused(tmp_path, base):
    folder = make_adapter(tmp_path / "lora", base, modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.ones(400, 32)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert_both_refuse(opened(base, folder), "does not fit LlamaForCausalLM", "size mismatch")


def test_a_quantised_base_is_refused(tmp_path, base, adapter):
    folder = tmp_path / "fp8"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="give an unquantised --target"):
        opened(folder, adapter).check_weights()
