"""Hold the fused operations: Triton kernels, their reference, and what checks and times them."""

if __name__ != "megatron_mode.kernels":
    # A top-level `kernels` would shadow Hugging Face's package of that name inside transformers.
    raise ImportError(
        f"{__name__!r} is not importable: import megatron_mode.kernels, and start Python with "
        "PYTHONSAFEPATH=1 so that the repository root is not on sys.path"
    )
