"""Compile what the launcher launches, without a GPU and never from Triton's cache.

Triton specialises on divisibility by 16 of pointers (bytes) and of integers that the kernel does
not exempt. The training shapes are divisible; odd ones must work too, so each kernel has both
variants. Tile sizes are those of `tiling`.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_mode.kernels.aot.resources import WARP_THREADS, Job, Resources, count
from megatron_mode.kernels.mode_loss import tiling
from megatron_mode.kernels.mode_loss.lm_kernels import dlogits, lse_forward, merge_tiles
from megatron_mode.kernels.mode_loss.mode_kernels import (
    hidden_gradient,
    mode_prologue,
    mode_weight_gradient,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Pointers to elements in the dtype of the hidden states, then others that are not fp32.
HIDDEN_POINTERS = (
    "hidden_ptr", "weight_ptr", "logits_ptr", "out_ptr", "mode_weight_ptr", "mode_bias_ptr",
)  # fmt: skip
POINTERS = {"target_ptr": "*i64", "lm_row_ptr": "*i32", "candidate_ptr": "*i8"}
FLOATS = ("z_weight", "threshold")


@dataclass(frozen=True)
class Launch:
    """Hold one way to launch a kernel."""

    kernel: Any
    """The function that `triton.jit` made."""
    arguments: dict[str, Any]
    """Compile-time arguments, a pointer that is None among them, and options of the launch."""
    multiplies: bool = False
    """It multiplies matrices: 16-bit operands must meet tensor cores."""

    def signature(self, dtype: str) -> dict[str, str]:
        """Return the Triton type of each argument, in order."""
        names = [parameter.name for parameter in self.kernel.params]
        return {
            name: "constexpr" if name in self.arguments else _argument_type(name, dtype)
            for name in names
        }

    @property
    def options(self) -> dict[str, Any]:
        """Return what is no argument of the kernel, beside what Triton takes without being told."""
        names = self.signature("bf16")
        given = {name: value for name, value in self.arguments.items() if name not in names}
        return {"num_warps": 4, "num_stages": 3, **given}


def _argument_type(name: str, dtype: str) -> str:
    if name in HIDDEN_POINTERS:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*fp32")
    return "fp32" if name in FLOATS else "i32"


def launches(dtype: str, arch: int, *, divisible: bool) -> dict[str, Launch]:
    """Return every launch by name, with the tiles for a compute capability such as 90."""
    tile = tiling.matmul_tile(DTYPES[dtype], arch, aligned=divisible)
    matmul = tiling.matmul_arguments(tile, even=divisible, interpreted=False)
    policy = {"WATCH_MODE1": True, "WATCH_MODE2": True, "DROP": False}
    forward = {"logits_ptr": None, "KEEP": False, **matmul}
    backward = {"logits_ptr": None, "KEPT": False, **matmul}
    return {
        "mode_prologue": Launch(mode_prologue, policy | tiling.PROLOGUE),
        "lse_forward": Launch(lse_forward, forward, multiplies=True),
        "lse_forward keep": Launch(lse_forward, {"KEEP": True, **matmul}, multiplies=True),
        "merge_tiles": Launch(merge_tiles, tiling.MERGE),
        "dlogits": Launch(dlogits, backward, multiplies=True),
        "dlogits kept": Launch(dlogits, {"KEPT": True, **matmul}),
        "hidden_gradient": Launch(hidden_gradient, tiling.HIDDEN_GRADIENT),
        "mode_weight_gradient": Launch(mode_weight_gradient, tiling.MODE_WEIGHT_GRADIENT),
    }


KERNELS = tuple(launches("bf16", 90, divisible=True))


def measure(job: Job) -> Resources:
    """Compile one job and return what it uses; raises RuntimeError where Triton cannot."""
    launch = launches(job.dtype, job.arch, divisible=job.divisible)[job.kernel]
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
    signature = launch.signature(job.dtype)
    position = {name: index for index, name in enumerate(signature)}
    fixed = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={
            (position[name],): value for name, value in launch.arguments.items() if name in position
        },
        attrs={
            (position[name],): [["tt.divisibility", tiling.ALIGNMENT]]
            for name, kind in signature.items()
            if job.divisible and (kind == "i32" or kind[0] == "*") and name not in fixed
        },
    )
    knobs, log = triton.knobs, io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # A kernel from the cache would bring no log.
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", job.arch, WARP_THREADS)
        compiled = triton.compile(source, target=target, options=launch.options)
    return compiled, log.getvalue()
