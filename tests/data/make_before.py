"""Make `tests/data/before`: what users have on their disks from before `train/` was moved into rooms.

Made by commit affebdda888e3303ddab25eb72484eb44677a41d with this; not run by the tests. They open what it
left (`tests/test_made_before.py`), so it may be run again at that commit only: whatever a later commit writes
is no proof that old files still open. At another commit it refuses.

    python -m tests.data.make_before

Everything but the target, the conversations and the configs is written by the command line, in fp32 on one
CPU thread. Where a run has to be stopped at a certain step, a function of the training loop is wrapped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from tests.conftest import run_cli, run_ok
from tests.tiny import make_conversations, make_target

COMMIT = "affebdda888e3303ddab25eb72484eb44677a41d"
ROOT = Path(__file__).parents[2]
BEFORE = Path(__file__).parent / "before"
FP32 = ("--dtype", "float32", "--device", "cpu")
CAPTURE = ("capture", "--target", "tiny-target", "--data", "chats.jsonl", "--layers", "0,1,2", *FP32)
SHARDS = ("--shard-tokens", "1024", "--batch-tokens", "512")

# What all runs have in common.
SMALL = """\
[draft]
num_layers = 1
block_size = 3
target_layer_ids = [0, 2]
markov_rank = 4

[train]
max_steps = 24
batch_tokens = 256
anchors_per_batch = 64
micro_batches_per_step = 1
lr = 3e-3
weight_decay = 0.1
held_out = 0.2
precision = "fp32"
log_every = 3
eval_every = 8
checkpoint_every = 14
keep_checkpoints = 1
"""

# Every setting that there is but one, each with another value than its default.
EVERY_KEY = """\
[draft]
num_layers = 2
block_size = 4
target_layer_ids = [0, 2]
mask_token_id = 301
markov_head = "gated"
markov_rank = 3
confidence_head = false
confidence_with_markov = false
num_attention_heads = 4
num_key_value_heads = 1
head_dim = 4
intermediate_size = 20
init = "ridge"
attention = "sdpa"

[loss]
ce_alpha = 0.25
l1_alpha = 0.75
confidence_alpha = 0.5
decay_gamma = "none"

[train]
epochs = 3
max_steps = 2
batch_tokens = 192
anchors_per_batch = 48
micro_batches_per_step = 2
optimizer = "muon"
lr = 1e-3
markov_lr_scale = 20.0
warmup_ratio = 0.5
min_lr_ratio = 0.25
beta1 = 0.8
beta2 = 0.99
weight_decay = 0.01
max_grad_norm = 2.0
seed = 7
held_out = 0.25
eval_anchors = 8
precision = "fp32"
tf32 = false
compile = "off"
activation_checkpointing = true
parallelism = "fsdp"
log_every = 1
report_to = ["tensorboard"]
eval_every = 1
early_stopping_patience = 5
checkpoint_every = 1
checkpoint_minutes = 5.0
keep_checkpoints = 1
max_skipped_steps = 3
"""

# And that one, which goes with no other `init`; all else as in the run that it names.
FROM_RUN = """\
[draft]
num_layers = 1
block_size = 3
target_layer_ids = [0, 2]
markov_rank = 4
init = "random"
init_from = "run-finished"

[train]
max_steps = 1
lr = 1e-9
held_out = 0.2
precision = "fp32"
"""


def train(run: str, *settings: str) -> list[str]:
    """`dspark train` of a small draft."""
    arguments = ["train", "--cache", "cache-nf4", "--config", "small.toml", "--run", run, "--device", "cpu"]
    return [*arguments, *(part for setting in settings for part in ("--set", setting))]


def speculate(run: str) -> list[str]:
    """`dspark speculate` over the cache's held-out questions."""
    arguments = ["speculate", "--target", "tiny-target", "--run", run, "--cache", "cache-nf4", *FP32]
    return [*arguments, "--num-prompts", "4", "--max-new-tokens", "24", "--temperature", "0"]


MUON = ("train.optimizer=muon", "draft.markov_head=rnn", "train.lr=1e-3", "train.checkpoint_every=0")
LONGER = ("train.max_steps=400", "train.log_every=100", "train.eval_every=200", "train.lr=1e-2")
FINISHED = ("--run", "run-finished", "--cache", "cache-nf4", "--device", "cpu")
IMPORTED = ("--run", "run-imported", "--cache", "cache-nf4")
BF16 = ("--context-codec", "bf16", "--last-codec", "bf16")
# By the name of what they make; the tests give some of them again, as a user does.
COMMANDS: dict[str, list[str]] = {
    "cache-nf4": [*CAPTURE, "--cache", "cache-nf4", *SHARDS],
    "cache-bf16": [*CAPTURE, "--cache", "cache-bf16", *SHARDS, *BF16, "--num-samples", "16"],
    "run-killed": train("run-killed"),
    "run-stopped": train("run-stopped", *MUON),
    "run-finished": train("run-finished", *LONGER),
    "evaluation": ["evaluate", *FINISHED, "--json"],
    "calibration": ["calibrate", *FINISHED, "--json"],
    "speculation": [*speculate("run-finished"), "--show", "--json"],
    "export-hf": [
        *("export", "run-finished", "export-hf", "--to", "hf", "--dtype", "float32"),
        *("--with-embeddings", "--cache", "cache-nf4"),
    ],
    "export-vllm": ["export", "run-finished", "export-vllm", "--to", "vllm"],
    "run-imported": [
        *("import", "export-vllm", *IMPORTED),
        *("--set", "train.held_out=0.2", "--set", "train.precision=fp32"),
    ],
    "imported-evaluation": ["evaluate", *IMPORTED, "--device", "cpu", "--json"],
    "sweep": [
        *("sweep", "small.toml", "--cache", "cache-bf16", "--runs", "sweep", "--device", "cpu"),
        *("--set", "draft.markov_head=none", "--set", "draft.confidence_head=false"),
        *("--set", "train.max_steps=4", "--set", "train.lr=1e-3,2e-3"),
    ],
}


class Killed(BaseException):
    """Ends a run as a killed process ends: nothing more is written."""


@contextmanager
def at_step(step: int, happen: Callable[[], None]) -> Iterator[None]:
    """Let something happen once, when the training loop begins the step behind `step`."""
    import train.loop

    real, done = train.loop.learning_rate, []

    def learning_rate(now: int, *given):
        if now == step and not done:
            done.append(now)
            happen()
        return real(now, *given)

    train.loop.learning_rate = learning_rate
    try:
        yield
    finally:
        train.loop.learning_rate = real
    assert done == [step]


def kill() -> None:
    """As SIGKILL would."""
    raise Killed


def make_inputs() -> None:
    """The target, its conversations, the configs, and the commands."""
    make_target(
        Path("tiny-target"),
        dtype=torch.float32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,  # so that it mostly repeats a token, which a draft can learn
    )
    make_conversations(Path("chats.jsonl"), count=40)
    Path("small.toml").write_text(SMALL)
    Path("every-key.toml").write_text(EVERY_KEY)
    Path("from-run.toml").write_text(FROM_RUN)
    Path("commands.json").write_text(json.dumps(COMMANDS, indent=1) + "\n")
    shutil.copy(ROOT / "configs" / "example.toml", "example.toml")
    shutil.copy(ROOT / "configs" / "qwen3-4b.toml", "qwen3-4b.toml")


def make_unfinished_run(name: str, step: int, happen: Callable[[], None]) -> None:
    """A run that ends at the beginning of a step, and what it would have become."""
    arguments = COMMANDS[f"run-{name}"]
    run_ok(*("whole" if argument == f"run-{name}" else argument for argument in arguments))
    kept = Path("uninterrupted") / name
    kept.mkdir(parents=True)
    for file in ("latest/model.safetensors", "metrics.jsonl"):
        shutil.copy(Path("whole") / file, kept)
    shutil.rmtree("whole")
    with at_step(step, happen), suppress(Killed):
        assert run_cli(*arguments).exit_code == 128 + signal.SIGTERM


def make_finished_runs() -> None:
    """One with all figures beside its draft, its exports, one of these imported, and a sweep."""
    for name in ("run-finished", "evaluation", "calibration"):
        run_ok(*COMMANDS[name])
    result = run_cli(*COMMANDS["speculation"])
    assert result.exit_code == 0, result.output
    Path("speculated.txt").write_text(result.stderr, encoding="utf-8")
    for name in ("export-hf", "export-vllm", "run-imported", "imported-evaluation", "sweep"):
        run_ok(*COMMANDS[name])
    for log in Path("sweep").glob("*.log"):  # they name this machine's interpreter
        log.unlink()


def check_every_key() -> None:
    """Check that the configs name every setting, with another value than its default."""
    from train.config import RunConfig

    defaults = {k: json.loads(json.dumps(v)) for k, v in asdict(RunConfig()).items()}
    known = {f"{table}.{key}" for table, values in defaults.items() for key in values}
    named = {
        f"{table}.{key}"
        for text in (EVERY_KEY, FROM_RUN)
        for table, values in tomllib.loads(text).items()
        for key, value in values.items()
        if value != defaults[table][key]
    }
    assert named == known, named ^ known


def main() -> None:
    """Make the folder anew."""
    code = ("pipeline", "capture", "train", "configs")
    changed = subprocess.run(["git", "diff", "--quiet", COMMIT, "--", *code], cwd=ROOT, check=False)
    if changed.returncode:
        sys.exit(f"the code is not that of commit {COMMIT}: this is run at that commit only")
    check_every_key()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSPARK_TOKENS"] = str(Path(folder) / "tokens")
        before = Path(folder) / "before"
        before.mkdir()
        with chdir(before):
            make_inputs()
            run_ok(*COMMANDS["cache-nf4"])
            run_ok(*COMMANDS["cache-bf16"])
            make_unfinished_run("killed", 15, kill)  # a step behind a checkpoint, a log line between them
            make_unfinished_run("stopped", 18, lambda: signal.raise_signal(signal.SIGTERM))
            make_finished_runs()
        shutil.rmtree(BEFORE, ignore_errors=True)
        shutil.copytree(before, BEFORE, symlinks=True)
    facts = {"files": 0, "bytes": 0}
    for path in BEFORE.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = {"files": facts["files"] + 1, "bytes": facts["bytes"] + path.stat().st_size}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
