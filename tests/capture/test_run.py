"""The capture loop, through the command line: what is in the cache, and which states are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, in_data_order
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_conversations, make_target

ALL_LAYERS = (-1, 0, 1, 2, 3, 4, 5)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *strings(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory, fp32_target: Path, few: Path) -> Path:
    """Every layer id of an fp32 target, small batches of several rows."""
    cache = tmp_path_factory.mktemp("cache") / "full"
    result = run_cli(*arguments(fp32_target, few, cache, layers=",".join(map(str, ALL_LAYERS))))
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if "SGLang" in line] == [
        f"warning: target layer ids [-1, {ALL_LAYERS[-1]}] lie outside [0, {ALL_LAYERS[-2]}]: "
        "a draft that reads them can't be served by SGLang"
    ]
    return cache


def open_cache(path: Path) -> CacheReader:
    with pytest.warns(UserWarning, match="SGLang"):
        return CacheReader(path)


def hf_states(model: Any, input_ids: Tensor) -> tuple[Tensor, ...]:
    """Hugging Face's hidden states of one sample alone, `[S, H]` each."""
    with torch.no_grad():
        output = model(input_ids=input_ids.long()[None], output_hidden_states=True, use_cache=False)
    return tuple(state[0] for state in output.hidden_states)


def assert_one_ulp(got: Tensor, want: Tensor, what: str) -> None:
    """`got` is `want` rounded to bf16, a neighbouring bf16 number where batching moved it across."""
    assert got.dtype == torch.bfloat16
    # The step between bf16 numbers is at most 2^-7 of their size; atol covers fp32 sums near zero.
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-5, msg=lambda m: f"{what}: {m}")
    assert (got == want.to(torch.bfloat16)).float().mean() > 0.99, what


def test_cached_states_are_hf_hidden_states_of_each_sample_alone(full_cache, fp32_target, few):
    reader = open_cache(full_cache)
    model = AutoModelForCausalLM.from_pretrained(fp32_target, dtype=torch.float32).eval()
    width = model.config.hidden_size
    assert reader.manifest.identity.target.dtype == "float32"
    assert len(reader) == len(few.read_text().splitlines())
    assert len(reader.manifest.plan) > 1
    for i in range(len(reader)):
        sample = reader.read(i)
        states = hf_states(model, sample.input_ids)
        assert len(states) == len(ALL_LAYERS)
        for layer_id, got in zip(ALL_LAYERS, sample.context.split(width, dim=-1), strict=True):
            assert_one_ulp(got, states[layer_id + 1], f"sample {i} layer {layer_id}")
        assert torch.equal(sample.context[:, :width], states[0].to(torch.bfloat16))
        mask = sample.loss_mask.tolist()
        labels = [t for t in range(1, len(mask)) if mask[t]]
        assert sample.last_positions.tolist() == [t - 1 for t in labels]
        assert_one_ulp(sample.last_hidden, states[-1][[t - 1 for t in labels]], f"sample {i} last hidden")
        assert mask[-1] == 1


def test_cached_tokens_are_the_rendered_conversations(full_cache, fp32_target, few):
    tokenizer = AutoTokenizer.from_pretrained(fp32_target)
    reader = open_cache(full_cache)
    for i, line in zip(in_data_order(full_cache), few.read_text().splitlines(), strict=True):
        messages = json.loads(line)["messages"]
        text = tokenizer.decode(reader.read(i).input_ids.tolist())
        assert text == tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_are_the_targets(tmp_path, few, tied, dtype):
    target = make_target(
        tmp_path / "t", "qwen3", dtype=dtype, num_hidden_layers=3, tie_word_embeddings=tied, seed=4
    )
    run_ok(*arguments(target, few, tmp_path / "cache", layers="0,1"))
    model = AutoModelForCausalLM.from_pretrained(target)
    stored = load_file(tmp_path / "cache" / "target" / "frozen.safetensors")
    assert set(stored) == ({"embed_tokens.weight"} if tied else {"embed_tokens.weight", "lm_head.weight"})
    assert all(weight.dtype == dtype for weight in stored.values())
    frozen = CacheReader(tmp_path / "cache").frozen()
    assert torch.equal(frozen["embed_tokens.weight"].to(dtype), model.get_input_embeddings().weight)
    assert torch.equal(frozen["lm_head.weight"].to(dtype), model.get_output_embeddings().weight)
    assert torch.equal(frozen["lm_head.weight"], frozen["embed_tokens.weight"]) == tied


def test_teacher_from_the_cache_is_the_targets_own(full_cache, fp32_target):
    """lm_head over the stored rows gives the model's next-token distribution at the label positions."""
    reader = open_cache(full_cache)
    model = AutoModelForCausalLM.from_pretrained(fp32_target, dtype=torch.float32).eval()
    head = reader.frozen()["lm_head.weight"].float()
    for i in range(4):
        sample = reader.read(i)
        with torch.no_grad():
            want = model(input_ids=sample.input_ids.long()[None]).logits[0, sample.last_positions].softmax(-1)
        got = (sample.last_hidden.float() @ head.T).softmax(-1)
        assert ((got - want).abs().sum(-1) / 2).max() < 0.05


def test_the_target_folder_loads_without_weights(full_cache, fp32_target):
    folder = full_cache / "target"
    assert AutoConfig.from_pretrained(folder).hidden_size == 32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(fp32_target)
    messages = [{"role": "user", "content": "why is the sky blue"}]
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert [p.name for p in folder.glob("*.safetensors")] == ["frozen.safetensors"]


def test_gemma2_softcap_and_scale_are_recorded_and_the_cap_is_in_the_teacher(tmp_path, few):
    target = make_target(
        tmp_path / "g", "gemma2", dtype=torch.float32, num_hidden_layers=4, final_logit_softcapping=2.0
    )
    output = run_ok(*arguments(target, few, tmp_path / "cache", layers="0,2"))
    identity = read_manifest(tmp_path / "cache").identity.target
    assert identity.final_logit_softcapping == 2.0
    assert identity.embedding_scale == pytest.approx(32**0.5)
    assert identity.tied_embeddings
    assert read_manifest(tmp_path / "cache").fidelity["proof.teacher_tv_max"] < 0.02
    assert "Gemma2ForCausalLM" in output


def test_rows_are_accounted_for(tmp_path, target_dir):
    data = make_conversations(tmp_path / "chats.jsonl", count=3)
    with data.open("a") as file:
        file.write('\n{"messages": [{"role": "user", "content": "why"}]}\n')
    output = run_ok(*arguments(target_dir, data, tmp_path / "cache"))
    rows = read_manifest(tmp_path / "cache").rows
    assert rows["read"] == 4
    assert rows["captured"] == 3
    assert sum(rows.values()) == 4 + 4  # read once, and each of the four captured or dropped
    assert "read 4" in output


def test_a_cache_can_be_moved_and_names_no_absolute_path(cache_dir, target_dir, data_file):
    text = (cache_dir / "manifest.json").read_text()
    found = list(strings(json.loads(text)))
    assert found
    places = [str(target_dir.parent), str(data_file.parent), str(cache_dir.parent), str(Path.home())]
    for value in found:
        assert not Path(value).is_absolute(), value
        assert "\\" not in value
        assert ".." not in value.split("/"), value
        assert not any(place in value for place in places), value


# Wrong states


def poisoned(target: Path, folder: Path, name: str, change) -> Path:
    shutil.copytree(target, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name].clone())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fill_nan(weight: Tensor) -> Tensor:
    return weight.fill_(float("nan"))


def test_nan_weights_are_refused_naming_layer_and_row(tmp_path, target_dir, data_file):
    target = poisoned(target_dir, tmp_path / "bad", "model.layers.2.mlp.down_proj.weight", fill_nan)
    result = run_cli(*capture_arguments(target, data_file, tmp_path / "cache"))
    assert_refused(result, 1, "layer 2", "row ", "NaN")
    assert read_manifest(tmp_path / "cache").status == "incomplete"


def test_a_nan_that_only_a_later_row_meets_names_that_row(tmp_path, target_dir):
    rows = [
        [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "the cat sat"}],
        [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "the dog Z ran"}],
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps({"messages": m}) for m in (rows[0], rows[0], rows[1])))
    (token,) = AutoTokenizer.from_pretrained(target_dir)("Z", add_special_tokens=False)["input_ids"]

    def one_row(weight: Tensor) -> Tensor:
        weight[token] = float("nan")
        return weight

    target = poisoned(target_dir, tmp_path / "bad", "model.embed_tokens.weight", one_row)
    result = run_cli(*capture_arguments(target, data, tmp_path / "cache"))
    assert_refused(result, 1, "layer 0", "row 3 of chats.jsonl", "NaN", "--bad-states skip")


def test_all_zero_states_are_refused(tmp_path, target_dir, data_file):
    target = poisoned(target_dir, tmp_path / "bad", "model.norm.weight", torch.zero_)
    result = run_cli(*capture_arguments(target, data_file, tmp_path / "cache"))
    assert_refused(result, 1, "last hidden", "all zero", "row ")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})],
    ids=["cohere", "granite"],
)
def test_a_family_that_scales_its_logits_is_captured_with_the_scale(tmp_path, few, family, overrides):
    target = make_target(tmp_path / family, family, dtype=torch.float32, num_hidden_layers=3, **overrides)
    run_ok(*arguments(target, few, tmp_path / "cache", layers="0,1"))
    assert CacheReader(tmp_path / "cache").manifest.identity.target.logit_scale == 0.25
