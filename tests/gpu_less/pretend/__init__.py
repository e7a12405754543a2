"""A pretend CUDA device: tensors that say `cuda:0` and compute on the CPU.

It shows what a GPU would do to this code, on a machine without one:

- operations that mix devices raise, as on CUDA;
- everything that makes the host wait for the GPU is counted, by the lines of this project that caused it;
- copies to page-locked memory are late: their destination is poisoned until the host waits for them;
- work on a second stream that nothing orders is a race, and so is memory that is freed under it;
- what opens a CUDA context on a GPU is noted, with the current device of each thread as CUDA keeps it.

Numbers are those of the CPU, to the last bit. Kernels are not compiled: torch.compile returns its argument,
and Triton looks as if it were not installed. `install` changes torch for good, so it needs a process of its
own: `python -m tests.gpu_less.pretend`, or `tests.gpu_less.session.Session` from a test.
"""

from __future__ import annotations

from tests.gpu_less.pretend.ledger import LEDGER, Ledger, Note
from tests.gpu_less.pretend.machine import H100, MACHINE
from tests.gpu_less.pretend.patches import install

__all__ = ["H100", "LEDGER", "MACHINE", "Ledger", "Note", "install"]
