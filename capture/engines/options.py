"""Options that choose the engine of a capture; importing this imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pipeline.errors import UsageError
from pipeline.options import gathered
from pipeline.target_model.options import TargetOptions

HUGGING_FACE, VLLM = "huggingface", "vllm"
ENGINES = (HUGGING_FACE, VLLM)
# Arguments of vLLM that decide whether the states are right: they are the capture's own.
_OURS = {
    "model": "give --target",
    "tokenizer": "it is the target's",
    "dtype": "give --dtype",
    "tensor_parallel_size": "give --tensor-parallel",
    "trust_remote_code": "give --trust-remote-code",
    "revision": "give --revision",
    "enable_prefix_caching": "states that are not computed can't be kept",
    "speculative_config": "capture's own reads the states",
    "kv_transfer_config": "capture's own reads the states",
    "pipeline_parallel_size": "states are read from one stage",
    "skip_tokenizer_init": "the engine gets token ids",
    "logprobs_mode": "capture compares log-probabilities",
    "runner": "the target has to predict tokens",
    "data_parallel_size": "start one capture per engine: they share the shards",
}
# Options that a target split by transformers excludes, and what to do instead.
_WHOLE_ONLY = {
    "device_map": "drop it, the split places the target",
    "adapter": "merge it into the target first, and give the result",
    "regenerate": "let dspark regenerate --endpoint answer first, or give --engine vllm",
}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The engine that runs the target, and how."""

    engine: str = HUGGING_FACE
    engine_python: Path | None = None
    """Python of the engine's environment; None for this one."""
    tensor_parallel: int = 1
    """GPUs, or processes, over which every layer of the target is split."""
    engine_arg: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True for transformers in one process, which a cache's identity does not mention."""
        return self.engine == HUGGING_FACE and self.tensor_parallel == 1

    @property
    def is_split(self) -> bool:
        """True for transformers in several processes of torchrun, of which the first one captures."""
        return self.engine == HUGGING_FACE and self.tensor_parallel > 1

    def check(self) -> None:
        """Refuse options that contradict each other. Raises UsageError."""
        if self.engine == HUGGING_FACE and (self.engine_python or self.engine_arg):
            name = "--engine-python" if self.engine_python else "--engine-arg"
            raise UsageError(f"{name} is an option of --engine vllm, not of --engine {self.engine}: drop it")
        self.arguments()

    def check_target(self, target: TargetOptions, *, regenerates: bool) -> None:
        """Refuse options that a target split by transformers does not go through. Raises UsageError."""
        asked = {name: getattr(target, name) for name in ("device_map", "adapter")}
        for name, given in (asked | {"regenerate": regenerates}).items() if self.is_split else ():
            if given:
                option = f"--{name.replace('_', '-')}"
                split = f"--engine {self.engine} --tensor-parallel {self.tensor_parallel}"
                raise UsageError(f"{split} excludes {option}: {_WHOLE_ONLY[name]}")

    def arguments(self) -> dict[str, Any]:
        """Return the engine's arguments of `--engine-arg name=value`, sorted by name.

        A value that is valid JSON (true, 3, 0.8, {"a": 1}) is parsed; any other is kept as text.

        Raises:
            UsageError: an argument without a name or an equals sign, one given twice, or one that is the
                capture's own.
        """
        arguments: dict[str, Any] = {}
        for argument in self.engine_arg:
            name, sign, value = argument.partition("=")
            name = name.strip().replace("-", "_")
            if not sign or not name.isidentifier():
                raise UsageError(f"expected --engine-arg name=value, got {argument!r}")
            if name in arguments:
                raise UsageError(f"--engine-arg {name} is given twice: give it once")
            if name in _OURS:
                raise UsageError(f"--engine-arg {name} can't be chosen: {_OURS[name]}")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                arguments[name] = value
        return dict(sorted(arguments.items()))


engine_options = gathered(
    EngineOptions,
    "engine",
    [
        click.option(
            "--engine",
            type=click.Choice(ENGINES),
            default=HUGGING_FACE,
            show_default=True,
            help="Run the target in this process by transformers, or by vLLM in an environment of its own.",
        ),
        click.option(
            "--engine-python",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Python of vLLM's environment.  [default: the one that runs this command]",
        ),
        click.option(
            "--tensor-parallel",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Split every layer over this many GPUs: vLLM's, or torchrun's processes by transformers.",
        ),
        click.option(
            "--engine-arg",
            multiple=True,
            metavar="NAME=VALUE",
            help="Argument of vllm.LLM, such as gpu_memory_utilization=0.8. May be given several times.",
        ),
    ],
)
"""Add the options of `EngineOptions` to a click command, which receives them as `engine`."""
