"""Compile the Triton kernels without a GPU and count what they use: see `__main__`."""
