"""Tell torch and Triton that a GPU is there, and take what Inductor compiles for it. See the package."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import async_compile, config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that compilers ask for, in bytes; shared memory of a multiprocessor and a block."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    shared: int
    shared_of_a_block: int
    l2: int

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 << 30, 233472, 232448, 50 << 20),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 24 << 30, 102400, 101376, 6 << 20),
}


@dataclass
class Compiler:
    """A stand-in for torch.compile's backend `inductor`: compiles for the GPU, then runs on fake tensors."""

    kernels: list[tuple[str, str]] = field(default_factory=list)
    """Name and source of each Triton kernel, as generated."""
    graphs: Counter[str] = field(default_factory=Counter)
    """Compiled graphs, forward and backward, by the name of the compiled function."""

    def backend(self, name: str) -> Callable[..., Any]:
        def compile_graph(
            module: Any, inputs: Any, options: dict[str, Any] | None = None
        ) -> Callable[..., Any]:
            return compile_fx(module, inputs, inner_compile=self._inner(name), config_patches=options)

        return compile_graph

    def _inner(self, name: str) -> Callable[..., Any]:
        def inner(module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
            kept = copy.deepcopy(module)  # lowering changes the graph
            compile_fx_inner(module, inputs, **options)
            self.graphs[name + (" backward" if options.get("is_backward") else "")] += 1

            def run(arguments: list[Any]) -> Any:
                values = list(arguments)
                modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
                with modes[0] if modes else contextlib.nullcontext():
                    return kept(*values)

            run._boxed_call = True
            return run

        return inner


class _Nothing:
    """A kernel that is never launched."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def install(gpu: Gpu) -> Compiler:
    """Mock the GPU in this process, for good. torch.compile then compiles for it."""
    _mock_cuda(gpu)
    _mock_triton(gpu)
    compiler = Compiler()

    def take(self: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> _Nothing:
        compiler.kernels.append((kernel_name, source_code))
        return _Nothing()

    async_compile.AsyncCompile.triton = take
    config.compile_threads = 1
    config.joint_graph_constant_folding = False  # would run parts of the graph
    # Patterns that are traced on the GPU when the first graph is compiled.
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init")):
        setattr(module, name, lambda *_, **__: None)
    misc_patterns._misc_patterns_init = lambda *_, **__: None
    real = torch.compile

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return real(function, backend=compiler.backend(function.__name__), **options)

    torch.compile = compiled
    return compiler


def _mock_cuda(gpu: Gpu) -> None:
    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if gpu.capability == (9, 0) else 1536,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=gpu.memory,
        gcnArchName="",
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared_of_a_block,
        shared_memory_per_multiprocessor=gpu.shared,
        L2_cache_size=gpu.l2,
    )
    answers = {
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_compiled": True,
        "_lazy_init": None,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "device_count": 1,
        "set_device": None,
        "synchronize": None,
        "get_arch_list": [f"sm_{major}{minor}"],
        "mem_get_info": (gpu.memory, gpu.memory),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    torch.version.cuda = "13.0"
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda device: 0
    interface = {
        "get_device_properties": properties,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
        "synchronize": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "is_available": True,
    }
    for name, answer in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, _answer=answer, **__: _answer))
    for name in ("get_device_properties", "current_device"):
        setattr(CudaInterface.Worker, name, getattr(CudaInterface, name))


def _mock_triton(gpu: Gpu) -> None:
    figures = {
        "max_shared_mem": gpu.shared_of_a_block,
        "multiprocessor_count": gpu.multiprocessors,
        "warpSize": 32,
        "max_num_regs": 65536,
        "sm_clock_rate": 1980000,
        "mem_clock_rate": 2619000,
        "mem_bus_width": 5120,
    }
    driver = SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=lambda device: figures),
        get_current_target=lambda: gpu.target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
    )
    triton.runtime.driver.set_active(driver)


@contextlib.contextmanager
def faked(module: nn.Module) -> Iterator[None]:
    """Put a module on the GPU, and make every new tensor a fake one inside."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, old in part._parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda:0")
                    part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
            for name, old in part._buffers.items():
                if old is not None:
                    part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device="cuda:0")
        yield
