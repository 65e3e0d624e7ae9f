"""Import torch, DeepSpeed and megatron-core without the warnings they print on import."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType


def import_quietly(module: str, threads: int) -> ModuleType:
    """Import one of our modules that needs torch; `threads` 0 takes all cores.

    The optional packages that the libraries warn about are listed in the start-up table of a run.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        if not torch.cuda.is_available():
            # DeepSpeed says on stdout, where --json writes, that it found no GPU.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        found = importlib.import_module(module)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return found
