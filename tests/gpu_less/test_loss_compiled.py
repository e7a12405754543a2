"""The loss's Triton kernels compiled for GPUs that are not here: what the machine code needs and does."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.gpu_less
VOCAB = 151_936  # Qwen3's
THREADS, REGISTERS = 2048, 65_536  # of a multiprocessor
POINTERS = {
    **dict.fromkeys(("logits", "bias", "teacher", "teacher_highest", "teacher_total"), "*fp32"),
    **dict.fromkeys(("target_total", "weights", "losses", "highest", "total"), "*fp32"),
    **dict.fromkeys(("gradient", "of_bias"), "*bf16"),
    **dict.fromkeys(("rows", "labels"), "*i64"),
    "best": "*i32",
}
KERNELS = {
    "teacher": {},
    "train": {"taught": True, "differentiate": True},
    "train without a teacher": {"differentiate": True},
    "train soft": {"taught": True, "soft": True, "differentiate": True},
    "evaluate": {"taught": True, "match": True},
    "evaluate soft": {"taught": True, "soft": True, "match": True},
    "train capped": {"taught": True, "differentiate": True, "cap": 30.0, "biased": True},
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for a GPU."""

    ttir: str
    """Triton's code, types spelt out."""
    ptx: str
    shared: int
    """Bytes of shared memory."""
    cubin: bytes

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.ptx))


@cache
def compiled(name: str, capability: int, vocab: int = VOCAB) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from train.losses import kernels

    block = min(kernels.BLOCK, triton.next_power_of_2(vocab))
    constants = {"vocab": vocab, "block": block, "stride": 2 * vocab, "scale": 1.0, "cap": 0.0}
    flags = ("biased", "taught", "soft", "match", "differentiate")
    constants |= dict.fromkeys(flags, False) | KERNELS[name]
    function = kernels.teacher_kernel if name == "teacher" else kernels.losses_kernel
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={each: POINTERS.get(each, "constexpr") for each in names},
        constexprs={(names.index(each),): value for each, value in constants.items() if each in names},
        attrs={(i,): [["tt.divisibility", 16]] for i, each in enumerate(names) if each in POINTERS},
    )
    target = GPUTarget("cuda", capability, 32)
    limits = {"maxnreg": kernels.SOFT_REGISTERS} if constants["soft"] else {}
    made = triton.compile(source, target=target, options={"num_warps": kernels.WARPS, **limits})
    return Compiled(made.asm["ttir"], made.asm["ptx"], made.metadata.shared, made.asm["cubin"])


CAPABILITIES = pytest.mark.parametrize("capability", [86, 90])


@CAPABILITIES
@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_read_and_written_16_bytes_at_a_time(name: str, capability: int) -> None:
    kernel = compiled(name, capability)
    wide = kernel.count(r"ld\.global\.v4\.b32")
    # Two loads of 4 fp32 a thread and step. The first pass takes two steps at once, of the bias too.
    first = 4 * (2 if name == "train capped" else 1)
    others = {"teacher": 0, "train": 8, "train without a teacher": 2, "evaluate": 4, "train capped": 12}
    assert (
        wide == first + others[name.removesuffix(" soft")]
    )  # the soft cross entropy reads no row of its own
    narrow = kernel.count(r"ld\.global\.b(?:32|64)")
    assert narrow <= 9  # a row's own: label, weights, position, its teacher's figures
    stores = {"train": 1, "train soft": 1, "train without a teacher": 1, "train capped": 2}
    assert kernel.count(r"st\.global\.v4\.b32") == stores.get(name, 0)  # 8 gradients in bf16
    assert "ld.global.nc" not in kernel.ptx  # a cache that does not see what is written over the logits


@CAPABILITIES
@pytest.mark.parametrize("name", KERNELS)
def test_two_programs_fit_a_multiprocessor(name: str, capability: int, tmp_path: Path) -> None:
    from train.losses.kernels import WARPS

    kernel = compiled(name, capability)
    assert kernel.shared <= 1024
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("needs cuobjdump, which this triton does not bring")
    (tmp_path / "cubin").write_bytes(kernel.cubin)
    found = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "cubin"], check=True, capture_output=True, text=True
    ).stdout
    usage = {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    assert usage["STACK"] == usage["LOCAL"] == 0  # no register is kept in memory
    programs = 1 if name == "train capped" else 2
    assert usage["REG"] * 32 * WARPS * programs <= REGISTERS


@CAPABILITIES
@pytest.mark.parametrize("name", ["train", "train soft", "train without a teacher", "train capped"])
def test_no_gradient_is_written_before_all_threads_have_read(name: str, capability: int) -> None:
    """In bf16 a step's gradients lie over logits of the same step: a barrier is between."""
    lines = compiled(name, capability).ptx.splitlines()
    first = next(i for i, line in enumerate(lines) if "st.global.v4.b32" in line)
    before = [line for line in lines[:first] if re.search(r"ld\.global\.v4|bar\.sync", line)]
    assert "bar.sync" in before[-1]


@pytest.mark.parametrize("name", KERNELS)
def test_rows_are_found_with_64_bits_and_tokens_with_32(name: str) -> None:
    """A chunk may have 2^31 logits and more; a vocabulary has not."""
    ttir = compiled(name, 90).ttir
    starts = re.findall(r"tt\.addptr %(?:logits|bias|teacher|gradient|of_bias), \S+ : \S+ (i\d+)", ttir)
    assert set(starts) == {"i64"}
    tokens = re.findall(r"tensor<4096x(i\d+)>", ttir)
    assert "i32" in tokens
    assert set(tokens) <= {"i1", "i32"}


def test_an_odd_vocabulary_is_read_one_by_one_and_compiles() -> None:
    kernel = compiled("train", 90, 47)
    assert kernel.count(r"ld\.global\.v4\.b32") == 0
    assert kernel.count(r"st\.global\.b16") == 1
