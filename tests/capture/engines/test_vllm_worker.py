"""vLLM's worker beside Hugging Face, in a real vLLM. Run by hand: `pytest -m vllm`, four minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.capture.engines.vllm_worker import Driver
from tests.tiny import make_target

pytestmark = pytest.mark.vllm
LAYERS = [0, 3, 6]  # the embedding's output, the stream before layer 3, the last stream before the norm
# A chunk of prefill, and a cache that does not hold four answers: some are preempted and computed anew.
SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "block_size": 32, "num_gpu_blocks_override": 12}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with heads as large as vLLM's kernels for CPUs take them."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return make_target(tmp_path_factory.mktemp("target") / "tiny", dtype=torch.float32, **heads)


class Reference:
    """The same target in Hugging Face."""

    def __init__(self, target: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    @torch.no_grad()
    def states(self, tokens: list[int]) -> torch.Tensor:
        """Return the streams of LAYERS, `[T, L, H]`."""
        last = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0]))
        found = self.model.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        hook.remove()
        return torch.stack([found.hidden_states[0], found.hidden_states[3], last[0]], 2)[0]

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Return the most likely answer."""
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[-count:]


@pytest.fixture(scope="module")
def reference(target: Path) -> Reference:
    return Reference(target)


@contextmanager
def at_work(folder: Path, target: Path, **config) -> Iterator[Driver]:
    driver = Driver(folder, target, layers=LAYERS, **config)
    try:
        yield driver
    finally:
        driver.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, target: Path) -> Iterator[Driver]:
    with at_work(tmp_path_factory.mktemp("worker") / "rows", target, arguments=SMALL, stop=[]) as driver:
        facts = driver.ready()
        assert facts["version"].startswith("0.")
        assert (facts["quantization"], facts["implementation"]) == (None, "vllm")
        assert facts["max_model_len"] == 300
        yield driver


def made_up(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def assert_same(states: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of sums: 2e-5 of the largest value of a layer."""
    assert states.shape == expected.shape
    for layer, (mine, theirs) in enumerate(zip(states.unbind(1), expected.unbind(1), strict=True)):
        worst = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        assert worst < 2e-5, f"layer {LAYERS[layer]}: {worst}"
    assert torch.equal(states[:, 0], expected[:, 0]), "the embedding's output is looked up"


def test_states_and_logprobs_are_hugging_faces(driver: Driver, reference: Reference) -> None:
    """Of prompts shorter and longer than a block and a chunk, many at once."""
    prompts = {i: made_up(n, n) for i, n in enumerate([1, 2, 3, 17, 31, 32, 33, 63, 64, 65, 128, 129, 200])}
    for number, tokens in prompts.items():
        driver.send(number, tokens, logprobs=True)
    replies = driver.read_all(len(prompts))
    for number, tokens in prompts.items():
        reply = replies[number]
        assert (reply["answer"], reply["reason"], reply["rows"]) == ([], "length", True)
        ids, states = driver.rows(number)
        assert ids == tokens
        assert_same(states, reference.states(tokens))
        with torch.no_grad():
            logits = reference.model.lm_head(reference.model.model.norm(states[:-1, -1]))
        known = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:], dtype=torch.long)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply["logprobs"]), known, rtol=1e-4, atol=1e-4)
    assert not list(driver.folder.iterdir())


def test_prompts_that_begin_alike(driver: Driver, reference: Reference) -> None:
    """100 shared tokens, one after the other and at once: none is taken from a cache."""
    shared = made_up(100, 7)
    prompts = {i: shared + made_up(10 * i, i) for i in range(6)}
    for number in (5, 0):
        driver.send(number, prompts[number])
        driver.read_all(1)
        assert_same(driver.rows(number)[1], reference.states(prompts[number]))
    for number, tokens in prompts.items():
        driver.send(number, tokens)
    driver.read_all(len(prompts))
    for number, tokens in prompts.items():
        assert_same(driver.rows(number)[1], reference.states(tokens))


def test_answers_and_their_states_in_one_pass(driver: Driver, reference: Reference) -> None:
    """Under a cache too small for them: rows are those of another prefill, preempted or not."""
    greedy = {"max_new_tokens": 100}
    sampled = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
    ways = [greedy, {**sampled, "seed": 1}, {**sampled, "seed": 2}, {**sampled, "top_k": 0, "top_p": 1.0}]
    prompts = {i: made_up(20 + 9 * i, i) for i in range(8)}
    for number, tokens in prompts.items():
        driver.send(number, tokens, **ways[number % 4])
    replies = driver.read_all(len(prompts))
    whole = {}
    for number, tokens in prompts.items():
        reply = replies[number]
        assert (len(reply["answer"]), reply["reason"], reply["rows"]) == (100, "length", True)
        whole[number] = tokens + reply["answer"][:-1]
        ids, states = driver.rows(number)
        assert ids == whole[number], "every token but the last, which no forward has read"
        assert_same(states, reference.states(ids))
    assert replies[0]["answer"] == reference.greedy(prompts[0], 100)
    for number, tokens in whole.items():  # the other rows of these are of whole prompts
        driver.send(number, tokens)
    driver.read_all(len(whole))
    for number, tokens in whole.items():
        assert_same(driver.rows(number)[1], reference.states(tokens))


def test_a_seed_decides_an_answer_and_not_its_company(driver: Driver) -> None:
    way = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 5, "keep": False}
    tokens = made_up(12, 1)
    driver.send(0, tokens, **way)
    alone = driver.read()
    for number in range(1, 4):
        driver.send(number, tokens, **way | {"seed": 5 if number == 2 else number + 5})
    together = driver.read_all(3)
    assert alone["rows"] is False
    assert together[2]["answer"] == alone["answer"]
    assert len({tuple(reply["answer"]) for reply in together.values()}) == 3
    assert not list(driver.folder.iterdir()), "no rows were asked for"


def test_the_end_of_the_context(driver: Driver, reference: Reference) -> None:
    """A request near it is short, or refused, and takes no rows from others of its step."""
    near, others = made_up(290, 3), {i: made_up(30, i) for i in range(1, 4)}
    driver.send(0, near, max_new_tokens=50)
    for number, tokens in others.items():
        driver.send(number, tokens, max_new_tokens=20)
    driver.send(10, made_up(299, 4))
    driver.send(11, made_up(300, 4))
    driver.send(12, [])
    driver.send(13, [3, 100_000])
    driver.send(14, made_up(296, 4), max_new_tokens=1)
    replies = driver.read_all(9)
    assert (len(replies[0]["answer"]), replies[0]["reason"]) == (6, "length")
    for number, tokens in {0: near, **others}.items():
        ids, states = driver.rows(number)
        assert ids == tokens + replies[number]["answer"][:-1]
        assert_same(states, reference.states(ids))
    assert_same(driver.rows(10)[1], reference.states(made_up(299, 4)))
    assert "300 tokens leave no room for another in a context of 300" in replies[11]["error"]
    assert "expected one or more token ids from 0 to " in replies[12]["error"]
    assert "expected one or more token ids from 0 to " in replies[13]["error"]
    assert "296 tokens leave no room" in replies[14]["error"]


def test_stops_errors_and_the_end(tmp_path: Path, target: Path, reference: Reference) -> None:
    """The generation config's stop token ends an answer, a file that can't be written gives an error, and the
    end of stdin ends everything.
    """
    tokens = made_up(9, 9)
    answer = reference.greedy(tokens, 12)
    copy = shutil.copytree(target, tmp_path / "target")
    stops = {"eos_token_id": [answer[5], 2]}
    (copy / "generation_config.json").write_text(json.dumps(stops))
    with at_work(tmp_path / "rows", copy) as driver:
        driver.ready()
        driver.send(0, tokens, max_new_tokens=12)
        reply = driver.read()
        first = next(i for i, token in enumerate(answer) if token in stops["eos_token_id"])
        assert (reply["answer"], reply["reason"]) == (answer[: first + 1], "stop")
        assert driver.rows(0)[0] == tokens + answer[:first]
        (driver.folder / "1.safetensors").mkdir()
        (driver.folder / "1.safetensors" / "x").touch()
        driver.send(1, tokens)
        driver.send(2, tokens)
        driver.read_all(2)
        assert "Is a directory" in driver.wait_for("1.error").read_text()
        assert_same(driver.rows(2)[1], reference.states(tokens))
        driver.process.stdin.close()
        assert driver.ended(60) == 0
        assert {path.name for path in driver.folder.iterdir()} == {"1.safetensors", "1.error"}


def test_a_folder_that_goes_ends_everything(tmp_path: Path, target: Path) -> None:
    with at_work(tmp_path / "rows", target) as driver:
        driver.ready()
        driver.folder.rmdir()
        driver.send(0, made_up(9, 9))
        replies = [driver.read(), driver.read()]
        fatal = next(reply["fatal"] for reply in replies if "fatal" in reply)
        assert f"{driver.folder} is gone" in fatal
        assert driver.ended(60) == 1


@pytest.mark.parametrize(("victim", "busy"), [("VLLM::EngineCor", True), ("VLLM::Worker", False), ("", True)])
def test_killed_processes_take_the_others_with_them(
    tmp_path: Path, target: Path, victim: str, busy: bool
) -> None:
    with at_work(tmp_path / "rows", target) as driver:
        driver.ready()
        for number in range(100 if busy else 0):
            driver.send(number, made_up(200, number), max_new_tokens=50)
        names = driver.processes()
        os.kill(names[victim] if victim else driver.process.pid, signal.SIGKILL)
        code = driver.ended(60)
        assert code == (1 if victim else -signal.SIGKILL)
        replies = list(iter(driver.read, None))
        assert ("ended" in replies[-1]["fatal"]) if victim else not replies


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layers": [0, 3, 7]}, "the last id of this target is 6"),
        ({"layers": [3, 0]}, "expected different ids from 0 on, in ascending order"),
        ({"arguments": {"no_such": 1}}, "no_such"),
        ({"arguments": {"enable_prefix_caching": True}}, "a cached prefix has no states"),
    ],
)
def test_what_can_not_be_started(tmp_path: Path, target: Path, config: dict, says: str) -> None:
    driver = Driver(tmp_path / "rows", target, **config)
    try:
        assert says in driver.read()["fatal"]
        assert driver.ended(60) == 1
    finally:
        driver.close()
