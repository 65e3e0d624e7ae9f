"""Compile the Triton kernels without a GPU and say what they use, and what a step costs at least.

`python -m megatron_mode.kernels.aot`: registers, spills, shared memory, tensor-core instructions.
"""
