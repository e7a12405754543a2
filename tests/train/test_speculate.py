"""`dspark speculate` on the tiny target, its prompts, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, DataError, RunError
from tests.conftest import FP32, assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_target, make_tokenizer
from tests.train.runs import train_arguments
from train.data.split import split
from train.decode.benchmark import _add_up, _check_partings, _parting, offline_figures
from train.decode.prompts import held_out_prompts, read_prompts
from train.decode.speculative import Decoded
from train.decode.target import CachedTarget
from train.runs.figures import Parting
from train.runs.names import EVALUATION, SPECULATION
from train.runs.open import find_checkpoint
from train.runs.results import json_values, read_evaluation, read_speculation


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=60))
    return run


V = 325


def speculated(target: Path, run: Path, *options: str | Path) -> dict:
    return json.loads(run_ok("speculate", "--target", target, "--run", run, *FP32, "--json", *options))


def test_greedy_text_of_fifty_prompts_is_the_targets_own(
    target_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Through the command line, as text, against transformers' generate."""
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"prompt": f"why is the {a} {b} on {c}"} for a in ("cat", "dog", "sky", "mat", "blue") for b in
             ("sat", "ran") for c in ("the", "two", "a", "green", "three")]  # fmt: skip
    assert len(asked) == 50
    prompts.write_text("\n".join(map(json.dumps, asked)))
    options = ("--prompts", prompts, "--num-prompts", "50", "--max-new-tokens", "16", "--temperature", "0")
    text = run_ok("speculate", "--target", target_dir, "--run", run_dir, *FP32, "--show", *options)
    result = json.loads((find_checkpoint(run_dir) / SPECULATION).read_text())
    (run,) = result["runs"]
    assert (result["prompts"], run["identical"], run["partings"]) == (50, 50, [])
    assert 1 <= run["tokens_per_round"] <= 4
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    expected = ""
    for row in asked:
        message = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        own = out[0, ids.shape[1] :]
        expected += f"> {tokenizer.decode(ids[0])}\n{tokenizer.decode(own)}\n\n"

    assert text.startswith(expected)
    assert "for 50 of 50 prompts" in text


def test_a_target_whose_checkpoint_lacks_a_weight_is_refused(
    target_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    key = "model.layers.2.mlp.down_proj.weight"
    folder = shutil.copytree(target_dir, tmp_path / "t")
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "why"}))
    refused = run_cli("speculate", "--target", folder, "--run", run_dir, *FP32, "--prompts", prompts)
    assert_refused(refused, 1, "1 weights of LlamaForCausalLM are missing in the checkpoint", key)
    assert refused.stdout == ""


def test_live_beside_offline(target_dir: Path, run_dir: Path, cache_dir: Path) -> None:
    """The figures lie beside the draft, with those of `dspark evaluate` at the temperatures that it knows."""
    options = ("--cache", cache_dir, "--num-prompts", "2", "--max-new-tokens", "12", "--temperature", "0")
    more = ("--temperature", "1", "--temperature", "0.5")
    assert [run["offline"] for run in speculated(target_dir, run_dir, *options)["runs"]] == [None]
    run_ok("evaluate", "--cache", cache_dir, "--run", run_dir)
    result = speculated(target_dir, run_dir, *options, *more)
    folder = find_checkpoint(run_dir)
    assert json.loads((folder / SPECULATION).read_text()) == result
    read = read_speculation(folder)
    assert read is not None
    assert json.loads(json.dumps(json_values(read))) == result
    evaluation = json.loads((folder / EVALUATION).read_text())
    greedy, sampled, other = result["runs"]
    assert greedy["offline"] == evaluation["decoding"]["greedy"]
    assert sampled["offline"] == evaluation["decoding"]["sampling"]
    assert other["offline"] is None
    assert [run["identical"] for run in result["runs"]] == [2, None, None]
    text = run_ok("speculate", "--target", target_dir, "--run", run_dir, *FP32, *options)
    assert "live  offline" in text
    assert f"{evaluation['decoding']['greedy']['tokens_per_round']:.3f}" in text
    some = read_evaluation(folder)
    assert some is not None
    assert offline_figures(some, 1.0, 3) == some.decoding.sampling
    assert offline_figures(some, 1.0, 4) is None  # of a draft with other blocks


def test_a_damaged_evaluation_is_told_before_any_work(
    target_dir: Path, run_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    monkeypatch.setattr("train.decode.benchmark.speculate", pytest.fail)
    options = ("--target", target_dir, "--run", run, "--cache", cache_dir, *FP32)
    for content in ("{", "[]", '{"step": 60, "tau": "high"}'):
        (find_checkpoint(run) / EVALUATION).write_text(content)
        refused = run_cli("speculate", *options)
        assert_refused(refused, 1, str(find_checkpoint(run) / EVALUATION), "can't be read", "measure again")
    assert_refused(refused, 1, "evaluation.tau: expected float, got 'high'")


def test_live_acceptance_is_what_the_cache_promises(target_dir: Path, tmp_path: Path) -> None:
    """Text that the target says itself at temperature 1, captured and evaluated: the same acceptance.

    Two ways to one number, as far as 300 rounds tell; exact checks are in test_decoding.py, test_live.py.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    rows = []
    for length in range(3, 8):
        prompts = torch.randint(3, 300, (8, length))
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None}
        ones = torch.ones_like(prompts)
        texts = model.generate(prompts, attention_mask=ones, max_new_tokens=40, **sampling)
        mask = [0] * length + [1] * (texts.shape[1] - length)
        rows += [{"input_ids": text, "loss_mask": mask} for text in texts.tolist()]
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    cache, run = tmp_path / "cache", tmp_path / "run"
    run_ok(*capture_arguments(target_dir, data, cache), "--dtype", "float32")
    run_ok(*train_arguments(cache, run, train__max_steps=80, train__held_out=0.5))
    evaluation = json.loads(run_ok("evaluate", "--cache", cache, "--run", run, "--json"))
    options = ("--num-prompts", "20", "--max-new-tokens", "60", "--temperature", "1")
    (live,) = speculated(target_dir, run, "--cache", cache, *options)["runs"]
    assert live["rounds"] > 300
    # Three standard deviations of a mean of 300 rounds of 0 to 3 tokens.
    expected = evaluation["decoding"]["sampling"]
    assert live["tokens_per_round"] == pytest.approx(expected["tokens_per_round"], abs=0.17)
    assert live["accept_given_prefix"][0] == pytest.approx(expected["accept_given_prefix"][0], abs=0.09)
    assert evaluation["tau"] > 1.15, "too bad a draft to tell anything"


def test_a_threshold_verifies_less(target_dir: Path, run_dir: Path, cache_dir: Path) -> None:
    options = ("--cache", cache_dir, "--num-prompts", "3", "--max-new-tokens", "24", "--temperature", "0")
    whole, some, none = (
        speculated(target_dir, run_dir, *options, "--threshold", threshold)["runs"][0]
        for threshold in ("0", "0.3", "1")
    )
    assert whole["verified_per_round"] > some["verified_per_round"] >= none["verified_per_round"] == 0
    assert none["tokens_per_round"] == 1
    assert some["identical"] == whole["identical"] == none["identical"] == 3


def test_another_targets_draft_is_said_or_refused(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    options = ("--run", run_dir, "--cache", cache_dir, "--num-prompts", "1", "--max-new-tokens", "4", *FP32)
    tuned = make_target(tmp_path / "tuned", seed=9)
    result = run_cli("speculate", "--target", tuned, *options)
    assert result.exit_code == 0, result.output
    assert "warning: the draft was trained for tiny-llama and tuned has other weights" in result.stderr
    wider = make_target(tmp_path / "wider", hidden_size=64)
    refused = run_cli("speculate", "--target", wider, *options)
    assert_refused(refused, 1, "hidden_size 64", "for 32", "tiny-llama")


def test_usage(target_dir: Path, run_dir: Path, cache_dir: Path, data_file: Path, tmp_path: Path) -> None:
    command = ("speculate", "--target", target_dir, "--run", run_dir, *FP32)
    assert_refused(run_cli(*command), 2, "--prompts FILE or --cache")
    assert_refused(run_cli("speculate", "--run", run_dir), 2, "--target")
    assert_refused(run_cli(*command, "--prompts", tmp_path / "none.txt"), 1, "none.txt can't be read")
    odd = {
        "--temperature": ("nan", "inf", "-1", "1e-30"),
        "--threshold": ("nan", "-1", "2"),
        "--seed": ("-1",),
    }
    for option, values in odd.items():
        for value in values:
            assert_refused(run_cli(*command, "--cache", cache_dir, option, value), 2, option)
    other = make_target(tmp_path / "other", seed=4)
    run_ok(*capture_arguments(other, data_file, tmp_path / "others"))
    refused = run_cli(*command, "--cache", tmp_path / "others")
    assert_refused(refused, 1, "tiny-llama", "other", "with other weights")
    # Not one JSON object and texts in one stream.
    show = run_cli(
        *command, "--cache", cache_dir, "--num-prompts", "1", "--max-new-tokens", "2", "--json", "--show"
    )
    assert json.loads(show.stdout)["prompts"] == 1
    assert "\n> " in show.stderr  # after the lines on what is opened and loaded
    plain = tmp_path / "plain"
    settings = {"draft__confidence_head": "false", "train__max_steps": 1}
    run_ok(*train_arguments(cache_dir, plain, **settings))
    refused = run_cli(
        "speculate", "--target", target_dir, "--run", plain, "--cache", cache_dir, *FP32, "--threshold", "0.5"
    )
    assert_refused(refused, 2, "--threshold needs a confidence head")
    damaged = tmp_path / "damaged"
    shutil.copytree(run_dir, damaged)
    (damaged / "latest" / "model.safetensors").write_bytes(b"1234")
    (damaged / "best" / "model.safetensors").write_bytes(b"1234")
    refused = run_cli("speculate", "--target", target_dir, "--run", damaged, "--cache", cache_dir, *FP32)
    assert_refused(refused, 1, "best is damaged")


def test_positions_that_the_target_never_learned_are_refused(tmp_path: Path, data_file: Path) -> None:
    shape = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 256, "max_position_embeddings": 256}
    target = make_target(tmp_path / "gpt2", "gpt2", **shape)
    cache, run = tmp_path / "cache", tmp_path / "run"
    run_ok(*capture_arguments(target, data_file, cache), "--max-length", "200")
    run_ok(*train_arguments(cache, run, train__max_steps=1))
    command = ("speculate", "--target", target, "--run", run, "--cache", cache, *FP32, "--max-new-tokens")
    assert_refused(run_cli(*command, "300"), 1, "learned 256 positions", "--max-new-tokens")
    run_ok(*command, "4", "--num-prompts", "1")


def test_what_is_added_up_by_hand() -> None:
    plain = [Decoded([1, 2, 3], seconds=0.2), Decoded([1], seconds=0.0)]
    fast = [
        Decoded([1, 2, 3], seconds=0.3, rounds=1, emitted=2, verified=2, tried=[1, 1], accepted=[1, 0],
                draft_seconds=0.1, verify_seconds=0.2),
        Decoded([1], tried=[0, 0], accepted=[0, 0]),
    ]  # fmt: skip
    parting = Parting(prompt=1, token=0, gap=0.0)
    figures = _add_up(0.0, plain, fast, [parting])
    assert figures.tokens_per_round == 2
    assert figures.accept_given_prefix == (1.0, 0.0)
    assert figures.verified_per_round == 2
    assert (figures.draft_ms, figures.verify_ms) == pytest.approx((100, 200))
    assert (figures.plain_ms, figures.speculative_ms) == pytest.approx((100, 150))
    assert figures.speedup == pytest.approx(2 / 3)
    assert (figures.identical, figures.partings) == (1, (parting,))
    nothing = _add_up(1.0, [Decoded([1])], [Decoded([1], tried=[0], accepted=[0])], [])
    assert nothing.speedup is None
    assert nothing.tokens_per_round is None
    assert nothing.identical is None  # sampled texts may differ


def test_texts_that_part_where_the_target_was_sure_are_an_error(target_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[9, 8, 4]])).logits[0, -1].sort(descending=True).values
    with CachedTarget(model, []) as target:
        found = _parting(target, 3, [9, 8], [4, 5, 6], [4, 7, 6])
        assert (found.prompt, found.token) == (3, 1)
        assert found.gap == pytest.approx((logits[0] - logits[1]).item(), rel=1e-4)
        assert _parting(target, 0, [9, 8], [4, 5, 6], [4]).token == 1
    close = Parting(prompt=3, token=1, gap=0.5)
    _check_partings([close], torch.bfloat16)
    _check_partings([], torch.float32)
    with pytest.raises(RunError, match=r"prompt 4 at token 2, where .* 0.5 apart"):
        _check_partings([close], torch.float32)


def test_prompts_are_what_the_target_was_asked(cache_dir: Path) -> None:
    reader = CacheReader(cache_dir)
    _, held_out = split(reader, 0.3)
    prompts = held_out_prompts(reader, held_out, 3)
    assert len(prompts) == 3
    assert len({tuple(prompt) for prompt in prompts}) == 3
    by_hand = []
    for i in held_out.tolist():
        ids, mask = (part.tolist() for part in reader.tokens(i))
        by_hand.append(ids[: mask.index(1)])
    assert all(prompt in by_hand for prompt in prompts)
    assert held_out_prompts(reader, held_out, 1000) == by_hand
    with pytest.raises(ConfigError, match="held out no samples"):
        held_out_prompts(reader, held_out[:0], 3)


def test_every_form_of_a_prompt(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ask = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": "why"},
        {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}]},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "no"}]},
        {"prompt": [{"role": "user", "content": "why"}]},
        {"text": ask},
        {"input_ids": tokenizer(ask)["input_ids"]},
    ]
    path = tmp_path / "forms.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    got = read_prompts(path, tokenizer, V, 100)
    assert [tokenizer.decode(ids) for ids in got] == [ask] * len(rows)
    two = "\ufeff" + json.dumps(rows[0]) + "\n" + json.dumps(rows[1]) + "\nthis is not read"
    path.write_text(two, encoding="utf-8")
    assert len(read_prompts(path, tokenizer, V, 2)) == 2
    no_ends = json.dumps({"prompt": "a\u2028b\x0cc"}, ensure_ascii=False)  # of lines
    path.write_text(no_ends, encoding="utf-8")
    assert "a\u2028b" in tokenizer.decode(read_prompts(path, tokenizer, V, 2)[0])
    text = tmp_path / "plain.txt"
    text.write_text("why\n\nwhy\n")
    assert [tokenizer.decode(ids) for ids in read_prompts(text, tokenizer, V, 9)] == [ask] * 2
    tokenizer.chat_template = None
    assert [tokenizer.decode(ids) for ids in read_prompts(text, tokenizer, V, 9)] == ["why"] * 2


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "3", "{}", '{"messages": []}', '{"messages": [{"role": "assistant", "content": "a"}]}',
     '{"text": 3}', '{"messages": [{"content": "a"}]}', '{"input_ids": ["a"]}', '{"input_ids": [1, 325]}',
     '{"input_ids": [-1]}', '{"input_ids": [true]}', '{"input_ids": [1.5]}', '{"input_ids": "12"}',
     '{"text": ""}', "", "\n\n"],
)  # fmt: skip
def test_what_is_no_prompt_is_refused_by_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"line 1 is not a prompt|has no prompt"):
        read_prompts(path, make_tokenizer(), V, 4)
