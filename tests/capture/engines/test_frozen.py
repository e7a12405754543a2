"""Embedding, head and final norm read from a checkpoint, beside an engine that holds the target elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from capture.data.conversations import TokenizedSample
from capture.engines.frozen import FrozenWeights, frozen_weights
from capture.engines.vllm import VllmEngine
from pipeline.errors import TargetError
from pipeline.hooks import find_final_norm
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.test_families import COMMON, TINY_VISION, make_model

IDS = torch.arange(3, 27)[None]
LLAVA = {
    "text_config": {**COMMON, "model_type": "llama"},
    "vision_config": {**TINY_VISION, "model_type": "clip_vision_model"},
}
SINGLE = "model.safetensors"


def read(folder: Path) -> FrozenWeights:
    return frozen_weights(open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu")))


def noisy(model: nn.Module) -> nn.Module:
    """With a final norm that is not the identity."""
    norm = find_final_norm(model)
    for number, parameter in enumerate(norm.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(values)
    return model


def renamed(folder: Path, rename: Callable[[str], str], **more: Tensor) -> None:
    """Save the checkpoint's tensors under other names, and some more."""
    found = load_file(folder / SINGLE)
    save_file({rename(name): t for name, t in found.items()} | more, folder / SINGLE, {"format": "pt"})


@torch.no_grad()
def norm_calls(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The final norm's input and output, and the logits."""
    calls: list[tuple[Tensor, Tensor]] = []
    handle = find_final_norm(model).register_forward_hook(lambda _, a, out: calls.append((a[0], out)))
    logits = model(input_ids=IDS, use_cache=False).logits
    handle.remove()
    ((before, after),) = calls
    return before[0], after[0], logits[0]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("llava", LLAVA),
        ("cohere2", {}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize("shards", ["one file", "many files"])
@torch.no_grad()
def test_they_are_the_targets_own(tmp_path, family, options, shards):
    model = noisy(make_model(family, **options))
    model.save_pretrained(tmp_path, **({} if shards == "one file" else {"max_shard_size": "8KB"}))
    assert (tmp_path / SINGLE).exists() == (shards == "one file")
    found = read(tmp_path)
    assert torch.equal(found.embedding, model.get_input_embeddings().weight)
    assert torch.equal(found.head, model.get_output_embeddings().weight)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (found.head is found.embedding) == tied
    before, after, _ = norm_calls(model)
    assert not torch.allclose(before, after, atol=0.1)
    assert torch.equal(found.norm(before), after)
    assert not any(parameter.requires_grad for parameter in found.norm.parameters())


def plain(name: str) -> str:
    """The model's own name of a tensor, whatever the installed version saves."""
    name = name.replace("language_model.lm_head", "lm_head")
    return name.replace("language_model.model.", "model.language_model.")


def older(name: str) -> str:
    return plain(name).replace("model.language_model.", "language_model.model.")


def flat(name: str) -> str:
    return plain(name).replace("model.language_model.", "").replace("lm_head", "language_model.lm_head")


def deeper(name: str) -> str:
    return f"thinker.{plain(name)}"


@pytest.mark.parametrize("rename", [plain, older, flat, deeper])
def test_other_nestings_of_the_names(tmp_path, rename):
    model = noisy(make_model("llava", **LLAVA))
    model.save_pretrained(tmp_path)
    renamed(tmp_path, rename)
    found = read(tmp_path)
    assert torch.equal(found.embedding, model.get_input_embeddings().weight)
    assert torch.equal(found.head, model.get_output_embeddings().weight)
    assert torch.equal(found.norm.weight, find_final_norm(model).weight)


def assert_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(TargetError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_two_that_it_could_be_are_refused(tmp_path):
    make_model("llava", **LLAVA).save_pretrained(tmp_path)
    other = torch.ones(COMMON["hidden_size"])
    renamed(tmp_path, older, **{"audio_tower.norm.weight": other})
    assert_refused(tmp_path, "norm.weight")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lm_head.weight", lambda t: t[:-1].clone()),
        ("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
        ("lm_head.weight", lambda t: t.to(torch.int8)),
        ("model.embed_tokens.weight", lambda t: t.to(torch.uint8)),
        ("model.norm.weight", lambda t: t[None].clone()),
        ("model.norm.weight", None),
    ],
)
def test_another_shape_and_quantised_values_are_refused(tmp_path, name, change):
    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    value = tensors.pop(name)
    save_file(tensors | ({} if change is None else {name: change(value)}), tmp_path / SINGLE)
    assert_refused(tmp_path, f"no {name}", "as plain values", "another checkpoint")


def test_a_checkpoint_without_safetensors_is_refused(tmp_path):
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "in its safetensors files", "another checkpoint")


def test_a_missing_file_of_several_is_named(tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    weights = json.loads((tmp_path / f"{SINGLE}.index.json").read_text())["weight_map"]
    (tmp_path / weights["lm_head.weight"]).unlink()
    assert_refused(tmp_path, weights["lm_head.weight"], "missing")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "granite", "cohere2"])
@torch.no_grad()
def test_log_probabilities_of_families_that_scale_or_cap_their_logits(tmp_path, family):
    model = noisy(make_model(family))
    model.save_pretrained(tmp_path)
    target = open_target(TargetOptions(target=str(tmp_path), dtype="float32", device="cpu"))
    weights = frozen_weights(target)
    engine = object.__new__(VllmEngine)
    engine._facts, engine.head = target.identity(hash_weights=False), weights.head
    engine.device = torch.device("cpu")
    before, _, logits = norm_calls(model)
    own = logits.log_softmax(-1)[:-1].gather(1, IDS[0, 1:, None])[:, 0]
    sample = TokenizedSample(0, IDS[0].numpy().astype(np.int32), np.ones(IDS.shape[1], np.uint8))
    assert engine.logprob_error(sample, weights.norm(before), own) < 1e-4
    with pytest.raises(TargetError, match="are not vLLM's own"):
        engine.logprob_error(sample, before, own)
    with pytest.raises(TargetError, match="are not vLLM's own"):
        engine.logprob_error(sample, weights.norm(before).flip(0), own)
