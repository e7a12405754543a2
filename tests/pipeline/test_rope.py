"""RoPE whose frequencies depend on the length: which targets have it, and that a forward is the row's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from capture.batching import plan_capture
from capture.target import HFDSparkTargetModel
from pipeline.rope import LengthRope, RopeLengths, independent_rope, rope_lengths, trained_positions
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.lengths import DYNAMIC, LIMIT, LONGROPE, ROPES, rope_target

LENGTHS = (20, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 9, LIMIT + 40)


@pytest.fixture(scope="module", params=ROPES)
def folder(request, tmp_path_factory) -> Path:
    return rope_target(tmp_path_factory.mktemp("rope") / request.param, request.param)


def model_of(folder: Path) -> nn.Module:
    """The target with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 250, (1, length)))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest of the rows' |got - want| / |want|."""
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


@torch.no_grad()
def alone(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """States of a row in a model that has run nothing else, from transformers alone."""
    return model_of(folder).model(input_ids=ids, use_cache=False).last_hidden_state[0]


def test_rows_batched_across_the_switch_get_other_states(folder):
    """The behaviour of transformers that the plan must avoid, and so the reason for the rule."""
    short, long = ids_of(30), ids_of(LIMIT + 20, 1)
    batch = torch.cat([nn.functional.pad(short, (0, long.shape[1] - 30)), long])
    with torch.no_grad():
        mixed = model_of(folder).model(input_ids=batch, use_cache=False).last_hidden_state[0, :30]
    error = relative_error(mixed, alone(folder, short))
    assert error > 0.01, error


def test_every_planned_batch_gives_each_row_its_own_states(folder):
    target = open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu"))
    lengths = np.repeat(np.array(LENGTHS, np.int32), 2)
    plan = plan_capture(lengths, 100_000, 100_000, rope_lengths(target.config, target.shell))
    assert len(plan.batches) > 1
    assert any(len(batch) > 1 for batch in plan.batches)
    model, worst = HFDSparkTargetModel(target.model(), (1, 3)), 0.0
    for batch in plan.batches:
        rows = [int(plan.order[i]) for i in batch]
        width = int(lengths[rows].max())
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : lengths[row]] = ids_of(lengths[row], row)
        states = model.states(ids)["last_hidden"]
        for i, row in enumerate(rows):
            own = alone(folder, ids_of(lengths[row], row))
            worst = max(worst, relative_error(states[i, : lengths[row]], own))
    assert worst < 1e-5, worst


def test_states_do_not_depend_on_the_rows_before(folder):
    model = HFDSparkTargetModel(model_of(folder), (1, 3))
    for length in (LIMIT + 9, LIMIT + 40, LIMIT + 9, LIMIT, LIMIT + 1, 20, LIMIT + 9):
        ids = ids_of(length)
        assert torch.equal(model.states(ids)["last_hidden"][0], alone(folder, ids)), length


def test_a_target_that_has_run_long_rows_is_put_back(folder):
    used = model_of(folder)
    with torch.no_grad():
        used.model(input_ids=ids_of(LIMIT + 60))
    independent_rope(used)
    independent_rope(used)
    ids = ids_of(LIMIT + 9)
    with torch.no_grad():
        assert torch.equal(used.model(input_ids=ids).last_hidden_state[0], alone(folder, ids))


def test_a_loaded_target_forgets_too(folder):
    """Text is generated, and drafts are measured, by the same loaded target."""
    model = open_target(TargetOptions(target=str(folder), dtype="float32", device="cpu")).model()
    with torch.no_grad():
        model(input_ids=ids_of(LIMIT + 60))
        ids = ids_of(LIMIT + 9)
        found = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    assert torch.equal(found, alone(folder, ids))


# Which targets


def found_in(model_type: str, **values) -> RopeLengths:
    return rope_lengths(AutoConfig.for_model(model_type, **values))


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("llama", {}, ()),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ()),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ()),
        ("gemma3_text", {}, ()),
        ("gpt2", {}, ()),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096},
            (LengthRope("dynamic", 4096, each=True),),
        ),
        (
            "phi3",
            {
                **SMALL,
                "rope_scaling": {"type": "longrope", **FACTORS},
                "original_max_position_embeddings": 4096,
                "max_position_embeddings": 131072,
            },
            (LengthRope("longrope", 4096, each=False),),
        ),
        # Hunyuan's checkpoints say dynamic; their fixed alpha makes the frequencies static.
        ("hunyuan_v1_dense", {"rope_scaling": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}}, ()),
    ],
)
def test_types_are_read_from_the_config(model_type, values, expected):
    assert found_in(model_type, **values).ropes == expected


def test_layers_of_several_types_have_their_own():
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=64)
    config.rope_parameters = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert rope_lengths(config).ropes == (LengthRope("dynamic", 64, each=True),)


class Own(nn.Module):
    """A model with code of its own."""


def config_with(**parameters) -> AutoConfig:
    config = AutoConfig.for_model("llama", max_position_embeddings=64)
    config.rope_parameters = {"rope_theta": 1e4, **parameters}
    return config


def test_an_unknown_type_of_foreign_code_is_batched_by_equal_lengths():
    found = rope_lengths(config_with(rope_type="novel"), Own())
    assert found.ropes == (LengthRope("novel", 0, each=True),)
    lengths = np.array([5, 7, 5, 7, 7])
    plan = plan_capture(lengths, 1000, 1000, found)
    assert [[int(lengths[plan.order[i]]) for i in batch] for batch in plan.batches] == [[7, 7, 7], [5, 5]]
    assert not rope_lengths(config_with(rope_type="yarn"), Own())
    assert not rope_lengths(config_with(rope_type="novel"))


class Growing(nn.Module):
    """A cache of cosines as remote code keeps it, computed anew when a longer row comes."""

    def __init__(self):
        super().__init__()
        self.max_seq_len_cached = 4
        self.register_buffer("cos_cached", torch.full((4,), 4.0), persistent=False)

    def forward(self, length: int) -> torch.Tensor:
        if length > self.max_seq_len_cached:
            self.max_seq_len_cached = length
            self.register_buffer("cos_cached", torch.full((length,), float(length)), persistent=False)
        return self.cos_cached


def test_caches_of_foreign_code_are_put_back_too():
    model = Own()
    model.config, model.rope = config_with(rope_type="dynamic"), Growing()
    independent_rope(model)
    assert [model.rope(n)[0].item() for n in (9, 6, 3, 7)] == [9, 6, 4, 7]


def test_groups_of_two_ropes_are_kept_apart():
    ropes = RopeLengths((LengthRope("longrope", 10, each=False), LengthRope("dynamic", 12, each=True)))
    groups = ropes.groups(np.array([3, 10, 11, 12, 13, 13, 14])).tolist()
    assert [groups.index(group) for group in groups] == [0, 0, 2, 2, 4, 4, 6]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 64),
    ],
)
def test_positions_are_those_that_the_rope_extends_to(parameters, expected):
    assert trained_positions(config_with(**parameters)) == expected


def test_other_targets_keep_their_plan():
    lengths = np.random.default_rng(0).integers(2, 400, 500)
    before, after = plan_capture(lengths, 900, 4000), plan_capture(lengths, 900, 4000, RopeLengths())
    assert before.batches == after.batches
    assert LONGROPE != DYNAMIC
