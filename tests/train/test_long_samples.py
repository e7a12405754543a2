"""Samples of 32,768 tokens, captured, trained on and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import CacheReader
from tests.conftest import FP32, run_ok
from tests.tiny import WORDS, make_target
from tests.train.memory import Allocations
from tests.train.runs import lines_of, train_arguments
from train.data.split import split
from train.draft.dspark.decoder import DraftDecoder
from train.draft.dspark.model import Qwen3DSparkModel

LENGTH = 32_768
# A step's: 1,024 blocks of 3 slots. In one piece, their mask has 3,072 rows of 35,840 floats: 440 MB.
SETTINGS = {
    "train__batch_tokens": LENGTH,
    "train__anchors_per_batch": 1024,
    "train__held_out": 0.5,
    "train__max_steps": 2,
    "train__eval_anchors": 64,
    "draft__num_layers": 2,
    "draft__sliding_window": 1000,
    "draft__layer_types": '["sliding_attention","full_attention"]',
}


def conversation(seed: int) -> str:
    """A question, and an answer of more than 32,768 tokens."""
    picks = torch.randint(len(WORDS), (27_200,), generator=torch.Generator().manual_seed(seed))
    words = [WORDS[i] for i in picks.tolist()]
    messages = [("user", words[:200]), ("assistant", words[200:])]
    return json.dumps({"messages": [{"role": role, "content": " ".join(text)} for role, text in messages]})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Allocations]]:
    """The folder of a cache and a run, and what each command's tensors took."""
    folder = tmp_path_factory.mktemp("long")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    make_target(folder / "target", num_hidden_layers=2, max_position_embeddings=2 * LENGTH, **small)
    (folder / "chats.jsonl").write_text("\n".join(conversation(seed) for seed in (0, 1)) + "\n")
    where = ["--cache", folder / "cache", "--run", folder / "run", "--device", "cpu"]
    capture = ["--target", folder / "target", "--data", folder / "chats.jsonl", "--cache", folder / "cache"]
    capture += ["--layers", "0", "--max-length", str(LENGTH), "--batch-tokens", str(LENGTH), *FP32]
    watched = {}
    for command in (
        ["capture", *capture],
        train_arguments(folder / "cache", folder / "run", **SETTINGS),
        ["evaluate", *where, "--anchors", "1000"],
    ):
        with Allocations() as watched[str(command[0])]:
            run_ok(*command)
    return folder, watched


def test_no_tensor_is_as_long_as_the_square(done: tuple[Path, dict[str, Allocations]]) -> None:
    """The largest is a group's mask in floats, 192 rows of 32,960, and a mask of 32,768 squared has a GiB."""
    for command, mode in done[1].items():
        assert LENGTH * 4 < mode.largest < 40e6, (command, mode.largest, mode.made_by)


def test_figures_reach_to_the_end_of_the_longest_sample(done: tuple[Path, dict[str, Allocations]]) -> None:
    folder, _ = done
    reader = CacheReader(folder / "cache")
    assert reader.lengths.tolist() == [LENGTH, LENGTH]
    assert lines_of(folder / "run")[0]["loss"] > 0
    evaluation = json.loads((folder / "run" / "best" / "evaluation.json").read_text())
    bounds = [tuple(map(int, name.split("-"))) for name in evaluation["by_context"]]
    assert [low for low, _ in bounds] == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert bounds[-1][1] == LENGTH - 1
    assert sum(group["blocks"] for group in evaluation["by_context"].values()) == evaluation["blocks"] == 1000


def test_a_block_far_from_the_start_is_decoded_as_it_is_trained(
    done: tuple[Path, dict[str, Allocations]],
) -> None:
    folder, _ = done
    reader = CacheReader(folder / "cache")
    (own,) = split(reader, 0.5)[1]
    sample = reader.read(int(own), reader.layer_ids)
    model = Qwen3DSparkModel.from_pretrained(folder / "run" / "best").eval()
    frozen = reader.frozen()
    model.initialize_embeddings_and_head(frozen["embed_tokens.weight"], frozen["lm_head.weight"])
    anchors = torch.from_numpy(np.linspace(300, LENGTH - 5, 200).astype(np.int64))[None]
    keep = torch.ones_like(anchors, dtype=torch.bool)
    ids, context = sample.input_ids.long(), sample.context.float()
    with torch.no_grad():
        blocks = model.draft_blocks(ids[None], context[None], torch.ones(1, LENGTH), anchors, keep)
    decoder = DraftDecoder(model)
    for i in (0, 99, 199):
        anchor = int(anchors[0, i])
        decoder.extend(context[decoder.length : anchor])
        torch.testing.assert_close(
            decoder.block_states(ids[anchor]), blocks.hidden[0, i], rtol=1e-3, atol=1e-4
        )
