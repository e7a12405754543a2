"""`dspark prove` from the command line, with stand-ins for the engines."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.child import started
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark
from tests.train.prove import engines
from tests.train.runs import train_arguments
from train.decode.benchmark import load_pair
from train.decode.prompts import choose_prompts
from train.decode.speculative import decode_plain, decode_speculative
from train.decode.target import CachedTarget
from train.prove.llama_cpp import read_drafts
from train.runs.open import open_draft


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "a"
    run_ok(*train_arguments(cache_dir, path, train__max_steps=2))
    return path


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "a"
    run_ok("export", run, folder, "--to", "hf", "--dtype", "float32")
    return folder


@pytest.fixture(scope="module")
def answers(run: Path, cache_dir: Path, target_dir: Path) -> tuple[dict, dict]:
    """Answers of an engine that does what `decode_speculative` does, without a draft and with it."""
    draft, target = open_draft(run), open_target(TargetOptions(target=str(target_dir), dtype="float32"))
    prompts = choose_prompts(None, cache_dir, 2, run=run, draft=draft, tokenizer=target.tokenizer())
    pair, log = load_pair(target, draft), []
    propose = pair.decoder.draft

    def logged(*args, **kwargs):
        drafted = propose(*args, **kwargs)
        log.append(drafted.tokens.tolist())
        return drafted

    pair.decoder.draft = logged
    plain, texts, drafts = [], [], []
    with CachedTarget(pair.model, draft.shape.target_layer_ids) as watched:
        for prompt in prompts:
            plain.append(decode_plain(watched, prompt, 8).tokens)
            log.clear()
            texts.append(decode_speculative(watched, pair.decoder, prompt, 8).tokens)
            drafts.append(list(log))
    facts = {"version": "vLLM of the tests", "seconds": 1.0}
    return {"texts": plain, "drafts": [], **facts}, {"texts": texts, "drafts": drafts, **facts}


@pytest.fixture
def told(answers: tuple[dict, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The answer with the draft, to be changed and written by `tell`; all files are in the test's folder."""
    monkeypatch.setenv(engines.ANSWERS, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "plain.json").write_text(json.dumps(answers[0]))
    (tmp_path / "draft.json").write_text(json.dumps(answers[1]))
    return json.loads(json.dumps(answers[1]))


@pytest.fixture
def asked(run: Path, export: Path, cache_dir: Path, target_dir: Path, told: dict) -> list[str | Path]:
    """The command line, without the engine."""
    options = ("--cache", cache_dir, "--num-prompts", "2", "--max-new-tokens", "8", "--device", "cpu")
    return ["prove", export, "--run", run, "--target", target_dir, *options]


def test_nothing_that_is_no_export_of_the_run_is_proved(
    asked: list[str | Path], run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    vllm = engines.environment(tmp_path / "vllm")
    other = tmp_path / "other"
    run_ok(*train_arguments(cache_dir, other, train__max_steps=3))
    asked[asked.index(run)] = other
    command = (*asked, "--engine", "vllm", "--engine-path", vllm)
    assert_refused(run_cli(*command), 1, "is not the export of step 3 of", "differs; pass its --run")
    asked[1] = tmp_path
    assert_refused(run_cli(*asked, *command[-4:]), 1, "can't be read", "expected a folder of `dspark export`")


def on_vllm(tmp_path: Path) -> tuple[str | Path, ...]:
    return "--engine", "vllm", "--engine-path", engines.environment(tmp_path / "vllm")


def on_llama_cpp(tmp_path: Path) -> tuple[str | Path, ...]:
    return "--engine", "llama.cpp", "--engine-path", engines.checkout(tmp_path / "llama.cpp")


@pytest.mark.parametrize("engine", [on_vllm, on_llama_cpp])
def test_an_engine_that_does_as_we_do(asked, tmp_path: Path, engine) -> None:
    proof = json.loads(run_ok(*asked, *engine(tmp_path), "--json"))
    assert proof["holds"]
    assert (proof["prompts"], proof["same_texts"], proof["agreeing"]) == (2, 2, proof["tokens"])
    assert proof["drafted"] == proof["same"] == 3 * proof["rounds"] > 0
    assert proof["engine"].endswith("of the tests")
    assert proof["dtype"] == "float32"
    assert not list(tmp_path.glob("dspark-prove-*"))


@pytest.mark.parametrize("engine", [on_vllm, on_llama_cpp])
def test_one_other_drafted_token(asked, told, tmp_path: Path, engine) -> None:
    told["drafts"][1][0][-1] += 1
    (tmp_path / "draft.json").write_text(json.dumps(told))
    result = run_cli(*asked, *engine(tmp_path))
    assert_refused(result, 1, "other tokens than we do, or fewer (", "first in prompt 2 after token 1: [")
    assert "drafted tokens: " in result.stdout, "the figures come first"


def test_another_text(asked, told, tmp_path: Path) -> None:
    """The last token, so that every round is still the draft's."""
    told["texts"][1][-1] += 1
    (tmp_path / "draft.json").write_text(json.dumps(told))
    assert_refused(
        run_cli(*asked, *on_vllm(tmp_path)), 1, "another greedy text with the draft", "prompt 2 at token"
    )


@pytest.mark.parametrize(("engine", "says"), [(on_vllm, "no such kernel"), (on_llama_cpp, "no such model")])
def test_an_engine_that_fails(
    asked, tmp_path: Path, engine, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last line is in the message, and its log stays; what is large goes."""
    monkeypatch.setenv(engines.FAULT, "crash")
    result = run_cli(*asked, *engine(tmp_path))
    assert_refused(result, 1, "failed: ", says, "all of its output is in")
    log = Path(result.stderr.rpartition(" is in ")[2].strip())
    assert says in log.read_text()
    assert ".gguf" not in {path.suffix for path in log.parent.iterdir()}


def test_an_engine_without_an_answer(asked, tmp_path: Path) -> None:
    refused = run_cli(*asked, "--engine", "vllm", "--engine-path", "/usr/bin/true")
    assert_refused(refused, 1, "/usr/bin/true, which wrote no answer, failed")


@pytest.mark.parametrize("fault", ["dies", "lies"])
def test_a_server_that_ends_within_a_request(
    asked, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(engines.FAULT, fault)
    assert_refused(run_cli(*asked, *on_llama_cpp(tmp_path)), 1, "llama-server failed")


def test_a_second_ctrl_c_leaves_nothing_alive(tmp_path: Path) -> None:
    """Of a process that takes no SIGTERM."""
    script, pids = tmp_path / "engine.sh", tmp_path / "pids"
    script.write_text(f"trap '' TERM\necho $$ > {pids}\nwhile true; do sleep 0.1; done\n")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with started(["/bin/sh", script], tmp_path / "log"):
            while not (pids.exists() and pids.read_text().strip()):
                time.sleep(0.01)
            signal.setitimer(signal.ITIMER_REAL, 0.2)  # the second one, while the first waits
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not at_work(int(pids.read_text()))


def test_what_is_refused_leaves_no_folder(asked, tmp_path: Path) -> None:
    asked[1] = tmp_path
    assert_refused(run_cli(*asked, *on_vllm(tmp_path)), 1, "can't be read")
    assert not list(tmp_path.glob("dspark-prove-*"))


def test_engines_that_are_not_there(asked, tmp_path: Path) -> None:
    for engine, part in (("vllm", "bin/python"), ("llama.cpp", "build/bin/llama-server")):
        refused = run_cli(*asked, "--engine", engine, "--engine-path", tmp_path)
        assert_refused(refused, 2, part, "pass --engine-path, or run `make engines`")


def at_work(pid: int) -> bool:
    """Neither gone nor ended and waiting to be looked at by its parent."""
    state = subprocess.run(
        ["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return state.stdout.strip() not in ("", "Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_everything_ends_with_the_command(asked, tmp_path: Path, number: int) -> None:
    """Also what the engine itself started."""
    pids = tmp_path / "pids"
    variables = {engines.FAULT: "hang", engines.PIDS: str(pids), "TMPDIR": str(tmp_path)}
    dspark = Dspark(tmp_path / "out", *asked, *on_vllm(tmp_path), **variables)
    assert dspark.wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2), dspark.err
    dspark.send(number)
    assert dspark.wait() != 0
    assert "Traceback" not in dspark.err
    assert not [pid for pid in pids.read_text().split() if at_work(int(pid))]
    assert not list(tmp_path.glob("dspark-prove-*"))


def test_drafts_in_a_log() -> None:
    """As llama-server writes them: slots from 0 (DSpark), other candidates, and requests without a draft."""
    log = """
0.00.1 D slot launch_slot_: id  0 | task -1 | launching slot : {"id":0}
0.00.1 I slot launch_slot_: id  0 | task 0 | processing task, is_child = 0
0.00.2 D  - seq_id 0, draft candidate   0, pos   0:    271 (   0.312) ' the'
0.00.2 D  - seq_id 0, draft candidate   1, pos   0:     17 (   0.112) ' a'
0.00.2 D  - seq_id 0, draft candidate   0, pos   1:    402 (   0.212) ' cat'
0.00.3 D  - seq_id 0, draft candidate   0, pos   0:      5 (   0.212) 'draft candidate   0, pos   9:   1'
0.00.4 I slot launch_slot_: id  0 | task 9 | processing task, is_child = 0
0.00.5 I slot launch_slot_: id  0 | task 12 | processing task, is_child = 0
0.00.6 D spec draft: - seq_id 0, draft candidate   0, pos   0:     77 (   0.212) 'x'
"""
    assert read_drafts(log) == [[[271, 402], [5]], [], [[77]]]
