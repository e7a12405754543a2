"""Before the first shard: what the proof accepts, and what it refuses by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import pipeline.hooks
from capture.data.conversations import TokenizedSample
from capture.engines.huggingface import HuggingFaceEngine
from capture.engines.proof import PROOF_TOKENS
from capture.engines.proof import prove_states as prove_with_codec
from pipeline.cache import Identity, read_manifest
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.statistics import state_codecs
from pipeline.errors import TargetError
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.pipeline.written import make_identity
from tests.tiny import make_target

LENGTHS = (40, 23)


def sample(length: int, seed: int = 0) -> TokenizedSample:
    ids = np.random.default_rng(seed).integers(3, 250, length).astype(np.int32)
    return TokenizedSample(seed, ids, np.ones(length, dtype=np.uint8))


SAMPLES = [sample(length, seed) for seed, length in enumerate(LENGTHS)]


def prove_target(
    target: HuggingFaceEngine, identity: Identity, samples: list[TokenizedSample]
) -> dict[str, float]:
    """With the last codec of the identity, which needs no statistics here."""
    return prove_with_codec(target, identity, samples, state_codecs(identity, {})[LAST_HIDDEN])


def opened(folder: Path, layer_ids: tuple[int, ...] = (0, 1)) -> tuple[HuggingFaceEngine, Identity]:
    """A target on disk, as a capture has it."""
    target = open_target(TargetOptions(target=str(folder), dtype="float32"))
    identity = dataclasses.replace(make_identity(layer_ids), target=target.identity())
    return HuggingFaceEngine(target.model(), layer_ids), identity


@pytest.fixture(scope="module")
def capped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "gemma2"
    return make_target(
        folder, "gemma2", dtype=torch.float32, num_hidden_layers=3, final_logit_softcapping=0.5
    )


@torch.no_grad()
def teacher_variation(folder: Path, ids: np.ndarray) -> Tensor:
    """Of each row, from Hugging Face alone: its softmax, and that of its head on states rounded to bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    output = model(input_ids=torch.from_numpy(ids).long()[None], output_hidden_states=True)
    rounded = model.lm_head(output.hidden_states[-1][0].bfloat16().float())
    cap = getattr(model.config, "final_logit_softcapping", None)
    rounded = torch.tanh(rounded / cap) * cap if cap else rounded
    return (output.logits[0].softmax(-1) - rounded.softmax(-1)).abs().sum(-1) / 2


@pytest.mark.parametrize("family", ["capped", "fp32_target"])
def test_what_the_proof_measures_is_so(family, request):
    folder = request.getfixturevalue(family)
    target, identity = opened(folder)
    measured = prove_target(target, identity, SAMPLES)
    shortest = min(SAMPLES, key=lambda s: len(s.input_ids))
    own = teacher_variation(folder, shortest.input_ids)
    assert measured["proof.teacher_tv_mean"] == pytest.approx(own.mean().item(), rel=1e-2, abs=1e-6)
    assert measured["proof.teacher_tv_max"] == pytest.approx(own.max().item(), rel=1e-2, abs=1e-6)
    assert measured["proof.teacher_tv_rows"] == min(LENGTHS)
    assert 0 <= measured["proof.padding_error"] < 1e-4
    assert len(measured) == 4


def test_what_the_proof_measured_is_in_the_manifest(cache_dir):
    figures = read_manifest(cache_dir).fidelity
    names = {"proof.teacher_tv_mean", "proof.teacher_tv_max", "proof.teacher_tv_rows", "proof.padding_error"}
    names |= {"proof.perplexity", "proof.shuffled_perplexity", "proof.top1", "proof.supervised_tokens"}
    assert {name for name in figures if name.startswith("proof.")} == names
    assert figures["proof.teacher_tv_mean"] < 0.01


def test_one_sample_alone_and_long_ones_are_proved_too(fp32_target):
    target, identity = opened(fp32_target)
    assert prove_target(target, identity, SAMPLES[:1])["proof.teacher_tv_rows"] == LENGTHS[0]
    long = [sample(400), sample(300)]
    assert prove_target(target, identity, long)["proof.teacher_tv_rows"] == 3 * PROOF_TOKENS // 4


def test_every_layer_id_is_proved(fp32_target):
    with pytest.warns(UserWarning, match="SGLang"):
        target, identity = opened(fp32_target, (-1, 0, 1, 2, 3, 4, 5))
    prove_target(target, identity, SAMPLES)


def test_a_target_in_bf16_is_within_its_rounding(tmp_path):
    folder = make_target(tmp_path / "t", "qwen3")
    target = open_target(TargetOptions(target=str(folder), dtype="bfloat16"))
    identity = dataclasses.replace(make_identity((0, 2, 4)), target=target.identity())
    prove_target(HuggingFaceEngine(target.model(), (0, 2, 4)), identity, SAMPLES)


# The teacher


def test_a_soft_cap_that_is_not_recorded_is_refused(capped):
    target, identity = opened(capped)
    without = dataclasses.replace(
        identity, target=dataclasses.replace(identity.target, final_logit_softcapping=None)
    )
    with pytest.raises(TargetError, match=r"teacher is not the target's.*total variation 0\.\d+.*Gemma2"):
        prove_target(target, without, SAMPLES)


def test_a_scale_that_is_not_recorded_is_refused(tmp_path):
    folder = make_target(tmp_path / "c", "cohere", dtype=torch.float32, num_hidden_layers=3, logit_scale=0.25)
    target, identity = opened(folder)
    prove_target(target, identity, SAMPLES)
    without = dataclasses.replace(identity, target=dataclasses.replace(identity.target, logit_scale=1.0))
    with pytest.raises(TargetError, match="teacher is not the target's"):
        prove_target(target, without, SAMPLES)


def test_a_head_that_does_something_else_with_its_input_is_refused(
    tmp_path, target_dir, data_file, monkeypatch
):
    def biased(module: nn.Linear, states: Tensor) -> Tensor:
        return states.roll(1, dims=-1) @ module.weight.T

    real = nn.Linear.forward

    def forward(module: nn.Linear, states: Tensor) -> Tensor:
        return (biased if module.out_features > 200 else real)(module, states)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    result = run_cli(*capture_arguments(target_dir, data_file, tmp_path / "cache"))
    assert_refused(result, 1, "teacher is not the target's", "LlamaForCausalLM")


# Hooks


def wrong_layers(model: nn.Module, found: Callable = pipeline.hooks.find_layers) -> list[nn.Module]:
    layers = found(model)
    return [*layers[1:], layers[0]]


def before_the_norm(model: nn.Module) -> nn.Module:
    return pipeline.hooks.find_layers(model)[-1]


def after_the_norm_of_a_layer(model: nn.Module) -> nn.Module:
    return pipeline.hooks.find_layers(model)[-1].input_layernorm


@pytest.mark.parametrize(
    ("function", "wrong", "name"),
    [
        ("find_layers", wrong_layers, "layer 0"),
        ("find_final_norm", before_the_norm, "the last hidden state"),
        ("find_final_norm", after_the_norm_of_a_layer, "the last hidden state"),
    ],
)
def test_hooks_on_other_modules_are_refused_by_name(
    tmp_path, target_dir, data_file, monkeypatch, function, wrong, name
):
    monkeypatch.setattr(pipeline.hooks, function, wrong)
    result = run_cli(*capture_arguments(target_dir, data_file, tmp_path / "cache"))
    assert_refused(result, 1, f"{name} as hooked is not", "LlamaForCausalLM", "pipeline/hooks.py")
    assert read_manifest(tmp_path / "cache").status == "incomplete"
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


class Silent(nn.Module):
    """A model of somebody's own that returns no hidden states, whatever it is asked for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config
        self.get_output_embeddings, self.get_input_embeddings = (
            model.get_output_embeddings,
            model.get_input_embeddings,
        )

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return type("Output", (), {"logits": self.lm_head(states)})


def test_a_teacher_from_before_the_final_norm_is_refused_even_of_a_silent_model(fp32_target, monkeypatch):
    whole, identity = opened(fp32_target)
    prove_target(HuggingFaceEngine(Silent(whole.target.model), (0, 1)), identity, SAMPLES)
    monkeypatch.setattr(pipeline.hooks, "find_final_norm", before_the_norm)
    target = HuggingFaceEngine(Silent(whole.target.model), (0, 1))
    with pytest.raises(TargetError, match="teacher is not the target's"):
        prove_target(target, identity, SAMPLES)


# Padding


def leaking(module: nn.Module, args: tuple, output: Any) -> Any:
    """A layer that adds the mean over the row, padding included."""
    states = output[0] if isinstance(output, tuple) else output
    states = states + states.mean(dim=1, keepdim=True) / 10
    return (states, *output[1:]) if isinstance(output, tuple) else states


def test_padding_that_leaks_is_refused_by_name(fp32_target):
    target, identity = opened(fp32_target, (0, 2))
    target.target.model.model.layers[1].register_forward_hook(leaking)
    with pytest.raises(
        TargetError, match=r"layer 2 of a row of 23 tokens changes when other rows share its batch.*Qwen3"
    ):
        prove_target(target, identity, SAMPLES)
    with pytest.raises(TargetError, match="--batch-tokens 2"):
        prove_target(target, identity, SAMPLES)


def test_padding_that_leaks_does_not_matter_to_one_row_at_a_time(fp32_target):
    target, identity = opened(fp32_target, (0, 2))
    target.target.model.model.layers[1].register_forward_hook(leaking)
    prove_target(target, identity, SAMPLES[:1])


def test_a_target_that_padding_leaks_into_is_captured_one_row_at_a_time(
    tmp_path, fp32_target, few, monkeypatch
):
    """What the message says to do helps."""
    real = HuggingFaceEngine.__init__

    def leaky(self: HuggingFaceEngine, model: nn.Module, layer_ids: Any) -> None:
        real(self, model, layer_ids)
        model.model.layers[1].register_forward_hook(leaking)

    monkeypatch.setattr(HuggingFaceEngine, "__init__", leaky)
    result = run_cli(*arguments(fp32_target, few, tmp_path / "cache"))
    assert_refused(result, 1, "lets padding into its states", "layer 2")
    run_ok(*arguments(fp32_target, few, tmp_path / "other", batch_tokens=2))


# Bad states


def test_nan_is_refused_before_the_first_shard(tmp_path, fp32_target):
    target, identity = opened(fp32_target)
    with torch.no_grad():
        target.target.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(TargetError, match=r"layer 1 of the sample at row 2 .* NaN"):
        prove_target(target, identity, SAMPLES)


def test_an_fp32_teacher_is_held_to_what_fp32_can_do(fp32_target):
    """A scale that is slightly wrong hides behind bf16's rounding, but not behind fp32's."""
    target, identity = opened(fp32_target)
    wrong = dataclasses.replace(identity.target, logit_scale=1.05)
    with pytest.raises(TargetError, match=r"expected at most 0\.005") as caught:
        prove_target(target, dataclasses.replace(identity, target=wrong), SAMPLES)
    found = float(str(caught.value).partition("mean total variation ")[2].partition(",")[0])
    assert 0.005 < found < 0.05
