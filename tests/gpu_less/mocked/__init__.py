"""A GPU that is not there, for which Inductor and Triton compile as if it were.

`guard.cpp` lets a CPU build of torch trace fake CUDA tensors; `gpu` tells torch what GPU it has, takes the
Triton kernels that Inductor generates, and runs nothing; `machine_code` compiles such kernels for the GPU.
The library has to be loaded before torch, so all this happens in a process of its own, see `preload`.
"""
