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
    # What goes through here computes on the CPU; without it DeepSpeed says on stdout that it must.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importlib.import_module(module)
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return found
