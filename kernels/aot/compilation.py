"""Compile one launch for an architecture, without a GPU and never from Triton's cache."""

from __future__ import annotations

import contextlib
import io

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_mode.kernels.aot.launches import DTYPES, Launch, launches
from megatron_mode.kernels.aot.occupancy import WARP_THREADS
from megatron_mode.kernels.aot.resources import Job, Resources, count
from megatron_mode.kernels.mode_loss import tiling


def measure(job: Job) -> Resources:
    """Compile one job and return what it uses; raises RuntimeError where Triton cannot."""
    launch = launches(DTYPES[job.dtype], job.arch, divisible=job.divisible)[job.kernel]
    try:
        compiled, log = compile_launch(launch, job)
    except Exception as error:
        # Triton's own exceptions hold syntax trees, which do not travel between processes.
        raise RuntimeError(f"{job.kernel} does not compile for sm_{job.arch}: {error}") from None
    return count(
        job,
        multiplies=launch.multiplies,
        num_warps=launch.options["num_warps"],
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        log=log,
    )


def compile_launch(launch: Launch, job: Job) -> tuple[triton.compiler.CompiledKernel, str]:
    """Return the compiled kernel and the log of ptxas."""
    dtype = DTYPES[job.dtype]
    signature = launch.signature(dtype)
    names = list(signature)
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs=launch.attributes(dtype, divisible=job.divisible),
    )
    log = io.StringIO()
    with (
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
        contextlib.redirect_stdout(log),
    ):
        # A kernel from the cache would bring no log.
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", job.arch, WARP_THREADS),
            options={**launch.options, "enable_fp_fusion": tiling.FP_FUSION},
        )
    return compiled, log.getvalue()
