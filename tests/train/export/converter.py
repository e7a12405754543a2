"""Run llama.cpp's own converter, where its source is: a script for a process of its own.

`python converter.py SOURCE` reads a JSON list of command lines from standard input and runs each. SOURCE is
llama.cpp's folder. Two things are replaced, which are of no account for the tests' tokenizer: sentencepiece,
which need not be installed, and the table of known tokenizers, which has none of the tests'.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
SOURCE = Path(os.environ.get("DSPARK_LLAMA_CPP") or ROOT / ".cache/engines/llama.cpp")
SCRIPT = "convert_hf_to_gguf.py"


def convert(*lines: list[str | Path]) -> None:
    """Run the converter once for each list of arguments."""
    subprocess.run(
        [sys.executable, __file__, SOURCE],
        input=json.dumps([[str(word) for word in line] for line in lines]),
        capture_output=True,
        text=True,
        check=True,
    )


def _main(source: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    stand_in = ModuleType("sentencepiece")
    stand_in.__spec__ = ModuleSpec("sentencepiece", None)
    stand_in.SentencePieceProcessor = object
    sys.modules["sentencepiece"] = stand_in
    base = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    for line in json.load(sys.stdin):
        sys.argv = [SCRIPT, *line]
        runpy.run_path(str(source / SCRIPT), run_name="__main__")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
