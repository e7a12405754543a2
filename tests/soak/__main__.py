"""Soak the product: a capture with every trouble at once, then verify, train and evaluate.

    python -m tests.soak                    # 20,000 rows, eight minutes on two cores
    python -m tests.soak --rows 2000        # a smaller one
    python -m tests.soak --seed 1           # other rows, other moments

Three processes fill one cache. They are killed, stopped and paused at random moments, and the disk is full
twice. Of each kind of bad row there is one in a thousand. Afterwards every row is accounted for, the cache
has the bytes of an undisturbed capture, and a draft is trained from it. Memory, open files and threads are
watched.

Exit code: 0 if all of it held; else an AssertionError says what did not, and the folder is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pipeline.cache import CacheReader
from pipeline.cache.shards import Shards
from tests.processes import Dspark
from tests.soak.checks import check_manifest, check_rows, check_states, check_tokens, digests
from tests.soak.rows import make_rows, write_rows
from tests.soak.target import MAX_LENGTH, make_soak_target
from tests.soak.team import NO_ROOM, Team, soaked, usual
from tests.soak.watch import EVERY_SECONDS, MIB, Watch, workers_of
from tests.train.runs import train_arguments

SHARD_TOKENS = 3072
STEPS = 1000
SUBSET = 200
"""Samples whose states are computed again."""
LIMITS = {"memory": 1200 * MIB, "files": 64, "threads": 48}
TRAIN_FILES = 2 * Shards.most_mapped + 64
"""Maximum open files of a training: a mapped shard has two."""
GROWTH = 64 * MIB
"""Maximum growth of one process's memory from the first quarter of its time to the last."""
LATER_GROWTH = 192 * MIB
"""The same after the first sample that does not fit: each such sample may leave its freed memory."""
LOADED_SECONDS = 15.0
"""Least time before such a sample in which growth can be judged."""


class Soak:
    """The soak in a folder.

    Args:
        rows: number of rows, about.
        seed: of the rows and of what happens.
    """

    def __init__(self, folder: Path, rows: int, seed: int):
        self.folder, self.seed, self._began = folder, seed, time.monotonic()
        self.tokens = folder / "tokens"
        os.environ["DSPARK_TOKENS"] = str(self.tokens)
        self.target = folder / "target"
        self.sources = make_rows(make_soak_target(self.target), rows, seed)
        self.data = write_rows(folder, self.sources)
        self.cache, self.whole, self.run = folder / "cache", folder / "whole", folder / "run"

    def say(self, *lines: str) -> None:
        """Print lines, the first with the seconds since the beginning."""
        print(f"{time.monotonic() - self._began:6.0f} s  " + "\n          ".join(lines), flush=True)

    def command(self, cache: Path) -> list[str | Path]:
        """Return the capture's command line."""
        words: list[str | Path] = ["capture", "--target", self.target, "--cache", cache]
        for path in self.data:
            words += ["--data", path]
        words += ["--layers", "0,9,18", "--shard-tokens", str(SHARD_TOKENS), "--batch-tokens", "96"]
        words += ["--context-codec", "bf16", "--last-codec", "bf16", "--dtype", "float32", "--device", "cpu"]
        words += ["--attn-implementation", "eager", "--max-length", str(MAX_LENGTH)]
        return [*words, "--bad-rows", "skip"]

    def watched(
        self, name: str, *words: str | Path, before=usual, later: str = "", **variables: str
    ) -> tuple[Dspark, Watch, Watch]:
        """Run a command to its end, which must be a good one, and watch it.

        Args:
            later: a message of the command, after which the second watch looks.

        Returns:
            The command, and what the two watches saw.
        """
        dspark = Dspark(self.folder / name, *words, before=before, **variables)
        first, second = Watch(name), Watch(f"{name}, later")
        while dspark.process.exitcode is None:
            watch = second if later and later in dspark.err else first
            watch.look([dspark.process.pid])
            time.sleep(EVERY_SECONDS / 5)
        assert dspark.wait() == 0, dspark.err[-3000:]
        return dspark, first, second

    def disturbed(self) -> None:
        """Let a team fill the cache, disturbed."""
        skip = ["--bad-states", "skip"]
        team = Team(
            self.folder / "team",
            self.command(self.cache),
            self.cache,
            phases=([], skip, [*skip, "--max-bad-states", "1%"]),
            messages=("--bad-states skip", "samples are bad"),
            watch=Watch("team"),
            seed=self.seed,
        )
        team.run()
        time.sleep(2.0)
        assert not workers_of(self.tokens), "tokenising processes outlive those that started them"
        events = ", ".join(f"{name} {number}" for name, number in sorted(team.seen.items()))
        self.say("the disturbed capture is complete", events, *team.watch.lines())
        team.watch.check(**LIMITS)

    def undisturbed(self) -> None:
        """Capture the same by one process, in its own time, and compare all bytes."""
        words = [*self.command(self.whole), "--bad-states", "skip", "--max-bad-states", "1%"]
        full = str(self.folder / "never")
        _, watch, rest = self.watched("undisturbed", *words, before=soaked, later=NO_ROOM, DISK_FULL=full)
        got, expected = digests(self.cache), digests(self.whole)
        assert got == expected, sorted(
            name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name)
        )
        shards = sum(name.startswith("shards/") for name in got)
        self.say(
            f"{len(got)} files, {shards} of them shards, have the bytes of an undisturbed capture",
            *watch.lines(),
            *rest.lines(),
        )
        rest.check(**LIMITS, growth=LATER_GROWTH)
        if watch.seconds() >= LOADED_SECONDS:
            watch.check(**LIMITS, growth=GROWTH)
        else:
            self.say("a sample did not fit so early that memory before it is not compared")

    def account(self) -> None:
        """Account for every row."""
        counts = check_rows(self.tokens, self.sources)
        reader = CacheReader(self.cache)
        check_manifest(reader, self.sources, counts)
        check_tokens(reader, self.sources)
        worst = check_states(reader, self.target, SUBSET, self.seed)
        reasons = (f"{number:,} {reason or 'captured'}" for reason, number in counts.most_common())
        self.say(
            f"{sum(counts.values()):,} rows are accounted for: " + ", ".join(reasons),
            f"states of {min(SUBSET, len(reader))} samples are those of the row alone, "
            f"to {worst:.2f} of one step of bf16",
        )

    def use(self) -> None:
        """Verify the cache, train a draft from it and evaluate that."""
        _, watch, _ = self.watched("verify", "verify", self.cache)
        self.say("verify found nothing", *watch.lines())
        settings = {"train__max_steps": STEPS, "train__batch_tokens": 1024, "train__held_out": 0.02}
        _, watch, _ = self.watched("train", *train_arguments(self.cache, self.run, **settings))
        self.say(f"trained {STEPS} steps", *watch.lines())
        watch.check(**{**LIMITS, "files": TRAIN_FILES}, growth=GROWTH)
        draft = ("--cache", self.cache, "--run", self.run, "--device", "cpu")
        words = ("evaluate", *draft, "--anchors", "8", "--json")
        dspark, *_ = self.watched("evaluate", *words)
        values = json.loads(dspark.out).items()
        figures = {name: value for name, value in values if isinstance(value, float)}
        assert figures, dspark.out
        assert all(map(math.isfinite, figures.values())), figures
        self.say("evaluated: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def main() -> None:
    """Read the command line and soak."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=int(os.environ.get("SOAK_ROWS", 20_000)), help="[20000]")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of what happens [0]")
    parser.add_argument("--keep", action="store_true", help="keep the folder also if all held")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    folder = Path(tempfile.mkdtemp(prefix="dspark-soak-"))
    print(f"{given.rows:,} rows, seed {given.seed}, in {folder}", flush=True)
    soak = Soak(folder, given.rows, given.seed)
    for stage in (soak.disturbed, soak.undisturbed, soak.account, soak.use):
        stage()
    soak.say("all of it held")
    if not given.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
